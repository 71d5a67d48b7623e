"""The cells of the report's tables: means with their spread, counts and differences, as they are printed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mtl.report.protocols import Group
from mtl.report.runs import Run
from mtl.report.scores import Scores
from mtl.report.statistics import deviation, mean
from mtl.report.tables import NONE, Entry


def count(scores: Scores, group: Group) -> Entry:
    """The number of seeds with a result, and the status of the others."""
    states = Counter(r.status for r in group.stopped)
    text = ", ".join([str(len(group.runs)), *(f"{n} {state}" for state, n in states.items())])
    # Of a baseline, the other tasks' metrics are not broken but not there.
    broken = sum(any(scores.broken(r, at) for at in scores.benchmark.selections) for r in group.runs)
    return Entry(text + (f" ({broken} not finite)" if broken and group in scores.groups else ""), len(group.runs))


def failed(scores: Scores, group: Group, metric: str, at: str) -> str:
    """The missing seeds of a strategy in a metric: "1 of 3 seeds diverged"; empty if nothing."""
    states = Counter(r.status for r in group.failures)
    if broken := len(group.runs) - len(scores.by_seed(group, metric, at)):
        states["not finite"] = broken
    return ", ".join(f"{n} of {len(group.runs) + len(group.failures)} seeds {state}" for state, n in states.items())


def value(run: Run, metric: str) -> str:
    """The last epoch's value, "nan" or "inf"; or the note that it is finite, but another selection's value is not."""
    found = run.value(metric)
    return "not in every selection" if math.isfinite(found) else str(found)


def spreads(
    columns: Sequence[Sequence[float]],
    sizes: Sequence[int],
    fair: Sequence[bool],
    higher: bool,
    digits: int | None = None,
    alone: Sequence[float] = (),
) -> list[Entry]:
    """One column: mean ± standard deviation, the best mean of the fair ones marked.

    Args:
        columns: finite values of each row.
        sizes: how many values each row has elsewhere; a cell of fewer says so.
        alone: what single-task learning reaches, for each row; NaN if it is not known.
    """
    means = [mean(values) for values in columns]
    digits = _digits(means) if digits is None else digits
    ranked = [m for m, f in zip(means, fair, strict=True) if f and math.isfinite(m)]
    top = (max if higher else min)(ranked) if len(ranked) > 1 else None
    alone = alone or [math.nan] * len(columns)
    cells = []
    for values, size, average, f, base in zip(columns, sizes, means, fair, alone, strict=True):
        spread, count = deviation(values), len(values) if len(values) < size else None
        text = fixed(average, digits) + ("" if spread is None else f" ± {fixed(spread, digits)}")
        text += "" if count is None else f" (n={count})"
        beats = f and (average > base if higher else average < base)
        cells.append(Entry(text, average, f and average == top, spread, count, beats) if values else NONE)
    return cells


def decimals(scores: Scores, metric: str) -> int:
    """The same for all selections of a metric."""
    groups = [*scores.groups, *scores.baselines]
    return _digits([v for g in groups for v in scores.by_seed(g, metric, "last").values()])


def _digits(values: Sequence[float]) -> int:
    """Decimals for values of this size."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0)
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def fixed(value: float, digits: int) -> str:
    """With so many decimals; a huge number as a power of ten."""
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3e}"


def signed(value: float, digits: int) -> str:
    """A difference, with its sign."""
    return ("+" if value >= 0 else "") + fixed(value, digits)
