"""MoDo: multi-objective gradient with double sampling; MGDA's weights without the bias of a single noisy batch.

Chen et al., "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and Conflict-Avoidance",
NeurIPS 2023, eq. 2.9. With the Jacobians of two independent batches,

    λ ← Π_simplex(λ − γ (J₁ J₂ᵀ λ + ρ λ)),      d = ½ (J₁ + J₂)ᵀ λ.

γ = ρ = 0.1 are the authors' defaults (γ = 1e-3 in their Office-31 and NYUv2 runs). λ starts at 1/T. γ has the scale
of 1/‖g‖². The two batches are the halves of one batch, as in the authors' scripts. Heads get the gradient of their
own loss.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.losses.base import GramianWeighting, among_present
from mtl.losses.solvers import double, project_on_simplex


class MoDo(GramianWeighting):
    """weights = λ, Σ = 1.

    Args:
        lr: γ, step size of λ.
        rho: ρ, pull of λ towards 1/T.
    """

    samples = 2

    def __init__(
        self, tasks: int | Sequence[str], lr: Annotated[float, Gt(0)] = 0.1, rho: Annotated[float, Ge(0)] = 0.1
    ):
        super().__init__(tasks)
        self.step_size, self.rho = lr, rho
        self.register_buffer("mixture", torch.full((self.tasks,), 1 / self.tasks, dtype=torch.float64))

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        old = double(self.mixture)
        share, kept = among_present(old, present)
        moved = share - self.step_size * (double(gramian) @ share + self.rho * share)
        new = project_on_simplex(moved, present)
        self.mixture.copy_(new if present is None else torch.where(present, new * kept, old))
        return new
