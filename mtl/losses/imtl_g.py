"""IMTL-G: impartial multi-task learning, gradient part; the step has equal projections on all task gradients.

Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, eq. 5-7: d = Σ_i α_i g_i with Σ_i α_i = 1 and d·u_i =
d·u_j for all i, j, where u_i = g_i/‖g_i‖. In terms of the cosines C, the condition d·u = λ1 is C (α∘‖g‖) = λ1. So

    α ∝ (C⁺ 1) / ‖g‖.

C⁺ is the pseudo-inverse. The paper inverts D Uᵀ, which is impossible if two gradients are parallel. α may be
negative. Heads get the gradient of their own loss. The paper scales them by IMTL-L; see `imtl`.

Warning: d can point against all tasks at once. This happens if Σ_i (C⁺1)_i/‖g_i‖ < 0, because dividing by a negative
sum flips all signs. It takes conflicts, and usually gradients of different lengths: the losses' scales decide the
sign of d. Example: three random gradients in four dimensions, one of them ten times shorter. It happens in 7 to 8 %
of the draws. `config` has the same cosines without the flip.
"""

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, count, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import decomposable, double


class IMTLG(GramianWeighting):
    """weights = α, Σ = 1."""

    claims = ("scale_free",)

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        return equal_projections(gramian, present)


@on_host
def equal_projections(gramian: Tensor, present: Tensor | None) -> Tensor:
    """(T,) weights α with Σ α = 1, so that Jᵀα has the same projection on every unit gradient.

    A task whose gradient is zero gets the weight 0.
    """
    rtol = 8 * len(gramian) * torch.finfo(gramian.dtype).eps  # rounding of the Gramian's own precision
    G = double(gramian)
    norms = G.diagonal().clamp(min=0).sqrt()
    live = (norms > 0) if present is None else (norms > 0) & present
    scale = torch.where(live, norms, 1.0)
    cosines = decomposable(G / scale / scale[:, None])
    alpha = torch.linalg.pinv(cosines, hermitian=True, rtol=rtol) @ live.to(G) / scale
    total = alpha.sum()
    # Σ α = 0: the gradients cancel out and no direction serves all tasks. The mean is as good as any other.
    fair = masked(torch.ones_like(alpha), present) / count(present, alpha)
    return torch.where(total.abs() > rtol * alpha.abs().sum(), masked(alpha, present) / total, fair)
