"""Uncertainty weighting (UW): homoscedastic uncertainty as a learned log-variance s_i = log σ_i² per task.

Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics", CVPR
2018. Regression (eq. 7): L_i / (2σ_i²) + log σ_i. Classification (eq. 10): L_i / σ_i² + log σ_i. So

    L = Σ_i a_i e^{-s_i} L_i + b s_i,   a = ½ for regression, 1 for classification; b = ½.

`form=benchmark` has b = 1: Σ_i e^{-s_i} L_i + s_i. It is the published "uncertainty" row of the CIFAR-100
loss-combination benchmark. s starts at 0 (σ = 1). The losses must have the lower bound 0; otherwise s diverges.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked

# The constants (a, b) of each form.
_FORMS = {"classification": (1.0, 0.5), "regression": (0.5, 0.5), "benchmark": (1.0, 1.0)}


class Uncertainty(LossWeighting):
    """L = Σ_i a e^{-s_i} L_i + b s_i with s learned.

    Args:
        form: the likelihood that sets the constants a and b (see the module's docstring).
        init: initial s_i.
        lr: learning rate of s; None uses the optimizer's.
        weight_decay: weight decay of s. The default is 0, because decay pulls every σ towards 1. None uses the
            optimizer's.
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
