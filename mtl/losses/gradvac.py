"""GradVac: gradient vaccine; turns each pair of task gradients until their cosine reaches its moving average.

Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models",
ICLR 2021, eq. 4 and algorithm 1. In random order of j ≠ i, with φ = cos(g̃_i, g_j),

    if φ < φ̂_ij:  g̃_i ← g̃_i + ‖g̃_i‖ (φ̂_ij √(1−φ²) − φ √(1−φ̂_ij²)) / (‖g_j‖ √(1−φ̂_ij²)) · g_j,
    φ̂_ij ← (1−β) φ̂_ij + β φ        (always, with the φ before the correction),       and the update is Σ_i g̃_i.

β = 1e-2. With φ̂ = 0 and β = 0 this is PCGrad. The gradients of all shared parameters count as one vector ("whole
model"). The paper also treats the layers one by one. Like PCGrad, the method needs the Gramian only.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.pcgrad import random_orders, summed
from mtl.losses.solvers import cosines


class GradVac(GramianWeighting):
    """weights = Σ_i c_i, where c_i (T,) are the coefficients of task i's vaccinated gradient g̃_i.

    Args:
        beta: β, rate of the moving average of the cosines.
    """

    def __init__(self, tasks: int | Sequence[str], beta: Annotated[float, Ge(0), Le(1)] = 1e-2):
        super().__init__(tasks)
        self.beta = beta
        self.register_buffer("goal", torch.zeros(self.tasks, self.tasks, dtype=torch.float64))

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        weights, goals = self._vaccinated(gramian, self.goal, present)
        self.goal.copy_(goals)
        return weights

    @on_host
    def _vaccinated(self, gramian: Tensor, goals: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix, norms = cosines(gramian)
        live = gramian.diagonal() > 0
        order = random_orders(len(matrix), self.generator(matrix.device))
        rounds = order.T[..., None]
        # Task i meets each other task once, in its own order. Everything that depends on the pair only is gathered
        # before the rounds, so that a round is a few small kernels. All T tasks make their round k at the same time.
        goal = goals.to(matrix).gather(1, order)
        slopes = torch.where(live[order], goal / (1 - goal * goal).clamp(min=1e-12).sqrt(), 0.0).T[..., None]
        alongs, pulls = torch.zeros(2, *rounds.shape, dtype=matrix.dtype, device=matrix.device)
        squares = live.to(matrix)[:, None].repeat(len(matrix), 1, 1)  # ‖g̃_i‖² / ‖g_i‖² before each round and at the end
        dots = matrix.clone()  # (T, T) products of every g̃_i / ‖g_i‖ with every unit gradient
        arrays = (rounds, matrix[order.T], slopes, alongs, pulls, squares[:-1], squares[1:])
        for j, met, slope, along, pull, square, moved in zip(*(x.unbind() for x in arrays), strict=True):
            torch.gather(dots, 1, j, out=along)
            across = torch.addcmul(square, along, along, value=-1).clamp_(min=0)  # squared part orthogonal to g_j
            # If the cosine is below φ̂, the part along g_j is made longer until the cosine is φ̂.
            longer = torch.maximum(along, across.sqrt().mul_(slope))
            torch.addcmul(across, longer, longer, out=moved)
            torch.sub(longer, along, out=pull)
            dots.addcmul_(pull, met)
        cosine = (alongs / squares[:-1].sqrt())[..., 0].T
        nearer = torch.lerp(goal, cosine.clamp(-1, 1), self.beta)
        goals = goals.scatter(1, order, torch.where(live[order] & cosine.isfinite(), nearer, goal).to(goals))
        return masked(summed(order, pulls, norms), present), goals
