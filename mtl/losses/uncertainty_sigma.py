"""Uncertainty weighting in σ itself: the adaptive loss weights of TTNet.

Voeikov, Falaleev, Baikulov, "TTNet: Real-time temporal and spatial video analysis of table tennis", CVPR Workshops
2020, as explained in the note "Multi-task learning loss balancing" (June 2020); after Kendall et al., CVPR 2018:

    L = Σ_i L_i / (σ_i² + ε) + R,   R = Σ_i log(σ_i + ε)   or   R = log(Π_i σ_i + ε),   ε = 1e-8.

σ starts at 1. With ε = 0 both are `uncertainty`'s classification form with s = log σ²; only the steps of the optimizer
differ, since it moves σ and not its logarithm. Σw is whatever the σ say.

As written the logarithm is NaN once a step has carried a σ below 0 (log σ pulls it there whenever the loss is
small). Here |σ| takes its place, which is the same for every σ > 0. Π σ goes through logs: it does not underflow.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, logs, masked

EPS = 1e-8
Regulariser = Literal["sum", "product"]


class UncertaintySigma(LossWeighting):
    """L = Σ_i L_i / (σ_i² + ε) + log σ with σ learned.

    Args:
        tasks: number or names of the tasks.
        regulariser: the sum of the logarithms of σ, or the logarithm of their product; they differ in where ε enters.
        lr: learning rate of σ; None follows the optimizer's.
        weight_decay: of σ; 0 by default, since decay raises every weight. None follows the optimizer's.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        regulariser: Regulariser = "sum",
        lr: Annotated[float, Ge(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] | None = 0.0,
    ):
        super().__init__(tasks)
        self.of_product = regulariser == "product"
        self.lr, self.weight_decay = lr, weight_decay
        self.sigmas = nn.Parameter(torch.ones(self.tasks))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        sigmas = self.sigmas.abs()
        weighted = masked(losses / (sigmas.square() + EPS), present).sum()
        if self.of_product:
            log_product = logs(sigmas, present).sum()
            return weighted + torch.logaddexp(log_product, torch.full_like(log_product, math.log(EPS)))
        return weighted + masked((sigmas + EPS).log(), present).sum()
