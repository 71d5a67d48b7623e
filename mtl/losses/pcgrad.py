"""PCGrad: projecting conflicting gradients.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1: each task gradient g_i is projected,
in random order of j ≠ i, onto the normal plane of every g_j that it conflicts with,

    if g̃_i·g_j < 0:  g̃_i ← g̃_i − (g̃_i·g_j / ‖g_j‖²) g_j,      and the update is Σ_i g̃_i.

Every g̃_i is a combination c_i of the original gradients, so the Gramian is all that the method needs:
g̃_i·g_j = (C G)_ij and the projection subtracts from c_ij. The sum, as in the paper; heads get their own gradient.
"""

import torch
from torch import Generator, Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.solvers import double


class PCGrad(GramianWeighting):
    """weights = Σ_i c_i, with c_i the coefficients of task i's projected gradient."""

    claims = ("scale_free",)

    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        G = double(gramian)
        order = random_orders(len(G), self.generator(G.device))
        squares = G.diagonal()[order]
        inverse = torch.where(squares > 0, -1 / squares, 0.0)
        coefficients = torch.eye(len(G), dtype=G.dtype, device=G.device)
        for others, j, over in zip(G[order].unbind(1), order[..., None].unbind(1), inverse.unbind(1), strict=True):
            dots = torch.linalg.vecdot(coefficients, others)
            coefficients.scatter_add_(1, j, (dots.clamp_(max=0) * over)[:, None])
        return masked(coefficients.sum(0), present)


def random_orders(tasks: int, generator: Generator) -> Tensor:
    """(T, T−1) int64: row i holds the tasks that task i meets, all but itself, in a random order of its own."""
    keys = torch.rand(tasks, tasks, generator=generator, device=generator.device)
    # A task's own key is above all others: it sorts last and is cut.
    return keys.fill_diagonal_(2.0).argsort(1)[:, : tasks - 1]
