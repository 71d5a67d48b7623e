"""What the figures show, as plain data: `figures` puts it on paper, `page` on the screen.

A run's figures are those of `Benchmark.main`, at one epoch, so that they belong to one and the same network.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mtl.config.identity import identify
from mtl.metrics.multitask import pareto_optimal
from mtl.study.compare import Benchmark, Group
from mtl.study.runs import SELECTIONS, Run
from mtl.study.scores import Scores
from mtl.study.style import COLOURS, Style, palette

Row = dict[str, float]

PANELS = 5  # tasks against each other: so many at most, ten panels

MICRO = "micro/tasks/cosine"
GRADIENTS = {
    "grad/cosine": ("direction", "cosine of two tasks' gradients"),
    "grad/magnitude": ("length", "magnitude similarity"),
    "grad/conflict": ("conflict", "share with a negative cosine"),
}


@dataclass(frozen=True)
class Trace:
    """One line, or one set of points, of a strategy.

    Attributes:
        label: of its Group.
        x, y: (K,) the mean over seeds, or what a single run has.
        low, high: (K,) lowest and highest seed; empty with one seed.
        names: (S,) what `values` are: "seed 0", …
        values: (K, S) the numbers behind y.
        line: points are joined.
        marked: points are drawn: "", "large" or "small".
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    names: Sequence[str] = ()
    values: Sequence[Sequence[float]] = ()
    line: bool = True
    marked: str = ""


@dataclass(frozen=True)
class Rule:
    """A straight line across a panel: at this x (`vertical`) or y, with its name."""

    value: float
    name: str
    vertical: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: may be empty.
        x, y: the axes' names with units.
        traces: drawn in this order; grey ones below the others, whatever the order.
        front: (K,) points of a line in grey, or empty.
        ticks: names at x = 0, 1, … instead of numbers.
        ends: (low, high) at the lower and upper end of each tick's own scale, for parallel coordinates.
        log: "x", "y", "xy" or "".
    """

    title: str
    x: str
    y: str
    traces: Sequence[Trace]
    rules: Sequence[Rule] = ()
    front: Sequence[tuple[float, float]] = ()
    ticks: Sequence[str] = ()
    ends: Sequence[tuple[float, float]] = ()
    log: str = ""


@dataclass(frozen=True)
class Figure:
    """Panels with one caption. `name` is the file's; `curves`: named at the ends of the lines, else in a legend."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel] = field(default_factory=list)
    curves: bool = False


def figures(benchmark: Benchmark) -> dict[str, list[Figure]]:
    """{arch: every figure for which there are data}."""
    makers = (learning_curves, weights, gradients, layers, parallel_coordinates, pareto, cost, learning_rates)
    archs = dict.fromkeys(g.arch for g in benchmark.groups)
    return {arch: [f for make in makers if (f := make(on(benchmark, arch))).panels] for arch in archs}


def on(benchmark: Benchmark, arch: str) -> Benchmark:
    """The benchmark on one architecture. The functions below take such a one."""
    baselines = [b for b in benchmark.baselines if b.arch == arch]
    return replace(benchmark, groups=benchmark.of(arch), baselines=baselines, lost=[])


def styles(benchmark: Benchmark) -> dict[str, Style]:
    """The look of every strategy, best first (by its mean rank over architectures)."""
    places: dict[str, list[float]] = {}
    for arch in dict.fromkeys(g.arch for g in benchmark.groups):
        for place, group in enumerate(ranked(on(benchmark, arch))):
            places.setdefault(group.label, []).append(place)
    return palette(sorted(places, key=lambda k: statistics.fmean(places[k])), reference(benchmark))


def reference(benchmark: Benchmark) -> str | None:
    """The label of equal weighting; of several, the one with the optimizer that most strategies have."""
    optimizers = [g.optimizer for g in benchmark.groups]
    equal = [g for g in benchmark.groups if g.name == "equal"]
    return max(equal, key=lambda g: (optimizers.count(g.optimizer), -len(g.label))).label if equal else None


