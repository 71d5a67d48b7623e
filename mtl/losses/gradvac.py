"""GradVac: gradient vaccine, aligns each pair of task gradients at least as well as the pair usually is.

Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models",
ICLR 2021, eq. 4 and algorithm 1: in random order of j ≠ i, with φ = cos(g̃_i, g_j),

    if φ < φ̂_ij:  g̃_i ← g̃_i + ‖g̃_i‖ (φ̂_ij √(1−φ²) − φ √(1−φ̂_ij²)) / (‖g_j‖ √(1−φ̂_ij²)) · g_j,
    φ̂_ij ← (1−β) φ̂_ij + β φ        (always, with the φ before the correction),       and the update is Σ_i g̃_i.

β = 1e-2. With φ̂ = 0 and β = 0 this is PCGrad. The gradients of all shared parameters count as one vector ("whole
model"); the paper also treats layers one by one. Like PCGrad it needs the Gramian only.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.pcgrad import random_orders
from mtl.losses.solvers import double


class GradVac(GramianWeighting):
    """weights = Σ_i c_i, with c_i the coefficients of task i's vaccinated gradient.

    Args:
        tasks: number or names of the tasks.
        beta: rate of the moving average of the cosines.
    """

    def __init__(self, tasks: int | Sequence[str], beta: Annotated[float, Ge(0), Le(1)] = 1e-2):
        super().__init__(tasks)
        self.beta = beta
        self.register_buffer("goal", torch.zeros(self.tasks, self.tasks, dtype=torch.float64))

    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        G = double(gramian)
        squares = G.diagonal().clamp(min=0)
        order = random_orders(len(G), self.generator(G.device))
        # Each pair is met once, so all that belongs to pairs is gathered before the rounds: (T, T−1) arrays.
        goal = self.goal.to(G).gather(1, order)
        met = squares[order] > 0
        inverse = torch.where(met, squares[order].rsqrt(), 0.0)
        tangent = goal / (1 - goal * goal).clamp(min=1e-12).sqrt() * inverse
        rows = [x.unbind(1) for x in (G[order], order[..., None], squares[order], inverse, tangent)]
        coefficients = torch.eye(len(G), dtype=G.dtype, device=G.device)
        length = squares.clone()  # ‖g̃_i‖²
        seen = []
        for others, j, square, over, slope in zip(*rows, strict=True):
            dot = torch.linalg.vecdot(coefficients, others)
            along = dot * over  # of g̃_i along g_j; across is what is left of it
            across = torch.addcmul(length, along, along, value=-1).clamp_(min=0).sqrt_()
            seen.append((along, length))
            # The paper's correction is positive exactly when φ < φ̂.
            pull = torch.addcmul(across * slope, along, over, value=-1).clamp_(min=0)
            length = torch.addcmul(length, pull, torch.addcmul(dot, pull, square, value=0.5), value=2).clamp_(min=0)
            coefficients.scatter_add_(1, j, pull[:, None])
        if seen:
            along, lengths = (torch.stack(x, 1) for x in zip(*seen, strict=True))
            cosine = along / lengths.sqrt()
            moved = torch.lerp(goal, cosine.clamp(-1, 1), self.beta)
            self.goal.scatter_(1, order, torch.where(met & cosine.isfinite(), moved, goal).to(self.goal))
        return masked(coefficients.sum(0), present)
