"""ConicGrad: the best worst-case improvement among the directions within an angle of the mean gradient.

Hassanpour et al., "Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone", 2025 (arXiv 2502.00217).
With the mean gradient g₀,

    d = ‖g₀‖ · argmax over unit d of min_i g_i·d   subject to cos(d, g₀) ≥ c.

c = 0.25. CAGrad's ball limits both direction and length; this cone limits the direction only. Heads get the gradient
of their own loss.

The paper takes one descent step on the dual weights per iteration. Here the problem is solved. If MGDA's direction
lies in the cone, it is the solution. Otherwise the solution lies on the cone's boundary, and its part orthogonal to
g₀ solves CAGrad's problem. We could not read the full text: the problem was checked against the paper, its algorithm
was not.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked, uniform
from mtl.losses.host import on_host
from mtl.losses.solvers import cosines, double, shortest, steepest_worst_case


class ConicGrad(GramianWeighting):
    """The weights of the update d = ‖g₀‖ × (the best unit direction in the cone).

    Args:
        c: smallest allowed cosine between the update and the mean gradient.
    """

    def __init__(self, tasks: int | Sequence[str], c: Annotated[float, Ge(0), Lt(1)] = 0.25):
        super().__init__(tasks)
        self.c = c

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        G = double(gramian)
        mean = uniform(present, G[0])
        slopes = G @ mean
        length = (mean @ slopes).clamp(min=0).sqrt()
        free = shortest(gramian, present)
        norm = (free @ G @ free).clamp(min=0).sqrt()
        # If 0 lies in the convex hull of the gradients, MGDA's direction is 0, and what remains is rounding error.
        rounding = (8 * len(G) * torch.finfo(gramian.dtype).eps) ** 0.5 * G.diagonal().mean().clamp(min=0).sqrt()
        free = free * (length / torch.where(norm > rounding, norm, torch.inf))
        inside = (norm > rounding) & (free @ slopes >= self.c * length**2)
        along = slopes / torch.where(length > 0, length, 1.0)
        weights = masked(free if inside else self._edge(gramian, along, length, mean, present), present)
        # In exact arithmetic ‖d‖ = ‖g₀‖. Near a stationary point large weights cancel, and rounding makes d too long.
        # The norm on the matrix with the cosines' ridge is an upper bound of the true one, so d is shortened safely.
        matrix, norms = cosines(gramian)
        norm = (weights * norms @ matrix @ (weights * norms)).clamp(min=0).sqrt()
        return weights * (length / torch.where(norm > length, norm, length).clamp(min=1e-300))

    def _edge(self, gramian: Tensor, along: Tensor, length: Tensor, mean: Tensor, present: Tensor | None) -> Tensor:
        """(T,) weights of the best direction on the cone's boundary, d/‖g₀‖ = c ĝ₀ + √(1−c²) v with v orthogonal to g₀.

        Args:
            gramian: (T, T).
            along: (T,) the products g_i·ĝ₀.
            length: () ‖g₀‖.
            mean: (T,) the weights of g₀.
            present: (T,) bool as in `weights`.
        """
        G = double(gramian)
        across = G - torch.outer(along, along)  # the Gramian of the gradients' parts orthogonal to g₀
        # The subtraction cancels digits. The ridge keeps the result positive definite.
        across.diagonal().add_(8 * len(G) * torch.finfo(gramian.dtype).eps * G.diagonal())
        radius = torch.full_like(length, (1 - self.c**2) ** 0.5)
        v = steepest_worst_case(across.to(gramian.dtype), self.c * along, radius, present)
        return length * v + (self.c - v @ along) * mean