def colour_note(benchmark: Benchmark) -> str:
    """Which strategies are in colour, where not all are; empty otherwise."""
    looks = styles(benchmark)
    if all(look.prominent for look in looks.values()):
        return ""
    best = f"{len(COLOURS)} best{' others' if reference(benchmark) else ''} by mean rank over the metrics"
    return f"In colour: {'equal weighting (black) and ' if reference(benchmark) else ''}the {best}."


def ranked(benchmark: Benchmark) -> list[Group]:
    """The groups by mean rank over all metrics, as in the tables; those that failed or lack seeds last."""
    return Scores(benchmark, benchmark.archs[0]).groups


def learning_curves(benchmark: Benchmark) -> Figure:
    """Every test metric over epochs."""
    panels = []
    for metric, higher in benchmark.metrics.items():
        traces = _curves(benchmark, lambda row, key=f"test/{metric}": row.get(key))
        panels.append(Panel(f"{title(metric)} {_arrow(higher)}", "epoch", axis(metric), traces))
    note = "Test metrics after each epoch."
    return _figure(benchmark, "learning-curves", "Learning curves", note, panels, curves=True)


def weights(benchmark: Benchmark) -> Figure:
    """How the strategies share out weight over the epochs, and how much of it."""
    tasks = list(dict.fromkeys(k.removeprefix("weights/") for g in benchmark.groups for k in _keys(g, "weights/")))

    def share(task: str) -> Callable[[dict], float | None]:
        def value(row: dict) -> float | None:
            every = [row[f"weights/{t}"] for t in tasks if f"weights/{t}" in row]
            total = sum(map(abs, every))
            return row[f"weights/{task}"] / total if f"weights/{task}" in row and total > 0 else None

        return value

    def total(row: dict) -> float | None:
        every = [row[f"weights/{t}"] for t in tasks if f"weights/{t}" in row]
        return sum(map(abs, every)) if every else None

    # With two tasks the second share is one minus the first.
    shown = tasks[:1] if len(tasks) == 2 else tasks if len(tasks) > 1 else []
    panels = [Panel(f"share of {t}", "epoch", f"w({t}) / Σ|w|", _curves(benchmark, share(t))) for t in shown]
    sums = _curves(benchmark, total)
    values = [y for t in sums for y in t.y]
    log = "y" if values and min(values) > 0 and max(values) > 20 * min(values) else ""
    panels.append(Panel("sum of all weights", "epoch", "Σ|w|", sums, log=log))
    note = "Task weights, mean over an epoch's steps: each task's share, and their sum, which scales the step."
    if len(tasks) == 2:
        note += f" The share of {tasks[1]} is what remains of 1."
    return _figure(benchmark, "weights", "Task weights", note, panels, curves=True)


def gradients(benchmark: Benchmark) -> Figure:
    """Agreement of the task gradients over epochs, as a gradient method or the microscope saw them."""
    panels = []
    for key, (name, label) in GRADIENTS.items():
        seen = key.replace("grad/", "micro/tasks/") + "/all"
        value = lambda row, key=key, seen=seen: row.get(key, row.get(seen))  # noqa: E731
        panels.append(Panel(name, "epoch", label, _curves(benchmark, value)))
    note = "Gradients of the tasks on the shared parameters, mean over an epoch's steps and over pairs of tasks."
    absent = [g.label for g in benchmark.groups if not (_keys(g, "grad/cosine") or _keys(g, f"{MICRO}/all"))]
    if absent:
        note += f" {len(absent)} of {len(benchmark.groups)} strategies do not compute them and are not shown"
        note += " (microscope.every=50 would)."
    return _figure(benchmark, "gradients", "Gradient agreement", note, panels, curves=True)


