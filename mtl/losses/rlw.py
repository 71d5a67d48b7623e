"""Random Loss Weighting (RLW): new random weights every step.

Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022:

    L = Σ_i w_i L_i,   Σw = 1,   w drawn anew in every step:

    normal (the default) and uniform    softmax of N(0, 1) or U(0, 1) draws
    dirichlet                           Dir(1, …, 1)
    bernoulli                           fair coins over their sum, drawn until one is 1
    constrained_bernoulli               one task, drawn at random, alone

The authors' code (LibMTL) also takes a softmax of uniform draws, which is nearly equal weighting. It does not divide
the coins by their sum. Absent tasks get no weight, and the others are drawn as if they were alone.

On average w = 1/T. At the same learning rate the step is T times smaller than equal weighting's; `step.scale=sum`
evens that out.

`mean=geometric` is RLW-G of Yun & Cho, ICCV 2023 (AMTL): L = Π_i L_i^{w_i}.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mtl.losses.base import FLOOR, LossWeighting, Mean, combine, masked, softmax

Distribution = Literal["normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli"]


class RLW(LossWeighting):
    """L = Σ_i w_i L_i with random w.

    Args:
        distribution: distribution of the weights.
        mean: how the weighted losses are combined.
    """

    def __init__(self, tasks: int | Sequence[str], distribution: Distribution = "normal", mean: Mean = "arithmetic"):
        super().__init__(tasks)
        self.distribution, self.mean = distribution, mean
        self.needs_positive = self.mean == "geometric"

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return combine(losses, self._draw(losses, present), present, self.mean)

    def _draw(self, losses: Tensor, present: Tensor | None) -> Tensor:
        """(T,) weights that add up to 1 over the present tasks."""
        draw = torch.randn if self.distribution == "normal" else torch.rand
        # All tasks are drawn, also absent ones. So the draws of a step do not depend on the labels.
        z = draw(self.tasks, generator=self.generator(losses.device), device=losses.device, dtype=losses.dtype)
        if self.distribution in ("normal", "uniform"):
            return softmax(z, present)
        if self.distribution == "dirichlet":
            z = -torch.log1p(-z)  # exponential draws; divided by their sum they are Dir(1, …, 1)
        elif self.distribution == "bernoulli":
            z = _coins(z, torch.ones_like(z, dtype=torch.bool) if present is None else present)
        else:  # 1 − z lies in (0, 1], so an absent task's 0 never wins the argmax
            z = torch.zeros_like(z).scatter(0, masked(1 - z, present).argmax(0, keepdim=True), 1.0)
        z = masked(z, present)
        return z / z.sum().clamp(min=FLOOR)


def _coins(z: Tensor, present: Tensor) -> Tensor:
    """(T,) fair coins for the present tasks, under the condition that at least one coin is 1.

    The coins are exact and need no second draw. Until the first 1, a task's coin is 1 with probability
    ½ / (1 − ½^n) if n tasks are left, this one included. For the last task (n = 1) that is 1.

    Args:
        z: (T,) uniform draws.
        present: (T,) bool.
    """
    left = present.flip(0).cumsum(0).flip(0)
    heads = present & (z < 0.5 / (1 - 0.5**left))
    after_the_first = heads.cumsum(0) > heads.long()
    return torch.where(after_the_first, z < 0.5, heads).to(z)
