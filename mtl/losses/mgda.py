"""MGDA: multiple-gradient descent, the shortest vector in the convex hull of the task gradients.

Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Math. 2012; for deep
networks Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, eq. 3:

    d = Σ_i α_i g_i,   α = argmin over the simplex of ‖Σ_i α_i g_i / n_i‖²,

with n_i = 1 (`none`), ‖g_i‖ (`l2`), L_i (`loss`) or L_i‖g_i‖ (`loss+`). Their MGDA-UB, the upper bound with the
gradients of the representation, is `step.gradients=features`. The normalisation decides α only: the update combines the
gradients themselves, as in the authors' code (LibMTL's parameter mode updates with the normalised ones). Heads receive
α_i ∇L_i, since the authors differentiate Σ α_i L_i. Exact solution (the authors' Frank-Wolfe clips α at 0.001).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.solvers import shortest


class MGDA(GramianWeighting):
    """weights = the min-norm point of the simplex, Σ = 1.

    Args:
        tasks: number or names of the tasks.
        normalization: by what the gradients are divided to find α.
    """

    claims = ("non_conflicting", "stationary", "scale_free")
    heads = "weighted"

    def __init__(self, tasks: int | Sequence[str], normalization: Literal["none", "l2", "loss", "loss+"] = "none"):
        super().__init__(tasks)
        self.normalization = normalization
        self.needs_positive = normalization.startswith("loss")

    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        divisor = torch.ones_like(gramian[0])
        if self.normalization in ("l2", "loss+"):
            divisor = gramian.diagonal().sqrt()
        if self.normalization in ("loss", "loss+"):
            if losses is None:
                raise ValueError(f"normalization={self.normalization} needs the losses of the step")
            divisor = divisor * losses
        divisor = torch.where(divisor > 0, divisor, 1.0)  # a task at its optimum keeps its zero gradient
        return masked(shortest(gramian / divisor / divisor[:, None], present), present)
