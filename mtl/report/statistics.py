"""Differences between strategies, paired by seed, and whether so few seeds can show them.

Student's t interval of the mean difference is exact for normal differences at any n. The percentile bootstrap (Efron
1979) is not: of samples of 3, 5, 10 and 20 normal numbers, its 95 % interval held the mean for 74, 84, 89 and 92 % of
4,000 samples, because n seeds resampled know no more than n seeds. Hence the verdict rests on t; Colas, Sigaud &
Oudeyer, "How Many Random Seeds? Statistical Power Analysis in Deep Reinforcement Learning Experiments", 2018
(arXiv:1806.08295), find the same. Several comparisons in one table are corrected by Holm's procedure (Scandinavian
Journal of Statistics, 1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import special  # and not scipy.stats, which takes a second to import

LEVEL, RESAMPLES, FEWEST, FEW = 0.95, 10_000, 3, 5
LARGEST = 1e150  # beyond, squares are infinite


@dataclass(frozen=True)
class Difference:
    """A strategy minus the reference, over the seeds that both have.

    Attributes:
        n: seeds.
        mean: of the differences; NaN without a seed.
        student: Student's t interval of the mean, None for n < 2 or without spread.
        bootstrap: percentile interval, None for n < 2.
        p: two-sided, of the paired t test; NaN where there is no interval.
        wins, losses: seeds in which the strategy is better, or worse.
    """

    n: int
    mean: float
    student: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    p: float
    wins: int
    losses: int


def paired(values: Sequence[float], reference: Sequence[float], higher: bool) -> Difference:
    """Compare values of the same seeds.

    Args:
        values, reference: (n,), seed by seed; a pair without a finite difference does not count.
        higher: is better.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.asarray(values, float) - np.asarray(reference, float)
    d = d[np.abs(d) < LARGEST]
    n, average = len(d), float(d.mean()) if len(d) else math.nan
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    if not higher:
        wins, losses = losses, wins
    if n < 2:
        return Difference(n, average, None, None, math.nan, wins, losses)
    low, high = np.quantile(_resamples(n) @ d, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    error = float(d.std(ddof=1)) / math.sqrt(n)
    if error < 1e-12 * max(1.0, abs(average)):  # equal differences, up to rounding: no spread to judge by
        return Difference(n, average, None, (float(low), float(high)), math.nan, wins, losses)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(average) / error))
    return Difference(n, average, (average - half, average + half), (float(low), float(high)), p, wins, losses)


def mean(values: Collection[float]) -> float:
    """Of finite values: NaN of none, infinite where no float holds the sum."""
    try:
        return statistics.fmean(values) if values else math.nan
    except OverflowError:
        return math.inf


def deviation(values: Collection[float]) -> float | None:
    """Sample standard deviation of finite values: None of fewer than two, infinite where no float holds it."""
    try:
        return statistics.stdev(values) if len(values) > 1 else None
    except OverflowError:
        return math.inf


@cache
def _resamples(n: int) -> NDArray:
    """(RESAMPLES, n) the share of each seed in each resample: the same for all comparisons and all reports."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values of one family; NaN stays out of it."""
    adjusted, floor = [math.nan] * len(p), 0.0
    order = sorted((i for i, x in enumerate(p) if not math.isnan(x)), key=lambda i: p[i])
    for place, i in enumerate(order):
        floor = adjusted[i] = min(1.0, max(floor, (len(order) - place) * p[i]))
    return adjusted


def verdict(difference: Difference, adjusted: float, higher: bool) -> str:
    """The difference in plain words; the glossary's "verdict" says how they are chosen.

    Args:
        difference: of `paired`.
        adjusted: its p-value by `holm`.
        higher: is better.
    """
    n = difference.n
    if n == 0:
        return "no seed in common"
    if n > 1 and difference.student is None and difference.mean == 0:
        return "the same in every seed"
    if n < FEWEST or difference.student is None:
        return f"{n} seed{'s' if n > 1 else ''}: too few to tell"
    low, high = difference.student
    if low <= 0 <= high:
        return f"{n} seeds: too few to tell" if n < FEW else "no difference seen"
    word = "better" if (difference.mean > 0) == higher else "worse"
    return word if adjusted < 1 - LEVEL else f"perhaps {word}"
