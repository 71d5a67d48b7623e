"""Scale-invariant loss weighting (SI): the sum of the logarithms of the losses.

Baseline of Navon et al., "Multi-Task Learning as a Bargaining Game" (Nash-MTL), ICML 2022:

    L = Σ_i log L_i,   so w_i = 1 / L_i.

Multiplying a loss by a constant changes nothing. Some code takes log(1 + L), which does not have this property. A
loss of exactly 0 weighs 0. Σw is not fixed.
"""

from torch import Tensor

from mtl.losses.base import LossWeighting, logs


class ScaleInvariant(LossWeighting):
    """L = Σ_i log L_i."""

    claims = ("task_scale_free",)
    needs_positive = True

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return logs(losses, present).sum()
