"""Dynamic Weight Average (DWA): tasks whose loss falls slowly get more weight.

Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, eq. 7:

    w_i(t) = T exp(r_i(t-1) / τ) / Σ_k exp(r_k(t-1) / τ),   r_i(t-1) = L_i(t-1) / L_i(t-2).

L_i(t) is the mean training loss of epoch t. w = 1 in the first two epochs. τ = 2. Σw = T.

`mean=geometric` is DWA-G of Yun & Cho, ICCV 2023 (AMTL): L = Π_i L_i^{w_i/Σw}.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from mtl.losses.base import LossWeighting, Mean, Statistics, combine, renormalised
from mtl.losses.epochs import mean_losses


class DWA(LossWeighting):
    """L = Σ_i w_i L_i with w from the ratio of the last two epochs' training losses.

    Args:
        temperature: τ; a larger value is closer to equal weights.
        mean: how the weighted losses are combined.
    """

    def __init__(
        self, tasks: int | Sequence[str], temperature: Annotated[float, Gt(0)] = 2.0, mean: Mean = "arithmetic"
    ):
        super().__init__(tasks)
        self.temperature, self.mean = temperature, mean
        self.needs_positive = self.mean == "geometric"
        self.register_buffer("last", torch.full((self.tasks,), torch.nan))
        self.register_buffer("weights", torch.ones(self.tasks))

    def epoch_end(self, statistics: Statistics) -> None:
        losses = mean_losses(self, statistics).to(self.last)
        # NaN means "no epoch yet" or "no label in the whole epoch". Such a task gets the ratio 1 and keeps its state.
        ratio = (losses / self.last).nan_to_num(nan=1.0, posinf=1.0)
        self.weights.copy_(self.tasks * torch.softmax(ratio / self.temperature, 0))
        self.last.copy_(torch.where(losses.isnan(), self.last, losses))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return combine(losses, renormalised(self.weights, present), present, self.mean)
