"""LDC-MTL: loss discrepancy control by bilevel weights, in one loop.

Xiao et al., "LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control", 2025 (arXiv
2502.08585). The weights σ(p) minimise the discrepancy of neighbouring weighted losses, the network the weighted loss;
as a penalty, and in the authors' single-loop code,

    L = Σ_i w_i L_i / sg(Σ_j w_j) + λ Σ_{i<T} |w_i L_i − w_{i+1} L_{i+1}|,    w = sigmoid(p),

with p trained along. λ = 0.01, p = 1 at the start and its learning rate 1e-3 (CelebA, whose weights are free parameters
as here; for dense tasks the authors use a small router on the features and λ of 0.05 to 0.1). Only neighbours in task
order are compared. The first term moves all p down for ever, which is harmless to it, since only the ratios of the w
count there; but they must not underflow, so they are taken in logarithms.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked, softmax


class LDCMTL(LossWeighting):
    """L = Σ w_i L_i / Σ w + λ Σ |w_i L_i − w_{i+1} L_{i+1}| with w = sigmoid(p) learned.

    Args:
        tasks: number or names of the tasks.
        penalty: λ.
        lr: learning rate of p; None follows the optimizer's.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        penalty: Annotated[float, Ge(0)] = 0.01,
        lr: Annotated[float, Ge(0)] | None = 0.001,
    ):
        super().__init__(tasks)
        self.penalty, self.lr = penalty, lr
        self.logits = nn.Parameter(torch.ones(self.tasks))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        weighted = masked(torch.sigmoid(self.logits) * losses, present)
        gaps = (weighted[1:] - weighted[:-1]).abs()
        logs = nn.functional.logsigmoid(self.logits)
        shares = softmax(logs, present).detach() * (logs - logs.detach()).exp()  # the sum of all w has no gradient
        if present is not None:  # neighbours of which one is absent have no discrepancy
            gaps = torch.where(present[1:] & present[:-1], gaps, 0.0)
        return masked(shares * losses, present).sum() + self.penalty * gaps.sum()
