"""What a multi-task network is worth over all its tasks: Δm, achievement, mean rank, Pareto front.

Arrays are (runs or strategies, metrics); `higher` says for each metric whether higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def delta_m(values: ArrayLike, baselines: ArrayLike, higher: ArrayLike, tasks: Sequence[str] | None = None) -> float:
    """Mean relative gain over single-task learning, in percent; above 0 is better.

    Δm = 100 / T · Σ_t (−1)^{l_t} (M_t − B_t) / B_t, with l_t = 1 where lower is better: Maninis, Radosavovic &
    Kokkinos, "Attentive Single-Tasking of Multiple Tasks", CVPR 2019. The denominator here is |B_t|, so that a negative
    score that rises is a gain too.

    Of several metrics per task, papers take the mean in two ways: over all metrics (`tasks` None: CAGrad, Nash-MTL,
    FAMO, FairGrad), so that a task with more metrics counts more; or within each task first (LibMTL, DB-MTL).

    Args:
        values: (K,) the metrics of the multi-task network, one per task or more.
        baselines: (K,) the same of networks trained on one task each.
        higher: (K,).
        tasks: (K,) the task of each metric, to average within the tasks first.

    Returns:
        NaN where a metric is missing or not finite, or a baseline is 0.
    """
    values, baselines = _finite(values), _finite(baselines)
    with np.errstate(over="ignore", invalid="ignore"):
        gain = np.where(higher, 1.0, -1.0) * (values - baselines) / np.where(baselines == 0, np.nan, np.abs(baselines))
        if tasks is not None:
            names = np.asarray(tasks)
            gain = np.array([gain[names == task].mean() for task in dict.fromkeys(tasks)])
        return _finite_mean(gain)


def achievement(values: ArrayLike, baselines: ArrayLike, higher: ArrayLike) -> float:
    """Mean share of the tasks' potential that is reached, in percent; 100 is single-task learning.

    a_t = M_t / p_t with the single-task metric p_t as potential, p_t / M_t where lower is better: Yun & Cho,
    "Achievement-Based Training Progress Balancing for Multi-Task Learning", ICCV 2023.

    Args:
        values, baselines, higher: (T,) as for `delta_m`.

    Returns:
        NaN where a metric is missing, not finite or negative (a share of it means nothing) or a denominator is 0.
    """
    values, baselines = _finite(values), _finite(baselines)
    above, below = np.where(higher, values, baselines), np.where(higher, baselines, values)
    with np.errstate(over="ignore", invalid="ignore"):
        return _finite_mean(above / np.where((below > 0) & (above >= 0), below, np.nan))


def ranks(figures: ArrayLike, higher: ArrayLike) -> NDArray:
    """Ranks from 1 (best) within each column; equals share the mean of their places.

    Values that are not finite numbers share the last places.

    Args:
        figures: (S, M) of S strategies.
        higher: (M,).

    Returns:
        (S, M).
    """
    costs = _costs(figures, higher)
    smaller = (costs[:, None] > costs[None]).sum(1)
    equal = (costs[:, None] == costs[None]).sum(1)
    return smaller + (equal + 1) / 2


def mean_rank(figures: ArrayLike, higher: ArrayLike) -> NDArray:
    """MR (S,): the average of a strategy's ranks over all metrics; lower is better. Navon et al., "Multi-Task Learning
    as a Bargaining Game", ICML 2022. Arguments as for `ranks`."""
    found = ranks(figures, higher)
    return found.mean(1) if found.shape[1] else np.full(len(found), np.nan)


def pareto_optimal(figures: ArrayLike, higher: ArrayLike, rivals: ArrayLike | None = None) -> NDArray:
    """Runs that no other run dominates: none is at least as good in all metrics, and better in one.

    Equal runs do not dominate each other; a run with a value that is not finite is never optimal and dominates none.

    Args:
        figures: (N, T), one metric per task.
        higher: (T,).
        rivals: (K, T), the runs that may dominate; default: `figures` themselves.

    Returns:
        (N,) bool.
    """
    if not len(figures):
        return np.zeros(0, bool)
    costs = _costs(figures, higher)
    others = costs if rivals is None else _costs(rivals, higher) if len(rivals) else costs[:0]
    others = np.unique(others[np.isfinite(others).all(1)], axis=0)
    kept = np.isfinite(costs).all(1)
    for i in np.flatnonzero(kept):
        kept[i] = not ((others <= costs[i]).all(1) & (others < costs[i]).any(1)).any()
    return kept


def _costs(figures: ArrayLike, higher: ArrayLike) -> NDArray:
    """(N, K) lower is better; infinite where there is no finite value."""
    figures = _finite(figures)
    return np.where(np.isnan(figures), np.inf, np.where(higher, -figures, figures))


def _finite(figures: ArrayLike) -> NDArray:
    """Floats, NaN where there is no finite number; None counts as missing."""
    figures = np.asarray(figures, float)
    return np.where(np.isfinite(figures), figures, np.nan)


def _finite_mean(shares: NDArray) -> float:
    """In percent; NaN where one is missing or the result is beyond all floats."""
    mean = float(100 * shares.mean()) if len(shares) else np.nan
    return mean if np.isfinite(mean) else np.nan
