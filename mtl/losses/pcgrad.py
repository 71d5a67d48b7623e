"""PCGrad: projecting conflicting gradients.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1: each task gradient g_i is projected,
in random order of j ≠ i, onto the normal plane of every g_j that it conflicts with,

    if g̃_i·g_j < 0:  g̃_i ← g̃_i − (g̃_i·g_j / ‖g_j‖²) g_j,      and the update is Σ_i g̃_i.

Every g̃_i is a combination of the original gradients, so the Gramian is all that the method needs. The sum, as in the
paper; heads get their own gradient.
"""

import torch
from torch import Generator, Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.solvers import cosines


class PCGrad(GramianWeighting):
    """weights = Σ_i c_i, with c_i the coefficients of task i's projected gradient."""

    claims = ("scale_free",)

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        matrix, norms = cosines(gramian)
        order = random_orders(len(matrix), self.generator(matrix.device))
        rounds = order.T[..., None]
        pulls = torch.zeros_like(rounds, dtype=matrix.dtype)
        dots = matrix.clone()  # of every g̃_i / ‖g_i‖ with every unit gradient
        for j, met, pull in zip(rounds.unbind(), matrix[order.T].unbind(), pulls.unbind(), strict=True):
            torch.clamp(dots.gather(1, j), max=0, out=pull)
            dots.addcmul_(pull, met, value=-1)
        return masked(summed(order, -pulls, norms), present)


def random_orders(tasks: int, generator: Generator) -> Tensor:
    """(T, T−1) int64: row i holds the tasks that task i meets, all but itself, in a random order of its own."""
    keys = torch.rand(tasks, tasks, generator=generator, device=generator.device)
    # A task's own key is above all others: it sorts last and is cut.
    return keys.fill_diagonal_(2.0).argsort(1)[:, : tasks - 1]


def summed(order: Tensor, pulls: Tensor, norms: Tensor) -> Tensor:
    """(T,) weights of Σ_i g̃_i, where g̃_i / ‖g_i‖ is the unit gradient of i plus `pulls` (T−1, T, 1) times those met."""
    coefficients = torch.eye(len(norms), dtype=norms.dtype, device=norms.device).scatter_(1, order, pulls[..., 0].T)
    return norms @ coefficients / norms
