"""Uncertainty weighting in σ itself: the adaptive loss weights of TTNet.

Voeikov, Falaleev, Baikulov, "TTNet: Real-time temporal and spatial video analysis of table tennis", CVPR Workshops
2020, as explained in the note "Multi-task learning loss balancing" (June 2020); after Kendall et al., CVPR 2018:

    L = Σ_i L_i / (σ_i² + ε) + R,   R = Σ_i log(σ_i + ε)   or   R = log(Π_i σ_i + ε),   ε = 1e-8.

σ starts at 1. With ε = 0 both are the classification form of `uncertainty` with s = log σ². Only the optimizer's
steps differ, because it moves σ instead of log σ. Σw is not fixed.

In the published form the logarithm is NaN after a step that makes a σ negative. log σ pulls σ there if the loss is
small. Here |σ| takes the place of σ, which changes nothing for σ > 0. Π σ is computed from logarithms, so it does not
underflow.
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
        regulariser: R, the sum of the logarithms or the logarithm of the product. They differ in the place of ε only.
        lr: learning rate of σ; None uses the optimizer's.
        weight_decay: weight decay of σ. The default is 0, because decay raises every weight. None uses the
            optimizer's.
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
            # log(Π σ + ε) from log Π σ and log ε: the product itself would underflow with many tasks.
            return weighted + torch.logaddexp(log_product, torch.full_like(log_product, math.log(EPS)))
        return weighted + masked((sigmas + EPS).log(), present).sum()