def layers(benchmark: Benchmark) -> Figure:
    """Cosine of the task gradients in every layer group, as the microscope saw them."""
    keys = dict.fromkeys(k for g in benchmark.groups for k in _keys(g, f"{MICRO}/") if not k.endswith("/all"))
    panels = [
        Panel(key.rpartition("/")[2], "epoch", GRADIENTS["grad/cosine"][1],
              _curves(benchmark, lambda row, key=key: row.get(key)))
        for key in keys
    ]  # fmt: skip
    note = "Gradients of the tasks on the parameters of each layer group, at the steps that the microscope observed."
    return _figure(benchmark, "layers", "Gradient agreement by layers", note, panels, curves=True)


def parallel_coordinates(benchmark: Benchmark) -> Figure:
    """Every strategy as a line across the metrics, each on its own scale with the better end up."""
    columns = {metric: (higher, {g.label: final(benchmark, g, metric) for g in benchmark.groups})
               for metric, higher in benchmark.metrics.items()}  # fmt: skip
    changes = delta_m(benchmark)
    if changes:
        columns["Δm"] = (True, changes)
    columns = {k: v for k, v in columns.items() if sum(x is not None for x in v[1].values()) > 1}
    if len(columns) < 2:
        columns = {}
    ends = []
    for higher, values in columns.values():
        known = [v for v in values.values() if v is not None]
        ends.append((min(known), max(known)) if higher else (max(known), min(known)))
    traces = []
    for group in benchmark.groups:
        points = []
        for i, ((_, values), (low, high)) in enumerate(zip(columns.values(), ends, strict=True)):
            value = values.get(group.label)
            if value is not None:
                points.append((i, (value - low) / (high - low) if high != low else 0.5, value))
        if points:
            x, y, values = zip(*points, strict=True)
            traces.append(Trace(group.label, x, y, names=["mean"], values=[[v] for v in values], marked="large"))
    names = [f"{title(k)} (%)" if k == "Δm" else axis(k) for k in columns]
    panel = Panel("", "", "worst to best strategy", traces, ticks=names, ends=ends)
    note = "Means over seeds, every axis from the worst to the best strategy; the better end is up."
    return _figure(benchmark, "parallel-coordinates", "All metrics", note, [panel], curves=True, at=True)


def pareto(benchmark: Benchmark) -> Figure:
    """The tasks' main metrics against each other."""
    mains = [m for m in benchmark.tasks.values() if m in benchmark.metrics]
    panels = []
    for i, second in enumerate(mains[:PANELS]):
        for first in mains[:i]:
            panels.append(_against(benchmark, first, second))
    note = "Every run (small), the mean over seeds (large)" if _several(benchmark) else "Every run"
    front = any(len(p.front) > 1 for p in panels)
    note += ", and the border of what the best of them dominate (line)." if front else "."
    if benchmark.baselines:
        note += " Dotted: the single-task baselines."
    if len(mains) > PANELS:
        note += f" The first {PANELS} of {len(mains)} tasks."
    return _figure(benchmark, "pareto", "Task against task", note, panels, at=True)


def cost(benchmark: Benchmark) -> Figure:
    """The first metric against the time of a step."""
    metric = next(iter(benchmark.metrics))
    traces = []
    for group in benchmark.groups:
        runs = [r for r in group.runs if step_time(r) is not None and math.isfinite(r.figure(metric, benchmark.main))]
        traces += _scatter(group, [step_time(r) for r in runs], [r.figure(metric, benchmark.main) for r in runs], runs)
    times = [x for t in traces for x in t.x]
    log = "x" if times and max(times) > 8 * min(times) else ""
    hardware = [r.info.get("hardware", {}) for g in benchmark.groups for r in g.runs]
    machines = {(of.get("gpu") or of.get("cpu"), of.get("threads")) for of in hardware}
    note = "Time of a training step as the runs met it, at their batch size; on a busy machine it says little."
    if len(machines) > 1:
        note += " The runs come from different machines: the times do not compare."
    panel = Panel("", "ms a training step", axis(metric), traces, log=log)
    return _figure(benchmark, "cost", "Accuracy and cost", note, [panel], at=True)


