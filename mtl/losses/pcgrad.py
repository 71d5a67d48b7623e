"""PCGrad: projects conflicting task gradients onto each other's normal plane.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1. Each task gradient g_i meets the
other gradients g_j in random order. It is projected onto the normal plane of every g_j that it conflicts with:

    if g̃_i·g_j < 0:  g̃_i ← g̃_i − (g̃_i·g_j / ‖g_j‖²) g_j,      and the update is Σ_i g̃_i.

Every g̃_i is a combination of the original gradients, so the method needs the Gramian only. The update is the sum, as
in the paper. Heads get the gradient of their own loss.
"""

import torch
from torch import Generator, Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import cosines


class PCGrad(GramianWeighting):
    """weights = Σ_i c_i, where c_i (T,) are the coefficients of task i's projected gradient g̃_i."""

    claims = ("scale_free",)

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        matrix, norms = cosines(gramian)
        order = random_orders(len(matrix), self.generator(matrix.device))
        rounds = order.T[..., None]
        pulls = torch.zeros_like(rounds, dtype=matrix.dtype)
        dots = matrix.clone()  # (T, T) products of every g̃_i / ‖g_i‖ with every unit gradient
        # All tasks make their round k at the same time, so T tasks take T − 1 rounds instead of T (T − 1).
        for j, met, pull in zip(rounds.unbind(), matrix[order.T].unbind(), pulls.unbind(), strict=True):
            torch.clamp(dots.gather(1, j), max=0, out=pull)
            dots.addcmul_(pull, met, value=-1)
        return masked(summed(order, -pulls, norms), present)


def random_orders(tasks: int, generator: Generator) -> Tensor:
    """(T, T−1) int64: row i holds all tasks except i, in a random order that is drawn for task i."""
    keys = torch.rand(tasks, tasks, generator=generator, device=generator.device)
    # Sorting random keys gives a random order. A task's own key is the largest, so it comes last and is cut off.
    return keys.fill_diagonal_(2.0).argsort(1)[:, : tasks - 1]


def summed(order: Tensor, pulls: Tensor, norms: Tensor) -> Tensor:
    """(T,) the weights of Σ_i g̃_i.

    Args:
        order: (T, T−1) the tasks that each task met.
        pulls: (T−1, T, 1) the coefficients of the met unit gradients in g̃_i / ‖g_i‖. Task i's own has coefficient 1.
        norms: (T,) the norms of the task gradients.
    """
    coefficients = torch.eye(len(norms), dtype=norms.dtype, device=norms.device).scatter_(1, order, pulls[..., 0].T)
    return norms @ coefficients / norms
