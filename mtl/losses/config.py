"""ConFIG: conflict-free inverse gradients; the step has the same cosine with every task gradient.

Liu, Chu, Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025, eq. 2-4.
The rows of U are the unit gradients u_i = g_i/‖g_i‖:

    x = U⁺ 1,   d = (Σ_i g_i·x/‖x‖) x/‖x‖.

In terms of the cosines C = UUᵀ, x = Uᵀ C⁺ 1. Heads get the gradient of their own loss. The direction equals IMTL-G's
if the sum of IMTL-G's weights is positive before they are normalised. The length differs. d = 0 if x = 0, as for two
opposite gradients.
"""

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import decomposable, double


class ConFIG(GramianWeighting):
    """weights = (Σ_j g_j·x) / ‖x‖² · (C⁺ 1)_i / ‖g_i‖."""

    claims = ("task_scale_free", "scale_free")

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        rtol = 8 * len(gramian) * torch.finfo(gramian.dtype).eps  # rounding of the Gramian's own precision
        G = double(gramian)
        norms = G.diagonal().clamp(min=0).sqrt()
        live = (norms > 0) if present is None else (norms > 0) & present
        safe = torch.where(live, norms, 1.0)
        matrix = decomposable(G / safe / safe[:, None])
        a = torch.linalg.pinv(matrix, hermitian=True, rtol=rtol) @ live.to(G)
        reached = matrix @ a  # the products u_i·x; all are 1 if a common direction exists
        nobody = reached.norm() <= rtol * len(G) ** 0.5  # no common direction: x holds rounding errors only
        # ‖x‖²; infinite without a common direction, so that all weights become 0.
        square = torch.where(nobody, torch.inf, (a @ reached).clamp(min=torch.finfo(G.dtype).tiny))
        return masked((norms @ reached) / square * a / safe, present)
