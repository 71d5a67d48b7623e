"""PCGrad: projecting conflicting gradients.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1: each task gradient g_i is projected,
in random order of j ≠ i, onto the normal plane of every g_j that it conflicts with,

    if g̃_i·g_j < 0:  g̃_i ← g̃_i − (g̃_i·g_j / ‖g_j‖²) g_j,      and the update is Σ_i g̃_i.

Every g̃_i is a combination c_i of the original gradients, so the Gramian is all that the method needs:
g̃_i·g_j = (C G)_ij and the projection subtracts from c_ij. The sum, as in the paper; heads get their own gradient.
"""

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked


class PCGrad(GramianWeighting):
    """weights = Σ_i c_i, with c_i the coefficients of task i's projected gradient."""

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        T, norms = len(gramian), gramian.diagonal()
        # Row i: the other tasks in random order. Task i itself sorts last (its key is above all others) and is cut.
        keys = torch.rand(T, T, generator=self.generator(gramian.device), device=gramian.device)
        order = keys.fill_diagonal_(2.0).argsort(1)[:, : T - 1]
        coefficients = torch.eye(T, dtype=gramian.dtype, device=gramian.device)
        for j in order.unbind(1):  # (T,) the task that each row is projected against in this round
            dots = (coefficients * gramian[j]).sum(1)
            step = torch.where(dots < 0, -dots / norms[j], torch.zeros_like(dots))
            coefficients.scatter_add_(1, j[:, None], step[:, None])
        return masked(coefficients.sum(0), present)
