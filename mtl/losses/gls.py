"""Geometric loss strategy (GLS): the geometric mean of the losses.

Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning",
CVPR Workshops 2019:

    L = (Π_i L_i)^(1/T),   so w_i = L / (T L_i).

T counts the present tasks. Σw is L times the mean of the 1 / L_i; it is at least 1.

We compute exp(mean log L). LibMTL's product overflows for 200 losses of 2 and vanishes for 40 losses of 0.01. The
weights that LibMTL logs are not these.
"""

import torch
from torch import Tensor

from mtl.losses.base import LossWeighting, combine


class GLS(LossWeighting):
    """L = (Π_i L_i)^(1/T)."""

    claims = ("task_scale_free",)
    needs_positive = True

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        # `combine` divides the weights by the number of present tasks.
        return combine(losses, torch.ones_like(losses), present, "geometric")
