"""What Δm and achievement hold a strategy against: own single-task runs, or published constants (`--baseline`).

own: the single-task runs with the strategy's own config except for the loss, paired by seed.

best: of each task the single-task group that is best on validation data, over all optimizers and rates that were tried
on the same architecture. All strategies on it share the means over the seeds, so that Δm of differently tuned runs
refers to the same numbers, as in Elich et al. best-overall takes the best architecture too, for a comparison of
architectures or sharing schemes. Test data choose nothing.

A name of `baselines.csv`: what a paper prints for its single-task networks. A file of one's own: columns metric, value.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from mtl.errors import ConfigError, suggest
from mtl.report.notes import some
from mtl.report.protocols import Common, Group, Protocol, Shared
from mtl.report.runs import SELECTIONS
from mtl.report.scores import Scores
from mtl.report.select import lacking
from mtl.report.statistics import mean
from mtl.tracking import flatten

OWN, BEST, OVERALL = "own", "best", "best-overall"
COLUMNS = ("metric", "value")  # of a file of one's own
LARGEST = 10**6  # bytes of it


@dataclass(frozen=True)
class Constants:
    """The metrics of single-task networks that were not trained here.

    Attributes:
        words: where they come from.
        values: {metric: value}.
        data: the data set that they belong to; empty for a file of one's own.
        protocol: the papers that share them; empty likewise.
        settings: {option: value} of the protocol, where a run's config or the report's command can tell it.
    """

    words: str
    values: Mapping[str, float]
    data: str = ""
    protocol: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)


@cache
def published() -> dict[str, Constants]:
    """{name: constants} of `baselines.csv`."""
    with (Path(__file__).parent / "baselines.csv").open(encoding="utf-8") as file:
        return {
            row["name"]: Constants(
                f"the published constants {row['name']} (protocol of {row['protocol']}; {row['source']})",
                {metric: float(value) for metric, value in _pairs(row["values"]).items()},
                row["data"], row["protocol"],
                {key: yaml.safe_load(value) for key, value in _pairs(row["settings"]).items()},
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def check(name: str) -> None:
    """Raises ConfigError: there is no such baseline, or its file is wrong."""
    if name not in (OWN, BEST, OVERALL):
        _constants(name)


def choose(name: str, benchmarks: Sequence[Protocol], rule: str | None) -> list[str]:
    """Give every benchmark this baseline.

    Args:
        name: one of the above.
        benchmarks: with their `delta_m` set.
        rule: `--select`, which is applied afterwards.

    Returns:
        a line for each benchmark that cannot have it, and keeps its own runs, and for each doubt.

    Raises:
        ConfigError: there is no such baseline, its file is wrong, or no benchmark can have it.
    """
    if name == OWN:
        return []
    constants = None if name in (BEST, OVERALL) else _constants(name)
    refused, doubts = [], []
    for benchmark in benchmarks:
        at = rule if rule and not lacking(rule, benchmark) else benchmark.main
        found = _chosen(name, benchmark, at) if constants is None else _held(constants, benchmark, at)
        if isinstance(found, str):
            refused.append(f"--baseline {name}: not for {benchmark.name}, {found}; own stands there")
            continue
        benchmark.common = found
        doubts += [f"--baseline {name}: {text}" for text in _doubts(found, benchmark)]
    if refused and len(refused) == len(benchmarks):
        raise ConfigError(refused[0].removesuffix("; own stands there"))
    return [*refused, *doubts]


def shared_seeds(groups: Sequence[Group]) -> set[int]:
    """The seeds that all of them were run with; all seeds if they have none in common."""
    each = [{r.seed for r in [*g.runs, *g.failures]} for g in groups]
    return set.intersection(*each) or set.union(*each) if each else set()


def _chosen(name: str, benchmark: Protocol, at: str) -> dict[str, Common] | str:
    """{arch: the best single-task groups}; or why there are none."""
    at = at if at in ("last", "last10") else "selected"  # a single-task run has the epoch that its own metric chose
    found = {}
    for arch in benchmark.archs:
        tasks: dict[str, Shared] = {}
        for task in benchmark.tasks:
            tried = [b for b in benchmark.baselines if b.task == task and (name == OVERALL or b.arch == arch)]
            if best := _best(tried, benchmark, task, at):
                tasks[task] = Shared(best, tried=len(tried))
            elif tried:
                whole = [g for g in tried if not g.failures]
                lacks = "have no validation data (data.val_fraction)" if whole else "failed or diverged in a seed"
                return f"whose single-task runs of {task} {lacks}"
        where = "any architecture" if name == OVERALL else "the same architecture"
        found[arch] = Common(
            f"own single-task runs that all strategies share: of each task those on {where} with the best main metric "
            f"on validation data ({SELECTIONS[at]}), as the mean over their seeds",
            tasks,
        )
    if benchmark.groups and not any(common.tasks for common in found.values()):
        tasks = some(list(benchmark.tasks), 3, ",")
        return f"which has no single-task runs: train them with loss=single loss.task={tasks}"
    return found


def _best(tried: Sequence[Group], benchmark: Protocol, task: str, at: str) -> Group | None:
    """The group with the best mean of the task's main metric on validation data; no group that lost a seed."""
    metric, seeds = benchmark.tasks[task], shared_seeds(tried)
    sign = 1 if benchmark.metrics[metric] else -1
    means = [mean([v for s, v in g.by_seed(metric, at, "val").items() if s in seeds]) for g in tried]
    known = [(sign * m, -i) for i, (g, m) in enumerate(zip(tried, means, strict=True))
             if math.isfinite(m) and not g.failures]  # fmt: skip
    return tried[-max(known)[1]] if known else None


