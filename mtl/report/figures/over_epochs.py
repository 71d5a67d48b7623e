"""Figures of what runs did over their epochs: learning curves, task weights, agreement of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mtl.report.figures.data import LARGEST, Figure, Panel, Trace, arrow, axis, figure, title
from mtl.report.protocols import Group, Protocol

Curves = Mapping[str, NDArray]  # of one run

POINTS = 200  # of a curve at most: a panel has no room for more, and the published protocols have no more epochs
MICRO = "micro/tasks/cosine"
GRADIENTS = {
    "grad/cosine": ("direction", "cosine of two tasks' gradients"),
    "grad/magnitude": ("length", "magnitude similarity"),
    "grad/conflict": ("conflict", "share with a negative cosine"),
}


def learning_curves(benchmark: Protocol) -> Figure:
    """Every test metric over epochs."""
    panels = []
    for metric, higher in benchmark.metrics.items():
        traces = _traces(benchmark, lambda curves, key=f"test/{metric}": curves.get(key))
        panels.append(Panel(f"{title(metric)} {arrow(higher)}", "epoch", axis(metric), traces))
    return _figure(benchmark, "learning-curves", "Learning curves", "Test metrics after each epoch.", panels)


def weights(benchmark: Protocol) -> Figure:
    """How the strategies share out weight over the epochs, and how much of it."""
    tasks = list(dict.fromkeys(k.removeprefix("weights/") for g in benchmark.groups for k in _keys(g, "weights/")))

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

    # With two tasks the second share is one minus the first.
    shown = tasks[:1] if len(tasks) == 2 else tasks if len(tasks) > 1 else []
    panels = [Panel(f"share of {t}", "epoch", f"w({t}) / Σ|w|", _traces(benchmark, share(t))) for t in shown]
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
    keys = dict.fromkeys(k for g in benchmark.groups for k in _keys(g, f"{MICRO}/") if not k.endswith("/all"))
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
    for group in benchmark.groups:
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


def _drawable(values: NDArray) -> NDArray:
    """Of each value whether it can be drawn; NaN is not below anything."""
    return np.abs(values) < LARGEST


def _figure(benchmark: Protocol, name: str, heading: str, note: str, panels: Sequence[Panel]) -> Figure:
    if any(len(values) > POINTS for g in benchmark.groups for values in g.runs[0].curves.values()):
        note += f" Of curves longer than {POINTS} epochs, every second (third, …) point is drawn, the last one always."
    return figure(benchmark, name, heading, note, panels, curves=True)


def _keys(group: Group, prefix: str) -> list[str]:
    return [k for k in group.runs[0].curves if k.startswith(prefix)]
