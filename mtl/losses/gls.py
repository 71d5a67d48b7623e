"""Geometric loss strategy (GLS): the geometric mean of the losses.

Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
CVPR Workshops 2019:

    L = (Π_i L_i)^(1/T),   so w_i = L / (T L_i).

Computed as exp(mean log L): LibMTL's product overflows for 200 losses of 2 and vanishes for 40 of 0.01, and the weights
that it logs are not these. T counts the present tasks. Σw is L times the mean of the 1 / L_i, at least 1.
"""

import torch
from torch import Tensor

from mtl.losses.base import LossWeighting, combine


class GLS(LossWeighting):
    """L = (Π_i L_i)^(1/T)."""

    claims = ("task_scale_free",)
    needs_positive = True

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return combine(losses, torch.ones_like(losses), present, "geometric")