def learning_rates(benchmark: Benchmark) -> Figure:
    """The first metric against the learning rate, for what was run at several."""
    metric = next(iter(benchmark.metrics))
    families: dict[str, dict[float, Group]] = {}
    for group in benchmark.groups:
        rate = group.runs[0].config.get("optimizer", {}).get("lr")
        if rate:
            families.setdefault(_without_rate(group.runs[0]), {})[rate] = group
    traces = []
    for family in families.values():
        known = {r: g for r, g in sorted(family.items()) if final(benchmark, g, metric) is not None}
        if len(known) > 1:
            each = [[v for r in g.runs if math.isfinite(v := r.figure(metric, benchmark.main))] for g in known.values()]
            means = [statistics.fmean(v) for v in each]
            best = means.index(max(means) if benchmark.metrics[metric] else min(means))
            label = list(known.values())[best].label
            traces.append(line(label, list(known), each))
    panel = Panel("", "learning rate", axis(metric), traces, log="x")
    note = "What was run at several learning rates; a line bears the name of its best rate."
    return _figure(benchmark, "learning-rates", "Sensitivity to the learning rate", note, [panel], curves=True, at=True)


def delta_m(benchmark: Benchmark) -> dict[str, float]:
    """{label: Δm in %, mean over seeds} where there are baselines."""
    scores = Scores(benchmark, benchmark.archs[0])
    found = {g.label: scores.delta_m(g, benchmark.main).values() for g in benchmark.groups}
    return {label: statistics.fmean(values) for label, values in found.items() if values}


def final(benchmark: Benchmark, group: Group, metric: str) -> float | None:
    """Mean over seeds of a metric at `Benchmark.main`; None without a finite one."""
    values = [v for r in group.runs if math.isfinite(v := r.figure(metric, benchmark.main))]
    return statistics.fmean(values) if values else None


def step_time(run: Run) -> float | None:
    """Milliseconds a training step."""
    rate, batch = run.summary.get("images_per_second"), run.config.get("data", {}).get("batch_size")
    return 1000 * batch / rate if rate and batch else None


def title(metric: str) -> str:
    """A metric's name for people: "fine accuracy"."""
    return metric.replace("_", " ")


def axis(metric: str) -> str:
    """The same with its unit."""
    return title(metric) + (" (%)" if metric.endswith("_accuracy") else "")


def _against(benchmark: Benchmark, first: str, second: str) -> Panel:
    """Two metrics of every run, and the front of the strategies' means."""
    traces, means = [], []
    for group in benchmark.groups:
        pairs = [(r.figure(first, benchmark.main), r.figure(second, benchmark.main)) for r in group.runs]
        known = [(r, *p) for r, p in zip(group.runs, pairs, strict=True) if all(map(math.isfinite, p))]
        if known:
            runs, x, y = zip(*known, strict=True)
            traces += _scatter(group, x, y, runs)
            means.append((statistics.fmean(x), statistics.fmean(y)))
    rules = []
    for vertical, metric in ((True, first), (False, second)):
        for baseline in benchmark.baselines:
            if benchmark.tasks.get(baseline.task) == metric:
                value = final(benchmark, baseline, metric)
                if value is not None:
                    several = [b.task for b in benchmark.baselines].count(baseline.task) > 1
                    rules.append(Rule(value, baseline.label if several else f"{baseline.task} alone", vertical))
    front = pareto_front(means, benchmark.metrics[first], benchmark.metrics[second])
    return Panel("", axis(first), axis(second), traces, rules, _steps(front, benchmark.metrics[first]))


def _steps(front: Sequence[tuple[float, float]], up: bool) -> list[tuple[float, float]]:
    """The border of what the front dominates: its points, and the corners between them."""
    corners = [(p[0], q[1]) if up else (q[0], p[1]) for p, q in itertools.pairwise(front)]
    return [point for pair in zip(front, [*corners, None], strict=True) for point in pair if point is not None]


