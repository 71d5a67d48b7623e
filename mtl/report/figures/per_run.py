"""Every figure of a benchmark. `over_epochs` draws curves; this module draws one value per run.

A run's values are the metrics of `Protocol.main` at one epoch. So they belong to one and the same network.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from mtl.report.attempt import Failures, attempt
from mtl.report.figures.data import Figure, Panel, Rule, Trace, axis, drawable, figure, several, title
from mtl.report.figures.over_epochs import gradients, layers, learning_curves, weights
from mtl.report.figures.style import Style, palette
from mtl.report.multitask import pareto_optimal
from mtl.report.overall import MANY, kinds
from mtl.report.protocols import Group, Protocol, rateless
from mtl.report.runs import Run, step_time
from mtl.report.scores import Scores
from mtl.report.statistics import mean

PANELS = 5  # tasks against each other: so many at most, ten panels


def figures(benchmark: Protocol, failed: Failures | None = None) -> dict[str, list[Figure]]:
    """{arch: every figure for which there are data}.

    Args:
        failed: gets a line for each figure that cannot be made; None raises its error.
    """
    makers = (learning_curves, weights, gradients, layers, parallel_coordinates, pareto, cost, learning_rates)
    found: dict[str, list[Figure]] = {}
    for arch in dict.fromkeys(g.arch for g in [*benchmark.groups, *benchmark.lost] if g.runs or g.open):
        part, found[arch] = on(benchmark, arch), []
        for make in makers:
            name = f"{make.__name__.replace('_', ' ')} of {benchmark.name}, {arch}"
            made = make(part) if failed is None else attempt(name, lambda make=make, part=part: make(part), failed)
            found[arch] += [made] if made is not None and made.panels else []
    return found


def on(benchmark: Protocol, arch: str) -> Protocol:
    """The benchmark on one architecture. All functions below except `styles` take one."""
    baselines = [b for b in benchmark.baselines if b.arch == arch]
    return replace(benchmark, groups=benchmark.of(arch), baselines=baselines,
                   lost=[g for g in benchmark.lost if g.arch == arch])  # fmt: skip


def styles(benchmark: Protocol) -> dict[str, Style]:
    """The look of every strategy, best first (by its mean rank over architectures)."""
    places: dict[str, list[float]] = {}
    for arch in dict.fromkeys(g.arch for g in benchmark.groups):
        for place, group in enumerate(Scores(benchmark, arch).groups):
            places.setdefault(group.label, []).append(place)
    unfinished = [g.label for g in benchmark.lost if g.open and g.label not in places]
    return palette([*sorted(places, key=lambda k: mean(places[k])), *dict.fromkeys(unfinished)], reference(benchmark))


def reference(benchmark: Protocol) -> str | None:
    """The label of equal weighting; of several, the one with the optimizer that most strategies have."""
    optimizers = [g.optimizer for g in benchmark.groups]
    equal = [g for g in benchmark.groups if g.name == "equal"] or [g for g in benchmark.lost if g.name == "equal"]
    return max(equal, key=lambda g: (optimizers.count(g.optimizer), -len(g.label))).label if equal else None


def parallel_coordinates(benchmark: Protocol) -> Figure:
    """Every strategy as a line across the metrics, each on its own scale with the better end up."""
    shown = benchmark.metrics
    if len(benchmark.tasks) > MANY:
        shown = {name: kind.higher for name, kind in kinds(benchmark).items()}
    columns = {metric: (higher, {g.label: final(benchmark, g, metric) for g in benchmark.groups})
               for metric, higher in shown.items()}  # fmt: skip
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
    return figure(benchmark, "parallel-coordinates", "All metrics", note, [panel], curves=True, at=True)


def pareto(benchmark: Protocol) -> Figure:
    """The tasks' main metrics against each other."""
    mains = [m for m in benchmark.tasks.values() if m in benchmark.metrics]
    panels = []
    for i, second in enumerate(mains[:PANELS]):
        for first in mains[:i]:
            panels.append(_against(benchmark, first, second))
    note = "Every run (small), the mean over seeds (large)" if several(benchmark) else "Every run"
    front = any(len(p.front) > 1 for p in panels)
    note += ", and the border of the region that the best of them dominate (line)." if front else "."
    if benchmark.baselines:
        note += " Dotted: the single-task baselines."
    if len(mains) > PANELS:
        note += f" The first {PANELS} of {len(mains)} tasks."
    return figure(benchmark, "pareto", "Task against task", note, panels, at=True)


