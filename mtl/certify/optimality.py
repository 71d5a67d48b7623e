"""How far a method's step is from the optimum of its paper's problem: the largest residual of the KKT conditions.

The checks are NumPy in float64, written from the problems as the papers state them. They use the gradients themselves
and none of the solvers. UPGrad is the exception: its step is a mean of T projections, and the single ones come from the
solver. All residuals are relative and 0 at the optimum. The docstrings of the conditions are printed on the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import nnls

from mtl.losses import Strategy
from mtl.losses.solvers import project_on_cone


def shortest(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """min ‖Jᵀw‖² over the simplex: w ≥ 0, Σw = 1, g_i·d ≥ ‖d‖², with equality where w_i > 0"""
    d = w @ J
    products = J @ d
    gap = (d @ d - products.min()) / (d @ d)  # at least 0, because ‖d‖² is a weighted mean of the products
    return _largest(-w.min(), abs(w.sum() - 1), gap)


def best_in_ball(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """max min_i g_i·d over ‖d − g₀‖ ≤ c‖g₀‖: equality, and d − g₀ = Σ λ_i g_i with λ ≥ 0 on the worst tasks only"""
    g0, d = J.mean(0), w @ J * (1 + strategy.c**2 if strategy.rescale else 1)
    radius = strategy.c * np.linalg.norm(g0)
    return _largest(abs(np.linalg.norm(d - g0) / radius - 1), _out_of_cone(J, d, (d - g0) / radius))


def best_in_cone(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """max min_i g_i·d over ‖d‖ = ‖g₀‖, cos(d, g₀) ≥ c: feasible, d = Σ λ_i g_i + μ g₀ with λ ≥ 0 on the worst tasks
    only and μ ≥ 0 on the cone's boundary only"""
    g0, d = J.mean(0), w @ J
    length = np.linalg.norm(g0)
    cosine = g0 @ d / length / np.linalg.norm(d)
    edge = (g0 / length,) if cosine < strategy.c + 1e-6 else ()
    unit = d / np.linalg.norm(d)
    return _largest(abs(np.linalg.norm(d) / length - 1), strategy.c - cosine, _out_of_cone(J, d, unit, edge))


def _largest(*residuals: float) -> float:
    return float(np.max(residuals))  # NaN if one is NaN; Python's max() could lose it


def _out_of_cone(J: np.ndarray, d: np.ndarray, unit: np.ndarray, more: Sequence[np.ndarray] = ()) -> float:
    """Distance of the vector `unit` from the cone that is spanned by the worst tasks' gradients and by `more`.

    The worst tasks are those with the smallest g_i·d.
    """
    products, lengths = J @ d, np.linalg.norm(J, axis=1)
    worst = products <= products.min() + 1e-7 * lengths * np.linalg.norm(d)
    generators = np.array([*(J[worst] / lengths[worst, None]), *more])
    return float(nnls(generators.T, unit)[1])


def bargain(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """G w = 1/w, w > 0, equation by equation"""
    return _unfairness(J, w, 1 / w)


def fair(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """G w = w^(−1/α), w > 0, equation by equation"""
    return _unfairness(J, w, w ** (-1 / strategy.alpha))


def informed(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """G w = (v/w)^½, w > 0, equation by equation, with the targets v computed from the scores"""
    return _unfairness(J, w, (strategy.targets.numpy() / w) ** 0.5)


def _unfairness(J: np.ndarray, w: np.ndarray, expected: np.ndarray) -> float:
    return np.inf if w.min() <= 0 else float(np.abs(J @ (w @ J) / expected - 1).max())


def projection(J: np.ndarray, start: np.ndarray, v: np.ndarray) -> float:
    """The vector nearest to Jᵀs with J d ≥ 0: d = Jᵀv, v ≥ s, g_i·d ≥ 0, and g_i·d = 0 if v_i > s_i."""
    lengths = np.linalg.norm(J, axis=1)
    d, lift = v @ J, (v - start) * lengths
    cosines, size = J @ d / lengths, np.linalg.norm(start @ J)
    return _largest(-lift.min() / size, -cosines.min() / size, np.abs(lift * cosines).max() / size**2)


def mean_of_projections(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """mean of the vectors nearest to each g_i with Jd ≥ 0: each is d = Jᵀv with v ≥ e_i and Jd ≥ 0, and for each task
    one of the two is an equality"""
    identity = np.eye(len(J))
    parts = project_on_cone(torch.as_tensor(J @ J.T), torch.eye(len(J))).numpy()
    errors = [projection(J, e, v) for e, v in zip(identity, parts, strict=True)]
    return _largest(*errors, np.linalg.norm(w @ J - parts.mean(0) @ J) / np.linalg.norm(w @ J))


def projection_of_mean(J: np.ndarray, w: np.ndarray, strategy: Strategy) -> float:
    """the vector nearest to the mean gradient with Jd ≥ 0: d = Jᵀw with w ≥ 1/T and Jd ≥ 0, and for each task one of
    the two is an equality"""
    return projection(J, np.full(len(w), 1 / len(w)), w)


# The problem that each method's step must solve according to its paper. The pages print the docstrings.
CONDITIONS: Mapping[str, Callable[[np.ndarray, np.ndarray, Strategy], float]] = {
    "mgda": shortest,
    "cagrad": best_in_ball,
    "conicgrad": best_in_cone,
    "nash_mtl": bargain,
    "fairgrad": fair,
    "consmtl": fair,
    "pivrg": informed,
    "upgrad": mean_of_projections,
    "dualproj": projection_of_mean,
}
