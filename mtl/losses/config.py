"""ConFIG: conflict-free inverse gradients.

Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025, eq. 2-4:
with unit gradients u_i = g_i/‖g_i‖ as the rows of U,

    x = U⁺ 1,   d = (Σ_i g_i·x/‖x‖) x/‖x‖,

so that d has the same cosine with every task gradient. In terms of the cosines C = UUᵀ, x = Uᵀ C⁺ 1. Heads get their
own gradient. The direction is IMTL-G's where that one's weights are positive in sum; the length differs. d = 0 where
x = 0: two opposite gradients.
"""

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.solvers import decomposable, double


class ConFIG(GramianWeighting):
    """weights = (Σ_j g_j·x) / ‖x‖² · (C⁺ 1)_i / ‖g_i‖."""

    claims = ("task_scale_free", "scale_free")

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        rtol = 8 * len(gramian) * torch.finfo(gramian.dtype).eps
        G = double(gramian)
        norms = G.diagonal().clamp(min=0).sqrt()
        live = (norms > 0) if present is None else (norms > 0) & present
        safe = torch.where(live, norms, 1.0)
        matrix = decomposable(G / safe / safe[:, None])
        a = torch.linalg.pinv(matrix, hermitian=True, rtol=rtol) @ live.to(G)
        reached = matrix @ a  # the cosines with x, all 1 when they can be
        nobody = reached.norm() <= rtol * len(G) ** 0.5  # then x is only rounding errors
        square = torch.where(nobody, torch.inf, (a @ reached).clamp(min=torch.finfo(G.dtype).tiny))
        return masked((norms @ reached) / square * a / safe, present)
