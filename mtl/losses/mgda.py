"""MGDA: multiple-gradient descent, the shortest vector in the convex hull of the task gradients.

Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", C. R. Math. 2012; for deep
networks Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018, eq. 3:

    d = Σ_i α_i g_i,   α = argmin over the simplex of ‖Σ_i α_i g_i / n_i‖².

`normalization` sets n_i: 1 (`none`), ‖g_i‖ (`l2`), L_i (`loss`) or L_i‖g_i‖ (`loss+`). It affects α only. The update
combines the gradients themselves, as in the authors' code. LibMTL's parameter mode combines the normalised ones
instead.

Heads receive α_i ∇L_i, because the authors differentiate Σ α_i L_i. MGDA-UB, the authors' upper bound with the
gradients of the representation, is `step.gradients=features`. The solution is exact here; the authors' Frank-Wolfe
clips α at 0.001.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import shortest


class MGDA(GramianWeighting):
    """weights = α, the min-norm point of the simplex, Σ = 1.

    Args:
        normalization: n_i, the numbers by which the gradients are divided before α is computed.
    """

    claims = ("non_conflicting", "stationary", "scale_free")
    heads = "weighted"

    def __init__(self, tasks: int | Sequence[str], normalization: Literal["none", "l2", "loss", "loss+"] = "none"):
        super().__init__(tasks)
        self.normalization = normalization
        self.needs_positive = normalization.startswith("loss")

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        divisor = torch.ones_like(gramian[0])
        if self.normalization in ("l2", "loss+"):
            divisor = gramian.diagonal().sqrt()
        if self.normalization in ("loss", "loss+"):
            if losses is None:
                raise ValueError(f"normalization={self.normalization} needs the losses of the step")
            divisor = divisor * losses
        divisor = torch.where(divisor > 0, divisor, 1.0)  # a zero gradient stays zero; 0 / 0 would be NaN
        return masked(shortest(gramian / divisor / divisor[:, None], present), present)