def cost(benchmark: Protocol) -> Figure:
    """The first metric, or the mean of many, against the time of a step."""
    metric, traces = _first(benchmark), []
    for group in benchmark.groups:
        known = [(r, time, _values(benchmark, replace(group, runs=[r]), metric))
                 for r in group.runs if drawable(time := step_time(r))]  # fmt: skip
        known = [(r, time, values[0]) for r, time, values in known if values]
        traces += _scatter(group, [t for _, t, _ in known], [y for _, _, y in known], [r for r, _, _ in known])
    times = [x for t in traces for x in t.x]
    log = "x" if times and max(times) > 8 * min(times) else ""
    hardware = [r.info.get("hardware", {}) for g in benchmark.groups for r in g.runs]
    machines = {(of.get("gpu") or of.get("cpu"), of.get("threads")) for of in hardware}
    note = "Time of a training step as the runs met it, at their batch size; on a busy machine it says little."
    if len(machines) > 1:
        note += " The runs come from different machines: the times do not compare."
    panel = Panel("", "ms a training step", axis(metric), traces, log=log)
    return figure(benchmark, "cost", "Accuracy and cost", note, [panel], at=True)


def learning_rates(benchmark: Protocol) -> Figure:
    """The first metric against the learning rate, for strategies that were run at several rates."""
    metric = _first(benchmark)
    families: dict[str, dict[float, Group]] = {}
    for group in benchmark.groups:
        rate = group.runs[0].config["optimizer"].get("lr")
        if isinstance(rate, (int, float)) and rate > 0 and drawable(rate):
            families.setdefault(rateless(group.runs[0]), {})[rate] = group
    traces = []
    for family in families.values():
        known = {r: g for r, g in sorted(family.items()) if final(benchmark, g, metric) is not None}
        if len(known) > 1:
            each = [_values(benchmark, g, metric) for g in known.values()]
            means = [mean(v) for v in each]
            best = means.index(max(means) if _higher(benchmark, metric) else min(means))
            label = list(known.values())[best].label
            low, high = (list(map(pick, each)) if max(map(len, each)) > 1 else () for pick in (min, max))
            traces.append(Trace(label, list(known), means, low, high, marked="large"))
    panel = Panel("", "learning rate", axis(metric), traces, log="x")
    note = "Strategies that were run at several learning rates. A line has the name of its best rate."
    return figure(benchmark, "learning-rates", "Sensitivity to the learning rate", note, [panel], curves=True, at=True)


def delta_m(benchmark: Protocol) -> dict[str, float]:
    """{label: Δm in %, mean over seeds} where there are baselines."""
    if not benchmark.groups:
        return {}
    scores = Scores(benchmark, benchmark.archs[0])
    found = {g.label: scores.delta_m(g, benchmark.main).values() for g in benchmark.groups}
    return {label: mean(values) for label, values in found.items() if values and drawable(mean(values))}


def final(benchmark: Protocol, group: Group, metric: str) -> float | None:
    """Mean over seeds of a metric at `Benchmark.main`; None without a finite one."""
    values = _values(benchmark, group, metric)
    return mean(values) if values else None


def _values(benchmark: Protocol, group: Group, metric: str) -> list[float]:
    """Of the runs that have a finite one; `metric` may be the mean of a kind."""
    metrics = [metric] if metric in benchmark.metrics else kinds(benchmark)[metric].metrics
    return [v for r in group.runs if drawable(v := mean([r.value(m, benchmark.main) for m in metrics]))]


def _higher(benchmark: Protocol, metric: str) -> bool | None:
    return benchmark.metrics[metric] if metric in benchmark.metrics else kinds(benchmark)[metric].higher


def _first(benchmark: Protocol) -> str:
    """The metric that stands for all where there is room for one."""
    return next(iter(kinds(benchmark) if len(benchmark.tasks) > MANY else benchmark.metrics), "")


def _against(benchmark: Protocol, first: str, second: str) -> Panel:
    """Two metrics of every run, and the front of the strategies' means."""
    traces, means = [], []
    for group in benchmark.groups:
        pairs = [(r.value(first, benchmark.main), r.value(second, benchmark.main)) for r in group.runs]
        known = [(r, *p) for r, p in zip(group.runs, pairs, strict=True) if all(map(drawable, p))]
        if known:
            runs, x, y = zip(*known, strict=True)
            traces += _scatter(group, x, y, runs)
            means.append((mean(x), mean(y)))
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
    """The border of the region that the front dominates: its points and corners; empty without a point."""
    if not front:
        return []
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
    middle = Trace(
        group.label, [mean(x)], [mean(y)], names=["mean of"],
        values=[[f"{len(runs)} seeds"]], line=False, marked="large",
    )  # fmt: skip
    return [Trace(group.label, x, y, names=["run"], values=each, line=False, marked="small"), middle]
