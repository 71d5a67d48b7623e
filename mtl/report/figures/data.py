"""Figures as plain data: panels of traces, drawn by `figures` on paper and by `page` on the screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtl.report.protocols import Protocol
from mtl.report.runs import SELECTIONS

LARGEST = 1e100  # the largest value that is drawn; beyond it, the margins of the axes are infinite


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
        unfinished: of a run that has not finished; its last point is marked.
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
    unfinished: bool = False


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
        limits: (low, high) of y, where the axis does not show all values.
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
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Figure:
    """Panels with one caption. `name` is the file's; `curves`: named at the ends of the lines, else in a legend."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    curves: bool = False


def figure(
    benchmark: Protocol, name: str, heading: str, note: str, panels: Sequence[Panel], curves: bool = False,
    at: bool = False,
) -> Figure:  # fmt: skip
    """`panels` that show anything, and a caption that explains lines and bands.

    Args:
        at: the epoch that the values belong to, in words.
    """
    if at:
        rule = SELECTIONS[benchmark.main]
        note += f" At the {'epoch ' if rule.startswith('chosen') else ''}{rule}."
    seeds = sorted({len(g.runs) for g in benchmark.groups})
    if seeds and not several(benchmark):
        note += " One seed each."
    elif any(len(t.low) for p in panels for t in p.traces):
        count = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        note += f" Lines: mean over {count}; bands: from the lowest to the highest seed."
    if failed := [g.label for g in benchmark.groups if g.failures]:
        note += f" Without the seeds in which they failed or diverged: {', '.join(failed)}."
    broken = [
        f"{g.label} (seed {r.seed})"
        for g in benchmark.groups
        for r in g.runs
        if not all(drawable(r.value(m)) for m in r.metrics)
    ]
    if broken:
        note += f" Without the values that are not finite: {', '.join(broken[:6])}"
        note += f" and {len(broken) - 6} more." if len(broken) > 6 else "."
    return Figure(name, heading, note, [p for p in panels if p.traces], curves)


def drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) < LARGEST


def several(benchmark: Protocol) -> bool:
    return any(len(g.runs) > 1 for g in benchmark.groups)


def title(metric: str) -> str:
    """A metric's name for people: "fine accuracy"."""
    return metric.replace("_", " ")


def axis(metric: str) -> str:
    """The same with its unit."""
    return title(metric) + (" (%)" if metric.endswith("_accuracy") else "")


def arrow(higher: bool | None) -> str:
    """Which way is better; nothing before a run has finished."""
    return {True: "↑", False: "↓", None: ""}[higher]
