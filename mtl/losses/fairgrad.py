"""FairGrad: a step that distributes the decrease of the losses among the tasks by α-fairness.

Ban & Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, eq. 5-7. In a ball, d = Σ_i w_i g_i maximises
the α-fair utility Σ_i (g_i·d)^{1−α}/(1−α). This gives

    G w = w^{−1/α},  w > 0.

α = 1 is Nash-MTL. α = 2 (minimum potential delay) is the authors' choice in all experiments. Heads get the gradient
of their own loss.

The authors' code solves the equation by scipy's least squares. It multiplies d by T and clips it to norm 1
(`max_norm`). The factor T only matters if the clip does not act, so it is left out here.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import fair_weights


class FairGrad(GramianWeighting):
    """weights = w with (G w)_i = w_i^{−1/α}.

    Args:
        alpha: α; a larger value favours the task that gains least.
        max_norm: clip of the shared gradient's norm; None does not clip.
    """

    claims = ("non_conflicting", "scale_free")

    def __init__(
        self,
        tasks: int | Sequence[str],
        alpha: Annotated[float, Gt(0)] = 2.0,
        max_norm: Annotated[float, Gt(0)] | None = 1.0,
    ):
        super().__init__(tasks)
        self.alpha, self.max_norm = alpha, max_norm

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(fair_weights(gramian, self.alpha), present)
