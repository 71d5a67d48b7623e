"""GradDrop: gradient sign dropout, on the gradients of the shared parameters.

Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020, eq. 1-3:

    P = ½ (1 + Σ_i g_i / Σ_i |g_i|),   M_i = 1[P > U]·1[g_i > 0] + 1[P < U]·1[g_i < 0],   U ~ Uniform(0, 1),
    d = Σ_i (ℓ_i + (1 − ℓ_i) M_i) g_i       element by element, with leak ℓ = 0.

The paper masks the gradients of the shared activations; here the same rule acts on parameter gradients.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from mtl.losses.base import JacobianAggregation


class GradDrop(JacobianAggregation):
    """Keeps one sign per element, drawn in proportion to the gradients' net sign.

    Args:
        tasks: number or names of the tasks.
        leak: ℓ, the share of every gradient that passes whatever its sign; 0 is the paper's method, 1 the plain sum.
    """

    def __init__(self, tasks: int | Sequence[str], leak: Annotated[float, Ge(0), Le(1)] = 0.0):
        super().__init__(tasks)
        if not 0 <= leak <= 1:
            raise ValueError(f"leak: {leak} is not in [0, 1]")
        self.leak = leak

    def aggregate(self, jacobian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        total, magnitude = jacobian.sum(0), jacobian.abs().sum(0)
        purity = torch.where(magnitude > 0, 0.5 * (1 + total / magnitude), torch.full_like(total, 0.5))
        draw = torch.rand(total.shape, generator=self.generator(total.device), device=total.device, dtype=total.dtype)
        kept = torch.where(purity > draw, jacobian.clamp(min=0).sum(0), jacobian.clamp(max=0).sum(0))
        return self.leak * total + (1 - self.leak) * kept
