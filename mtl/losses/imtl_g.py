"""IMTL-G: impartial multi-task learning, gradient part: equal projections on all task gradients.

Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, eq. 5-7: d = Σ_i α_i g_i with Σ_i α_i = 1 and
d·u_i = d·u_j for all i, j, where u_i = g_i/‖g_i‖. In terms of the cosines C, d·u = λ1 reads C (α∘‖g‖) = λ1, so

    α ∝ (C⁺ 1) / ‖g‖,

with the pseudo-inverse, since the paper's inverse of D Uᵀ does not exist when two gradients are parallel. α may be
negative. Heads get the gradient of their own loss (the paper scales them by IMTL-L; see `imtl`).

Warning: where Σ_i (C⁺1)_i/‖g_i‖ < 0, dividing by it to make Σ α = 1 turns d against all tasks at once. That takes
conflicts, and mostly gradients of different lengths: with one of three random gradients in four dimensions ten times
shorter than the others it happens in 7 to 8 % of the draws, and the losses' scales decide about d's sign. `config` has
the same cosines without the flip.
"""

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, count, masked
from mtl.losses.solvers import decomposable, double


class IMTLG(GramianWeighting):
    """weights = α, Σ = 1."""

    claims = ("scale_free",)

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        return equal_projections(gramian, present)


def equal_projections(gramian: Tensor, present: Tensor | None) -> Tensor:
    """(T,) α with Σ α = 1 that gives Jᵀα the same projection on every unit gradient; a zero gradient gets 0."""
    rtol = 8 * len(gramian) * torch.finfo(gramian.dtype).eps
    G = double(gramian)
    norms = G.diagonal().clamp(min=0).sqrt()
    live = (norms > 0) if present is None else (norms > 0) & present
    scale = torch.where(live, norms, 1.0)
    cosines = decomposable(G / scale / scale[:, None])
    alpha = torch.linalg.pinv(cosines, hermitian=True, rtol=rtol) @ live.to(G) / scale
    total = alpha.sum()
    # Σ α = 0: the gradients cancel out and no direction serves all; their mean is as good as any.
    fair = masked(torch.ones_like(alpha), present) / count(present, alpha)
    return torch.where(total.abs() > rtol * alpha.abs().sum(), masked(alpha, present) / total, fair)
