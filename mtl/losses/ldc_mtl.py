"""LDC-MTL: learned weights that keep the weighted losses of neighbouring tasks close to each other.

Xiao et al., "LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control", 2025 (arXiv
2502.08585). The problem has two levels. The weights σ(p) minimise the discrepancy of neighbouring weighted losses;
the network minimises the weighted loss. The authors' single-loop code turns this into a penalty:

    L = Σ_i w_i L_i / sg(Σ_j w_j) + λ Σ_{i<T} |w_i L_i − w_{i+1} L_{i+1}|,    w = sigmoid(p).

p is trained together with the network. λ = 0.01. p starts at 1, with learning rate 1e-3. These are the values for
CelebA, where the weights are free parameters, as here. For dense tasks the authors use a small router on the
features, and λ from 0.05 to 0.1. Only neighbours in task order are compared. Absent tasks are passed over: the tasks
on both sides of one become neighbours.

The first term pushes all p down without end. This is harmless, because only the ratios of the w count there. We
compute the ratios from logarithms, so that the w do not underflow.
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
        penalty: λ.
        lr: learning rate of p; None uses the optimizer's.
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
        gaps = self._gaps(weighted, present)
        logs = nn.functional.logsigmoid(self.logits)
        # w_i / sg(Σ w): the value is a softmax of log w, and exp(x − sg x) = 1 carries the gradient of the numerator.
        shares = softmax(logs, present).detach() * (logs - logs.detach()).exp()
        return masked(shares * losses, present).sum() + self.penalty * gaps.sum()

    def _gaps(self, weighted: Tensor, present: Tensor | None) -> Tensor:
        """(T - 1,) the discrepancy of each task with the one before it that is present; 0 if there is none."""
        if present is None:
            return (weighted[1:] - weighted[:-1]).abs()
        places = torch.arange(self.tasks, device=weighted.device)
        before = torch.where(present, places, -1).cummax(0).values[:-1]  # of the tasks 1, 2, …
        gaps = (weighted[1:] - weighted[before.clamp(min=0)]).abs()
        return torch.where(present[1:] & (before >= 0), gaps, 0.0)
