"""Uncertainty weighting (UW): homoscedastic uncertainty as a learned log-variance s_i = log σ_i² per task.

Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics",
CVPR 2018. Regression (eq. 7): L_i / (2σ_i²) + log σ_i; classification (eq. 10): L_i / σ_i² + log σ_i. So

    L = Σ_i a_i e^{-s_i} L_i + b s_i,   a = ½ for regression, 1 for classification; b = ½.

`form=benchmark` is the b = 1 variant, Σ_i e^{-s_i} L_i + s_i, behind the published "uncertainty" row of the CIFAR-100
loss-combination benchmark. s starts at 0 (σ = 1). The losses must be bounded below by 0, or s diverges.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked

_FORMS = {"classification": (1.0, 0.5), "regression": (0.5, 0.5), "benchmark": (1.0, 1.0)}


class Uncertainty(LossWeighting):
    """L = Σ_i a e^{-s_i} L_i + b s_i with s learned.

    Args:
        tasks: number or names of the tasks.
        form: the likelihood behind the constants a and b (see the module's docstring).
        init: initial s_i.
        lr: learning rate of s; None follows the optimizer's.
        weight_decay: of s; 0 by default, since decay pulls every σ towards 1. None follows the optimizer's.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        form: Literal["classification", "regression", "benchmark"] = "classification",
        init: float = 0.0,
        lr: Annotated[float, Ge(0)] | None = None,
        weight_decay: Annotated[float, Ge(0)] | None = 0.0,
    ):
        super().__init__(tasks)
        self.a, self.b = _FORMS[form]
        self.lr, self.weight_decay = lr, weight_decay
        self.log_variances = nn.Parameter(torch.full((self.tasks,), float(init)))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        s = self.log_variances
        return masked(self.a * torch.exp(-s) * losses + self.b * s, present).sum()
