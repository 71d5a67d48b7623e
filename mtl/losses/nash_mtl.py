"""Nash-MTL: the Nash bargaining solution of the tasks.

Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, claim 3.1 and eq. 4. In the unit ball, the
direction that maximises Σ_i log g_i·d is d = Σ_i α_i g_i with

    G α = 1/α,  α > 0,          so that ‖d‖² = T.

Heads receive α_i ∇L_i. `max_norm` = 1 is the authors' clip of the shared gradient; it makes the step's norm 1. The
shared direction equals FairGrad's with α = 1. If 0 lies in the convex hull of the gradients (a Pareto-stationary
point), the equation has no solution. The weights then grow until Jᵀα vanishes.

The authors solve a sequence of convex programs (cvxpy with ECOS). Without ECOS, six public codes silently fall back
to equal weighting. Here Newton's method solves the equation up to rounding.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import fair_weights


class NashMTL(GramianWeighting):
    """weights = α with α_i (G α)_i = 1.

    Args:
        max_norm: clip of the shared gradient's norm; None does not clip.
    """

    claims = ("non_conflicting", "task_scale_free", "scale_free")
    heads = "weighted"

    def __init__(self, tasks: int | Sequence[str], max_norm: Annotated[float, Gt(0)] | None = 1.0):
        super().__init__(tasks)
        self.max_norm = max_norm

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(fair_weights(gramian, 1.0), present)
