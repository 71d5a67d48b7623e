"""GradDrop: gradient sign dropout; each shared parameter keeps the gradients of one sign.

Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020, eq. 1-3:

    P = ½ (1 + Σ_i g_i / Σ_i |g_i|),   M_i = 1[P > U]·1[g_i > 0] + 1[P < U]·1[g_i < 0],   U ~ Uniform(0, 1),
    d = Σ_i (ℓ_i + (1 − ℓ_i) M_i) g_i       element by element, with leak ℓ = 0.

By default the rule acts on each parameter's gradient, as in the CAGrad and Nash-MTL codes.

The paper masks the gradients of the shared activations z instead: `step.gradients=features`. The sign and size of an
element are then taken from Σ_n sign(z_n) g_in, summed over the batch. One draw per element masks all samples.
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
        leak: ℓ, the share of every gradient that passes with any sign. 0 is the paper's method, 1 is the plain sum.
    """

    def __init__(self, tasks: int | Sequence[str], leak: Annotated[float, Ge(0), Le(1)] = 0.0):
        super().__init__(tasks)
        self.leak = leak

    def aggregate(self, jacobian: Tensor, present: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        # `present` is not read: the row of an absent task is 0, and so has neither a vote nor a share.
        if features is None:
            votes = jacobian
        else:  # (T, F): gradients for |z|. These can be summed over samples whose activations have different signs.
            jacobian = jacobian.view(self.tasks, *features.shape)
            votes = (features.sign() * jacobian).sum(1)
        total, magnitude = votes.sum(0), votes.abs().sum(0)
        # An element whose gradients are all 0 has no sign; its purity ½ changes nothing.
        purity = torch.where(magnitude > 0, 0.5 * (1 + total / magnitude), torch.full_like(total, 0.5))
        draw = torch.rand(total.shape, generator=self.generator(total.device), device=total.device, dtype=total.dtype)
        # Keep the positive gradients with probability P, otherwise the negative ones.
        kept = torch.where(purity > draw, votes > 0, votes < 0).to(jacobian)
        if features is not None:
            kept = kept.unsqueeze(1)
        return ((self.leak + (1 - self.leak) * kept) * jacobian).sum(0).flatten()
