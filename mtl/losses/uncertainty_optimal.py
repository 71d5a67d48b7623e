"""Optimal uncertainty weighting (UW-O): uncertainty weighting with the σ that is optimal for the current loss.

Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", GCPR 2024; also Elich et
al., "Examining Common Paradigms in Multi-Task Learning", 2024 (eq. 2). The minimum over σ, in closed form:

    gaussian (L2)   L / (2σ²) + log σ   at σ² = L:   w_i = 1 / (2 sg[L_i])
    laplace (L1)    L / σ + log σ       at σ = L:    w_i = 1 / sg[L_i]

Classification, L / σ² + log σ, gives the gaussian's weights too. sg[·] stops the gradient. The gradients
therefore equal the gradients of ½ Σ log L_i (gaussian) and Σ log L_i (laplace). We compute these sums: UW-O is
`scale_invariant`, halved for the gaussian. A loss of exactly 0 therefore weighs 0 instead of infinity. Σw is not
fixed.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mtl.losses.base import LossWeighting, logs

Form = Literal["gaussian", "laplace"]


class UncertaintyOptimal(LossWeighting):
    """L = ½ Σ log L_i or Σ log L_i, so the weights are 1 / (2 L_i) or 1 / L_i.

    Args:
        form: the likelihood whose σ is optimal.
    """

    claims = ("task_scale_free",)
    needs_positive = True

    def __init__(self, tasks: int | Sequence[str], form: Form = "gaussian"):
        super().__init__(tasks)
        self.factor = {"gaussian": 0.5, "laplace": 1.0}[form]

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return self.factor * logs(losses, present).sum()
