"""Fast Adaptive Multitask Optimization (FAMO): all losses fall at the same rate, at the price of a forward pass.

Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, algorithm 1. Before the step, with ξ the logits:

    L = c Σ_i z_i log D_i,   z = softmax(ξ),   D_i = L_i + ε,   c = 1 / Σ_i (z_i / D_i), constant;

so w_i = c z_i / D_i, Σw = 1. After it, with D' of the same batch under the new parameters, Adam moves ξ along

    (diag z − z zᵀ) (log D − log D') + γ ξ        (the tasks whose loss fell most lose weight).

ξ = 0 at first, Adam with lr 0.025 and betas (0.9, 0.999), ε = 1e-8; the losses' lower bound is 0. γ is 1e-3, the
authors' value for most data sets (0.01 for Cityscapes). ξ and Adam's moments are buffers, not parameters of the main
optimizer, so a checkpoint holds all of them. An absent task keeps its ξ and its moments.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.losses.base import LossWeighting, masked, softmax
from mtl.losses.meta import Adam
from mtl.losses.negative import refuse_negative

EPS = 1e-8


class FAMO(LossWeighting):
    """L = c Σ_i z_i log L_i with z learned from how the losses change; needs `after_step` after every step.

    Args:
        tasks: number or names of the tasks.
        lr: of the logits.
        gamma: γ, weight decay of the logits, which pulls z towards 1/T.
    """

    needs_positive = True

    def __init__(
        self, tasks: int | Sequence[str], lr: Annotated[float, Ge(0)] = 0.025, gamma: Annotated[float, Ge(0)] = 1e-3
    ):
        super().__init__(tasks)
        self.gamma, self.adam = gamma, Adam(self.tasks, lr)
        self.register_buffer("logits", torch.zeros(self.tasks))
        self.register_buffer(
            "before", torch.full((self.tasks,), torch.nan)
        )  # D of the last step; NaN: was absent, or is learned from

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        gaps = masked(losses, present) + EPS
        z = softmax(self.logits.to(losses), present)
        self.before.copy_(gaps.detach() if present is None else torch.where(present, gaps.detach(), torch.nan))
        # Nobody present: all z are 0, and so is the total.
        scale = 1 / (z / gaps.detach()).sum().clamp(min=torch.finfo(z.dtype).tiny)
        return scale * (z * gaps.log()).sum()

    def after_step(self, losses: Tensor, present: Tensor | None = None) -> None:
        """Learn how the losses fell.

        Raises:
            ValueError: a loss is negative, and so has no logarithm.
        """
        losses = losses.detach()
        refuse_negative(self, losses, present, "takes their logarithms after each step")
        known = ~self.before.isnan() & losses.isfinite() & (losses >= 0)
        present = known if present is None else present & known
        fall = masked(self.before.log() - (losses.to(self.before) + EPS).log(), present)
        z = softmax(self.logits, present)
        gradient = z * (fall - z @ fall) + self.gamma * self.logits
        self.logits.copy_(self.adam(self.logits, gradient, present))
        self.before.fill_(torch.nan)  # a step that a GradScaler skips must not be learned from twice
