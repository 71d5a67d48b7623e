"""Fast Adaptive Multitask Optimization (FAMO): all losses fall at the same rate; one more forward pass a step.

Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, algorithm 1. Before the step, with the logits
ξ:

    L = c Σ_i z_i log D_i,   z = softmax(ξ),   D_i = L_i + ε,   c = 1 / Σ_i (z_i / D_i), constant.

So w_i = c z_i / D_i and Σw = 1. After the step, D' is computed on the same batch with the new parameters. Adam then
moves ξ along

    (diag z − z zᵀ) (log D − log D') + γ ξ.

The task whose loss fell most loses most weight. ξ starts at 0. Adam has lr 0.025 and betas (0.9, 0.999). ε = 1e-8.
The losses' lower bound is 0. γ is 1e-3, the authors' value for most data sets (0.01 for Cityscapes).

ξ and Adam's moments are buffers, so a checkpoint holds all of them. An absent task keeps its ξ and its moments.
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
    """L = c Σ_i z_i log L_i with z learned from the change of the losses; needs `after_step` after every step.

    Args:
        lr: learning rate of the logits.
        gamma: γ, weight decay of the logits; it pulls z towards 1/T.
    """

    needs_positive = True

    def __init__(
        self, tasks: int | Sequence[str], lr: Annotated[float, Ge(0)] = 0.025, gamma: Annotated[float, Ge(0)] = 1e-3
    ):
        super().__init__(tasks)
        self.gamma, self.adam = gamma, Adam(self.tasks, lr)
        self.register_buffer("logits", torch.zeros(self.tasks))
        # D of the last step. NaN: the task was absent, or `after_step` has used the value already.
        self.register_buffer("before", torch.full((self.tasks,), torch.nan))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        gaps = masked(losses, present) + EPS
        z = softmax(self.logits.to(losses), present)
        self.before.copy_(gaps.detach() if present is None else torch.where(present, gaps.detach(), torch.nan))
        # If no task is present, all z are 0 and the total is 0. The clamp avoids a division by 0.
        # c is constant: it scales the step and has no gradient.
        scale = 1 / (z / gaps.detach()).sum().clamp(min=torch.finfo(z.dtype).tiny)
        return scale * (z * gaps.log()).sum()

    def after_step(self, losses: Tensor, present: Tensor | None = None) -> None:
        """Update the logits from the decrease of the losses.

        Raises:
            ValueError: a loss is negative, so it has no logarithm.
        """
        losses = losses.detach()
        refuse_negative(self, losses, present, "takes their logarithms after each step")
        # On a GPU the error of a negative loss comes late, so its logarithm must be kept out here.
        known = ~self.before.isnan() & losses.isfinite() & (losses >= 0)
        present = known if present is None else present & known
        fall = masked(self.before.log() - (losses.to(self.before) + EPS).log(), present)
        z = softmax(self.logits, present)
        # (diag z − z zᵀ) fall + γ ξ, without the T×T matrix.
        gradient = z * (fall - z @ fall) + self.gamma * self.logits
        self.logits.copy_(self.adam(self.logits, gradient, present))
        self.before.fill_(torch.nan)  # if a GradScaler skips the next step, this one must not be used twice
