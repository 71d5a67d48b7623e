"""DB-MTL: dual balancing: the logarithm balances the losses, and all task gradients get the same length.

Lin et al., "Dual-Balancing for Multi-Task Learning", 2023 (arXiv 2308.12029), algorithm 1. With g_i = ∇ log(L_i + ε),

    ĝ_i ← β_t ĝ_i + (1 − β_t) g_i,    d = max_j ‖ĝ_j‖ Σ_i ĝ_i / (‖ĝ_i‖ + ε).

β_t = β/t^σ, β = 0.9, σ = 0, ε = 1e-8. The average ĝ starts at 0, without bias correction. It holds T×P numbers. Heads
follow the gradient of log(L_i + ε).
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mtl.losses.base import HeadGradients, JacobianAggregation, masked, times


class DBMTL(JacobianAggregation):
    """direction = max_j ‖ĝ_j‖ Σ_i ĝ_i / ‖ĝ_i‖.

    Args:
        beta: β, the share of the average that a step keeps.
        sigma: σ, decay of β over the steps.
    """

    has_weights = True
    lazy = ("average",)
    heads = "weighted"
    needs_positive = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        beta: Annotated[float, Ge(0), Le(1)] = 0.9,
        sigma: Annotated[float, Ge(0)] = 0.0,
    ):
        super().__init__(tasks)
        self.beta, self.sigma = beta, sigma
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        self.register_buffer("inverse", torch.ones(self.tasks))

    def aggregate(
        self, jacobian: Tensor, present: Tensor | None = None, losses: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if losses is None:
            raise ValueError("DB-MTL needs the losses of the step")
        average = self.kept("average", jacobian)
        self.steps += 1
        inverse = 1 / (losses.to(jacobian) + 1e-8)  # ∇ log(L + ε) = ∇L / (L + ε)
        self.inverse.copy_(inverse)
        rate = (1 - self.beta * self.steps**-self.sigma).to(jacobian).expand(self.tasks)
        if present is not None:  # an absent task keeps its average
            rate = torch.where(present, rate, 0.0)
        average.lerp_(jacobian * inverse[:, None], rate[:, None])
        norms = average.norm(dim=1)
        weights = masked(masked(norms, present).max() / (norms + 1e-8), present)
        return weights @ average, weights

    def head_gradients(self, own: HeadGradients) -> HeadGradients:
        return times(own, self.inverse)
