"""ConicGrad: the best worst-case improvement among directions within an angle of the mean gradient.

Hassanpour et al., ConicGrad, 2025 (arXiv 2502.00217): with g₀ the mean gradient,

    d = ‖g₀‖ · argmax over unit d of min_i g_i·d   subject to cos(d, g₀) ≥ c,

c = 0.25. Unlike CAGrad's ball, the cone limits the direction alone and never the length. The paper descends on the dual
weights by one step an iteration; here the problem is solved: it is MGDA's direction where that lies in the cone, and
else on the cone's boundary, where what is orthogonal to g₀ solves CAGrad's problem. (Only the problem, not the paper's
algorithm, could be checked against the source: the full text was not at hand.) Heads get their own gradient.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked, uniform
from mtl.losses.solvers import cosines, double, shortest, steepest_worst_case


class ConicGrad(GramianWeighting):
    """weights of ‖g₀‖ d.

    Args:
        tasks: number or names of the tasks.
        c: least cosine between update and mean gradient.
    """

    def __init__(self, tasks: int | Sequence[str], c: Annotated[float, Ge(0), Lt(1)] = 0.25):
        super().__init__(tasks)
        self.c = c

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        G = double(gramian)
        mean = uniform(present, G[0])
        slopes = G @ mean
        length = (mean @ slopes).clamp(min=0).sqrt()
        free = shortest(gramian, present)
        norm = (free @ G @ free).clamp(min=0).sqrt()
        # Where the hull holds 0, MGDA has no direction, only rounding errors of one.
        rounding = (8 * len(G) * torch.finfo(gramian.dtype).eps) ** 0.5 * G.diagonal().mean().clamp(min=0).sqrt()
        free = free * (length / torch.where(norm > rounding, norm, torch.inf))
        inside = (norm > rounding) & (free @ slopes >= self.c * length**2)
        if inside.is_cpu and inside:  # where looking is free
            weights = free
        else:
            along = slopes / torch.where(length > 0, length, 1.0)
            weights = torch.where(inside, free, self._edge(gramian, along, length, mean, present))
        weights = masked(weights, present)
        # Exact arithmetic would make ‖d‖ = ‖g₀‖; near a stationary point large weights cancel up to rounding errors, to
        # which the cosines' ridge is an upper bound.
        matrix, norms = cosines(gramian)
        norm = (weights * norms @ matrix @ (weights * norms)).clamp(min=0).sqrt()
        return weights * (length / torch.where(norm > length, norm, length).clamp(min=1e-300))

    def _edge(self, gramian: Tensor, along: Tensor, length: Tensor, mean: Tensor, present: Tensor | None) -> Tensor:
        """The best on the cone's boundary, d/‖g₀‖ = c ĝ₀ + √(1−c²) v with v orthogonal to g₀; along: g_i·ĝ₀ (T,)."""
        G = double(gramian)
        across = G - torch.outer(along, along)
        across.diagonal().add_(8 * len(G) * torch.finfo(gramian.dtype).eps * G.diagonal())  # what rounding has left
        radius = torch.full_like(length, (1 - self.c**2) ** 0.5)
        v = steepest_worst_case(across.to(gramian.dtype), self.c * along, radius, present)
        return length * v + (self.c - v @ along) * mean