def _held(constants: Constants, benchmark: Protocol, at: str) -> dict[str, Common] | str:
    """{arch: the constants}; or why the benchmark cannot be held against them."""
    found = {}
    for arch in benchmark.archs:
        scores = Scores(benchmark, arch)
        data = next((g.any.info["data"] for g in [*scores.groups, *scores.baselines, *scores.lost]), "")
        if constants.data not in ("", data):
            return f"which is data={data}: these are numbers of data={constants.data}"
        needed = dict.fromkeys([*scores.mains, *scores.gained]) if scores.groups else {}
        if lacks := [m for m in needed if m not in constants.values]:
            return f"as it lacks {some(lacks)}, which Δm or achievement takes here"
        if zero := [m for m in needed if constants.values[m] == 0]:
            return f"as its {zero[0]} is 0: no gain is relative to it"
        tasks = dict.fromkeys(benchmark.tasks, Shared(constants=constants.values))
        found[arch] = Common(constants.words, tasks, _warning(constants, scores, at))
    return found


def _warning(constants: Constants, scores: Scores, at: str) -> str:
    """How the strategies' protocol differs from that of the constants."""
    if not scores.groups or not constants.protocol:
        return ""
    run = scores.groups[0].any
    ours = {**flatten(run.config), "arch": run.info["arch"], "--select": at, "--delta-m": scores.benchmark.delta_m}
    differs = [f"{k} {ours.get(k)} instead of {v}" for k, v in constants.settings.items() if ours.get(k) != v]
    if not differs:
        return ""
    return (
        f"Not comparable: {', '.join(differs)}. Numbers of different protocols must not be mixed, so this Δm is no "
        f"figure of the protocol of {constants.protocol}."
    )


def _doubts(found: Mapping[str, Common], benchmark: Protocol) -> list[str]:
    """What a reader must know before the tables."""
    lines = []
    for arch in dict.fromkeys(g.arch for g in benchmark.groups):
        place = f"{benchmark.name} on {arch}"
        if lacks := [t for t in benchmark.tasks if t not in found[arch].tasks]:
            lines.append(f"{place} has no single-task runs of {some(lacks)}, so no Δm")
        if found[arch].warning:
            lines.append(f"{place}: {found[arch].warning}")
    return lines


def _constants(name: str) -> Constants:
    """The constants with this name. Raises ConfigError."""
    if name in published():
        return published()[name]
    if name.endswith(".csv") or Path(name).is_file():
        return Constants(f"the constants of {name}", _file(Path(name)))
    known = (OWN, BEST, OVERALL, *published())
    raise ConfigError(
        f"--baseline {name}: one of {', '.join(known)}, or a CSV file with the columns metric and value"
        f"{suggest(name, known)}"
    )


def _file(path: Path) -> dict[str, float]:
    """The values of a file of one's own. Raises ConfigError."""
    try:
        if not path.is_file():
            raise ConfigError(f"--baseline {path}: {'is no file' if path.exists() else 'no such file'}")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file.read(LARGEST).splitlines())
        if lacks := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
            raise ConfigError(f"--baseline {path}: the first line lacks the column {lacks[0]}; it needs metric,value")
        values: dict[str, float] = {}
        for row in reader:
            metric, text = (row["metric"] or "").strip(), (row["value"] or "").strip()
            place = f"--baseline {path}: line {reader.line_num}"
            if not metric or metric in values:
                raise ConfigError(f"{place}: {f'{metric} stands there twice' if metric else 'names no metric'}")
            try:
                values[metric] = float(text)
            except ValueError:
                raise ConfigError(f"{place}: {metric} is {text!r:.40}, must be a number") from None
            if not math.isfinite(values[metric]):
                raise ConfigError(f"{place}: {metric} is {text}, must be a finite number")
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "is no CSV file in UTF-8"
        raise ConfigError(f"--baseline {path}: {reason}") from None
    return values


def _pairs(text: str) -> dict[str, str]:
    """{"a": "1", …} of "a=1 …"."""
    return dict(word.split("=", 1) for word in text.split())
