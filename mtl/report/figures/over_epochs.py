"""Figures over the epochs: learning curves, task weights, agreement of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mtl.report.figures.data import LARGEST, Figure, Panel, Trace, arrow, axis, figure, title
from mtl.report.overall import MANY, kinds
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import Run

Curves = Mapping[str, NDArray]  # of one run

POINTS = 200  # of a curve at most: a panel has no room for more, and the published protocols have no more epochs
OWNED, LATE, FEW = 5.0, 0.75, 4  # a scale may be five times as long as the scale of the last quarter of the epochs
MICRO = "micro/tasks/cosine"
GRADIENTS = {
    "grad/cosine": ("direction", "cosine of two tasks' gradients"),
    "grad/magnitude": ("length", "magnitude similarity"),
    "grad/conflict": ("conflict", "share with a negative cosine"),
}


def learning_curves(benchmark: Protocol) -> Figure:
    """Every test metric over epochs; of many tasks their mean and the worst of them."""
    panels = []
    if len(benchmark.tasks) > MANY:
        return _learning_curves_of_many(benchmark)
    for metric, higher in benchmark.metrics.items():
        traces = _traces(benchmark, lambda curves, key=f"test/{metric}": curves.get(key))
        panels.append(Panel(f"{title(metric)} {arrow(higher)}".strip(), "epoch", axis(metric), traces))
    return _figure(benchmark, "learning-curves", "Learning curves", "Test metrics after each epoch.", panels)


def _learning_curves_of_many(benchmark: Protocol) -> Figure:
    """One panel for the mean of each kind of metric, and one for its worst task."""
    panels = []
    for name, kind in kinds(benchmark).items():
        keys = [f"test/{metric}" for metric in kind.metrics]

        def every(curves: Curves, keys: Sequence[str] = keys) -> NDArray | None:
            """(K, E) of a run that has all of them."""
            return np.array([curves[k] for k in keys]) if all(k in curves for k in keys) else None

        def average(curves: Curves, every: Callable = every) -> NDArray | None:
            with np.errstate(over="ignore", invalid="ignore"):
                return None if (found := every(curves)) is None else found.mean(0)

        def worst(curves: Curves, every: Callable = every, higher: bool | None = kind.higher) -> NDArray | None:
            return None if (found := every(curves)) is None else found.min(0) if higher else found.max(0)

        unit = axis(kind.metrics[0]).replace(title(kind.metrics[0]), kind.word)
        panels.append(Panel(f"{title(name)} {arrow(kind.higher)}", "epoch", unit, _traces(benchmark, average)))
        if len(keys) > 1:
            panels.append(Panel(f"worst task {arrow(kind.higher)}", "epoch", unit, _traces(benchmark, worst)))
    note = f"Test metrics after each epoch: the mean of the {len(benchmark.tasks)} tasks, and the worst of them."
    return _figure(benchmark, "learning-curves", "Learning curves", note, panels)


def weights(benchmark: Protocol) -> Figure:
    """How the strategies share out weight over the epochs, and how much of it."""
    tasks = list(dict.fromkeys(k.removeprefix("weights/") for g in _groups(benchmark) for k in _keys(g, "weights/")))

    def total(curves: Curves) -> NDArray | None:
        every = [np.abs(v) for k, v in curves.items() if k.startswith("weights/")]
        with np.errstate(over="ignore", invalid="ignore"):
            return np.sum(every, axis=0) if every else None

    def share(task: str) -> Callable[[Curves], NDArray | None]:
        def value(curves: Curves) -> NDArray | None:
            weight, every = curves.get(f"weights/{task}"), total(curves)
            with np.errstate(over="ignore", invalid="ignore"):
                return None if weight is None else weight / np.where(every > 0, every, np.nan)

        return value

    def extreme(pick: Callable) -> Callable[[Curves], NDArray | None]:
        def value(curves: Curves) -> NDArray | None:
            each = [x for t in tasks if (x := share(t)(curves)) is not None]
            with np.errstate(invalid="ignore"):
                return pick(np.array(each), axis=0) if each else None

        return value

    # With two tasks the second share is one minus the first.
    shown = tasks[:1] if len(tasks) == 2 else tasks if len(tasks) > 1 else []
    panels = [Panel(f"share of {t}", "epoch", f"w({t}) / Σ|w|", _traces(benchmark, share(t))) for t in shown]
    if len(tasks) > MANY:
        ends = (("largest", np.max), ("smallest", np.min))
        panels = [Panel(f"{n} share of a task", "epoch", "w / Σ|w|", _traces(benchmark, extreme(f))) for n, f in ends]
    sums = _traces(benchmark, total)
    values = [y for t in sums for y in t.y]
    log = "y" if values and min(values) > 0 and max(values) > 20 * min(values) else ""
    panels.append(Panel("sum of all weights", "epoch", "Σ|w|", sums, log=log))
    note = "Task weights, mean over an epoch's steps: each task's share, and their sum, which scales the step."
    if len(tasks) == 2:
        note += f" The share of {tasks[1]} is what remains of 1."
    return _figure(benchmark, "weights", "Task weights", note, panels)


def gradients(benchmark: Protocol) -> Figure:
    """Agreement of the task gradients over epochs, as a gradient method or the microscope saw them."""
    panels = []
    for key, (name, label) in GRADIENTS.items():
        seen = key.replace("grad/", "micro/tasks/") + "/all"
        value = lambda curves, key=key, seen=seen: curves.get(key, curves.get(seen))  # noqa: E731
        panels.append(Panel(name, "epoch", label, _traces(benchmark, value)))
    note = "Gradients of the tasks on the shared parameters, mean over an epoch's steps and over pairs of tasks."
    absent = [g.label for g in benchmark.groups if not (_keys(g, "grad/cosine") or _keys(g, f"{MICRO}/all"))]
    if absent:
        note += f" {len(absent)} of {len(benchmark.groups)} strategies do not compute them and are not shown"
        note += " (microscope.every=50 would)."
    return _figure(benchmark, "gradients", "Gradient agreement", note, panels)


def layers(benchmark: Protocol) -> Figure:
    """Cosine of the task gradients in every layer group, as the microscope saw them."""
    keys = dict.fromkeys(k for g in _groups(benchmark) for k in _keys(g, f"{MICRO}/") if not k.endswith("/all"))
    label = GRADIENTS["grad/cosine"][1]
    panels = [
        Panel(key.rpartition("/")[2], "epoch", label, _traces(benchmark, lambda curves, key=key: curves.get(key)))
        for key in keys
    ]
    note = "Gradients of the tasks on the parameters of each layer group, at the steps that the microscope observed."
    return _figure(benchmark, "layers", "Gradient agreement by layers", note, panels)


def _traces(benchmark: Protocol, value: Callable[[Curves], NDArray | None]) -> list[Trace]:
    """`value` (E,) of every run over epochs: its mean over the seeds that have it somewhere."""
    traces = []
    for group in _groups(benchmark):
        traces += [t for r in group.open if (t := _unfinished(group, r, value(r.curves))) is not None]
        found = [(run, value(run.curves)) for run in group.runs]
        found = [(run, v) for run, v in found if v is not None and _drawable(v).any()]
        if not found:
            continue
        runs, each = zip(*found, strict=True)
        values = np.array(list(zip(*each, strict=False)))  # (E, S): the epochs that all have
        epochs = np.flatnonzero(_drawable(values).all(1))
        step = -(-len(epochs) // POINTS) or 1
        epochs = epochs[(len(epochs) - 1) % step :: step]  # the last one is among them
        if len(epochs):
            values, several = values[epochs], len(each) > 1
            low, high = (values.min(1).tolist(), values.max(1).tolist()) if several else ((), ())
            names = [f"seed {r.seed}" for r in runs] if several else []
            x, mean = (epochs + 1).tolist(), values.mean(1).tolist()
            traces.append(Trace(group.label, x, mean, low, high, names, values if several else ()))
    return traces


def _unfinished(group: Group, run: Run, values: NDArray | None) -> Trace | None:
    """The epochs so far of a run that has not finished."""
    epochs = np.flatnonzero(_drawable(values)) if values is not None else []
    if values is None or not len(epochs):
        return None
    step = -(-len(epochs) // POINTS)
    epochs = epochs[(len(epochs) - 1) % step :: step]
    come = f"{len(values)} of {run.config['trainer']['epochs']} epochs"
    name = f"seed {run.seed}, {run.status} after"
    return Trace(
        group.label, (epochs + 1).tolist(), values[epochs].tolist(), names=[name], values=[[come]] * len(epochs),
        unfinished=True,
    )  # fmt: skip


def _limits(panel: Panel) -> Panel:
    """A scale that leaves the first epochs out, if they would make it more than OWNED times as long.

    As many of the others are shown as that length allows.
    """
    ended = [t for t in panel.traces if not t.unfinished] or panel.traces
    points = [(x, y) for t in ended for ys in (t.y, t.low, t.high) for x, y in zip(t.x, ys, strict=False)]
    epochs = sorted({x for x, _ in points})

    def ends(start: float) -> tuple[float, float]:
        shown = [y for x, y in points if x >= start]
        return min(shown), max(shown)

    late = ends(epochs[int(LATE * len(epochs))])
    longest = OWNED * max(late[1] - late[0], 1e-3 * max(map(abs, late)))
    low, high = next((low, high) for low, high in map(ends, epochs) if high - low <= longest)
    if panel.log or len(epochs) < FEW or (low, high) == ends(epochs[0]):
        return panel
    for y in (t.y[-1] for t in panel.traces):  # where an unfinished run stands, unless that is far off
        if max(high, y) - min(low, y) <= 2 * longest:
            low, high = min(low, y), max(high, y)
    room = 0.05 * ((high - low) or abs(high) or 1.0)
    return replace(panel, limits=(low - room, high + room))


def _drawable(values: NDArray) -> NDArray:
    """Whether each value can be drawn; NaN cannot."""
    return np.abs(values) < LARGEST


def _figure(benchmark: Protocol, name: str, heading: str, note: str, panels: Sequence[Panel]) -> Figure:
    panels = [_limits(p) for p in panels if p.traces]
    if cut := [p.title or p.y for p in panels if p.limits]:
        note += f" The scale leaves out values of the first epochs: {', '.join(cut[:6])}."
    unfinished = [f"{g.label} (seed {r.seed})" for g in _groups(benchmark) for r in g.open]
    if unfinished:
        more = f" and {len(unfinished) - 6} more" if len(unfinished) > 6 else ""
        note += f" Thin lines with a ring at their end have not finished: {', '.join(unfinished[:6])}{more}."
    if any(len(values) > POINTS for g in benchmark.groups for values in g.runs[0].curves.values()):
        note += f" Of curves longer than {POINTS} epochs, every second (third, …) point is drawn, the last one always."
    return figure(benchmark, name, heading, note, panels, curves=True)


def _groups(benchmark: Protocol) -> list[Group]:
    """All groups that have a curve."""
    return [*benchmark.groups, *(g for g in benchmark.lost if g.open)]


def _keys(group: Group, prefix: str) -> list[str]:
    return [k for k in (group.runs or group.open)[0].curves if k.startswith(prefix)]
