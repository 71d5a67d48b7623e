"""Soft optimal uncertainty weighting (UW-SO): a softmax over the inverse losses, the weights of `uncertainty_optimal`.

Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", GCPR 2024:

    w_i = exp(1 / (τ sg[L_i])) / Σ_k exp(1 / (τ sg[L_k])),   Σw = 1.

The authors tune τ for each data set; it is 1 here. Because Σw = 1, the step is T times smaller than equal weighting's
at the same learning rate; `step.scale=sum` evens that out. A loss of exactly 0 takes the whole weight, the formula's
limit.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from mtl.losses.base import FLOOR, LossWeighting, combine, softmax


class UncertaintySoftmax(LossWeighting):
    """L = Σ_i w_i L_i with w = softmax(1 / (τ L)).

    Args:
        temperature: τ; a larger value is closer to equal weights.
    """

    needs_positive = True

    def __init__(self, tasks: int | Sequence[str], temperature: Annotated[float, Gt(0)] = 1.0):
        super().__init__(tasks)
        self.temperature = temperature

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return combine(losses, softmax(1 / (self.temperature * losses.detach().clamp(min=FLOOR)), present), present)