def pareto_front(points: Sequence[tuple[float, float]], *higher: bool) -> list[tuple[float, float]]:
    """The points that no other dominates, by their first coordinate; `higher`: whether more is better, for each."""
    kept = pareto_optimal(points, higher) if points else []
    return sorted({p for p, keep in zip(points, kept, strict=True) if keep})


def _scatter(group: Group, x: Sequence[float], y: Sequence[float], runs: Sequence[Run]) -> list[Trace]:
    """The mean of some runs, and the runs themselves where there are several."""
    if not runs:
        return []
    each = [[f"seed {r.seed}"] for r in runs]
    if len(runs) == 1:
        return [Trace(group.label, x, y, names=["run"], values=each, line=False, marked="large")]
    mean = Trace(
        group.label, [statistics.fmean(x)], [statistics.fmean(y)], names=["mean of"],
        values=[[f"{len(runs)} seeds"]], line=False, marked="large",
    )  # fmt: skip
    return [Trace(group.label, x, y, names=["run"], values=each, line=False, marked="small"), mean]


def _curves(benchmark: Benchmark, value: Callable[[Row], float | None]) -> list[Trace]:
    """`value` of every row over epochs, for the groups whose runs all have it somewhere."""
    traces = []
    for group in benchmark.groups:
        each = []
        for run in group.runs:
            points = {r["epoch"]: v for r in run.rows if (v := value(r)) is not None and math.isfinite(v)}
            each.append(points)
        epochs = sorted(set.intersection(*map(set, each)))
        if epochs:
            traces.append(line(group.label, epochs, [[p[e] for p in each] for e in epochs], group.runs))
    return traces


def line(label: str, x: Sequence[float], each: Sequence[Sequence[float]], runs: Sequence[Run] = ()) -> Trace:
    """The mean of the values at every x, and their range; `runs`: whose values, where the same all along."""
    low, high = ([min(v) for v in each], [max(v) for v in each]) if max(map(len, each)) > 1 else ((), ())
    names = [f"seed {r.seed}" for r in runs] if len(runs) > 1 else []
    marked = "" if runs else "large"
    return Trace(label, x, [statistics.fmean(v) for v in each], low, high, names, each if names else (), marked=marked)


def _figure(
    benchmark: Benchmark, name: str, heading: str, note: str, panels: Sequence[Panel], curves: bool = False,
    at: bool = False,
) -> Figure:  # fmt: skip
    """`panels` that show anything, and a caption that says what lines and bands mean.

    Args:
        at: the values are those of one epoch, which is named.
    """
    if at:
        note += f" At the {'epoch ' if benchmark.main == 'selected' else ''}{SELECTIONS[benchmark.main]}."
    seeds = sorted({len(g.runs) for g in benchmark.groups})
    if not _several(benchmark):
        note += " One seed each."
    elif any(t.low for p in panels for t in p.traces):
        count = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        note += f" Lines: mean over {count}; bands: from the lowest to the highest seed."
    if failed := [g.label for g in benchmark.groups if g.failures]:
        note += f" Without the seeds in which they failed or diverged: {', '.join(failed)}."
    return Figure(name, heading, note, [p for p in panels if p.traces], curves)


def _several(benchmark: Benchmark) -> bool:
    return any(len(g.runs) > 1 for g in benchmark.groups)


def _keys(group: Group, prefix: str) -> list[str]:
    return [k for k in (group.runs[0].rows or [{}])[-1] if k.startswith(prefix)]


def _arrow(higher: bool) -> str:
    return "↑" if higher else "↓"


def _without_rate(run: Run) -> str:
    """What a run shares with those that differ from it in the learning rate and seed alone."""
    optimizer = {k: v for k, v in run.config["optimizer"].items() if k != "lr"}
    return identify({**run.config, "optimizer": optimizer}, run.info).digest
