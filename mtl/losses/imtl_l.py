"""IMTL-L: learned scales that make all scaled losses equal.

Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, the loss half of IMTL:

    L = Σ_i e^{s_i} L_i − s_i,   minimal over s at e^{s_i} L_i = 1.

s starts at 0. The base is e, as in the authors' code. With −s for s, this is twice the regression form of
`uncertainty`. Σw is not fixed. The losses must have the lower bound 0; otherwise s diverges.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked


class IMTLL(LossWeighting):
    """L = Σ_i e^{s_i} L_i − s_i with s learned.

    Args:
        lr: learning rate of s; None uses the optimizer's.
        weight_decay: weight decay of s. The default is 0, because decay pulls every weight to 1. None uses the
            optimizer's.
    """

    needs_positive = True  # s settles where e^s L = 1

    def __init__(
        self,
        tasks: int | Sequence[str],
        lr: Annotated[float, Ge(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] | None = 0.0,
    ):
        super().__init__(tasks)
        self.lr, self.weight_decay = lr, weight_decay
        self.log_scales = nn.Parameter(torch.zeros(self.tasks))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(self.log_scales.exp() * losses - self.log_scales, present).sum()
