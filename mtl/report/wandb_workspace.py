"""A W&B workspace that compares the strategies of a benchmark: the dashboard as code, built from finished runs.

One saved view per benchmark. What a panel names is read from the runs' own rows, so it is what `WandbTracker` logged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mtl.errors import ConfigError, SetupError, one_line

if TYPE_CHECKING:
    from mtl.report.protocols import Protocol

AVERAGED = {"groupby": "Group", "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}  # over seeds
EXPLAINED = (("weights/", "Task weights"), ("grad/", "Gradient statistics"), ("lr", "Learning rate"))


def create(benchmarks: Iterable[Protocol], target: str) -> list[str]:
    """Save one workspace per benchmark with a finished run; their addresses.

    Args:
        benchmarks: as `mtl.report.protocols.benchmarks` sorts runs; the same runs should be in W&B.
        target: "entity/project".

    Raises:
        ConfigError: the target is not entity/project.
        SetupError: wandb-workspaces is not installed, W&B is not logged in, or it cannot be reached or refuses.
    """
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", target):
        raise ConfigError(f"--wandb {target}: must be ENTITY/PROJECT, as in the address of a W&B project")
    finished = [b for b in benchmarks if b.groups or b.baselines]
    workspaces = [build(benchmark, *target.split("/")) for benchmark in finished]
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise SetupError("--wandb: not logged in to W&B; run wandb login, or set WANDB_API_KEY")
    try:
        return [workspace.save().url for workspace in workspaces]
    except Exception as error:  # its client raises errors of requests, of GraphQL and of its own
        raise SetupError(f"--wandb {target}: W&B refused ({one_line(error)})") from error


def build(benchmark: Protocol, entity: str, project: str) -> Any:
    """The workspace of one benchmark, as a `wandb_workspaces.workspaces.Workspace`; needs no network.

    Raises:
        SetupError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise SetupError("--wandb needs the package wandb-workspaces: pip install 'mtl[workspace]'") from error

    groups = [*benchmark.groups, *benchmark.baselines]
    rows = [group.any.rows[0] for group in groups]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    honest = any(key.startswith("val/") for key in keys)

    def curves(y: str, width: int = 8) -> Any:
        return panels.LinePlot(title=y, x="epoch", y=[y], layout=panels.Layout(w=width), **AVERAGED)

    def best(metric: str) -> str:
        """The metric that strategies are compared by: chosen on validation data if there is any."""
        return f"{'selected' if honest else 'best'}/{metric}"

    def section(name: str, items: list, **options: Any) -> Any:
        return ws.Section(name=name, panels=items, is_open=True, **options)

    first = next(iter(benchmark.metrics))
    columns = [panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key)) for key in ("loss", "arch")]
    columns.append(panels.ParallelCoordinatesPlotColumn(metric=panels.Config("lr"), log=True))
    for metric, higher in benchmark.metrics.items():
        column = {"metric": panels.SummaryMetric(best(metric)), "inverted": not higher}
        columns.append(panels.ParallelCoordinatesPlotColumn(**column))
    sections = [
        section("Best runs", [
            *(panels.ScalarChart(title=f"{metric}, best of all runs", metric=panels.SummaryMetric(best(metric)),
                                 groupby_aggfunc="max" if higher else "min")
              for metric, higher in benchmark.metrics.items()),
            panels.BarPlot(title=best(first), metrics=[panels.SummaryMetric(best(first))], **AVERAGED),
            panels.ParallelCoordinatesPlot(columns=columns, layout=panels.Layout(w=24)),
        ]),
        *(section(f"Learning curves: {metric}", [
            curves(key) for split in ("test", "val", "train") if (key := f"{split}/{metric}") in keys
        ]) for metric in benchmark.metrics),
        section("Losses", [curves(key) for key in keys if key.endswith("_loss")]),
    ]  # fmt: skip
    for prefix, title in EXPLAINED:
        if shown := [curves(key) for key in keys if key.startswith(prefix)]:
            sections.append(section(title, shown))
    pinned = [f"summary:{best(metric)}" for metric in benchmark.metrics]
    order = ws.Ordering(ws.Summary(best(first)), ascending=not benchmark.metrics[first])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"mtl: {benchmark.name}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="epoch"),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("JobType") == "train", ws.Metric("Group").isin([g.any.info["group"] for g in groups])],
            groupby=[ws.Metric("Group")],
            order=[order],
            pinned_columns=["run:displayName", *pinned, "config:loss", "config:arch", "config:lr"],
        ),
    )
