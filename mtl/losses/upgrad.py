"""UPGrad: projects each task gradient on the dual cone, so that no task is harmed, and takes the mean.

Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024 (arXiv 2406.16232), eq. 3-5:

    d = (1/T) Σ_i π(g_i),   π(x) = the vector nearest to x with g_j·π(x) ≥ 0 for all j.

π(g_i) = Jᵀv_i with v_i = argmin over v ≥ e_i of vᵀGv. Heads get the gradient of their own loss. For T = 2 the update
is half of PCGrad's.
"""

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked, uniform
from mtl.losses.host import on_host
from mtl.losses.solvers import double, project_on_cone


class UPGrad(GramianWeighting):
    """weights = (1/T) Σ_i v_i."""

    claims = ("non_conflicting", "linear", "scale_free")

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        # Row i of the identity stands for g_i, so all T projections are computed at once.
        projected = project_on_cone(gramian, torch.eye(len(gramian), device=gramian.device))
        return masked(uniform(present, double(gramian)[0]) @ projected, present)
