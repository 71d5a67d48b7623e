"""IMTL: impartial multi-task learning, both parts: IMTL-L scales the losses, IMTL-G weighs the scaled gradients.

Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, algorithm 1. The losses become e^{s_i} L_i, with s
learned from Σ_i e^{s_i} L_i − s_i. The shared parameters follow Σ_i α_i e^{s_i} g_i with IMTL-G's α. Head i follows
e^{s_i} ∇L_i. s starts at 0.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.base import GramianWeighting, HeadGradients, masked, times
from mtl.losses.imtl_g import equal_projections
from mtl.losses.solvers import double


class IMTL(GramianWeighting):
    """weights = α_i e^{s_i}.

    Args:
        lr: learning rate of s; None uses the optimizer's.
    """

    needs_positive = True  # s settles where e^s L = 1

    def __init__(self, tasks: int | Sequence[str], lr: Annotated[float, Ge(0)] | None = None):
        super().__init__(tasks)
        self.lr = lr
        self.scales = nn.Parameter(torch.zeros(self.tasks))

    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        if losses is None:
            raise ValueError("IMTL needs the losses of the step; imtl_g does not")
        factors = self.scales.detach().exp()
        # The gradient of e^s L − s for s. A Gramian method returns weights, not a loss, so it is written to `.grad`.
        gradient = masked(factors * losses.to(factors) - 1, present)
        self.scales.grad = gradient if self.scales.grad is None else self.scales.grad + gradient
        factors = factors.to(double(gramian))
        # IMTL-G on the scaled gradients e^{s_i} g_i: their Gramian is G with rows and columns scaled.
        return equal_projections(double(gramian) * factors * factors[:, None], present) * factors

    def head_gradients(self, own: HeadGradients, weights: Tensor) -> HeadGradients:
        return times(own, self.scales.detach().exp().to(weights))
