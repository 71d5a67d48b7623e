"""ConsMTL: consistent multi-task learning; the heads, too, are trained so that the tasks' feature gradients agree.

Qin, Wang, Yan, "Towards Consistent Multi-Task Learning: Unlocking the Potential of Task-Specific Parameters", CVPR
2025. The shared parameters follow FairGrad with α = 2, G w = w^{−1/2}. Head i follows

    ∇_i L_i + clip(∇_i [−λ ⟨∂L_i/∂z, sg Σ_j w_j ∂L_j/∂z⟩], 0.1 ‖∇_i L_i‖).

∇_i is the gradient for the head's parameters, z the features, and sg stops the gradient. The extra term needs a
second derivative of each head. λ = 1 (NYUv2; 50 for Cityscapes and CelebA, 1e-3 for QM9). The clip is 0.1. `max_norm`
= 1 is the authors' clip of the shared gradient. Their code selects the data set by commented-out lines; here λ and
the clip are options.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from mtl.losses.base import HeadGradients
from mtl.losses.fairgrad import FairGrad


class ConsMTL(FairGrad):
    """weights = FairGrad's; head_gradients = their own and the clipped pull towards the common feature gradient.

    Args:
        strength: λ.
        clip: largest norm of a head's extra gradient, as a share of the norm of its own gradient.
        max_norm: clip of the shared gradient's norm; None does not clip.
    """

    # FairGrad is also scale free. ConsMTL is not: a head's extra gradient does not scale like its own gradient.
    claims = ("non_conflicting",)

    def __init__(
        self,
        tasks: int | Sequence[str],
        strength: Annotated[float, Ge(0)] = 1.0,
        clip: Annotated[float, Ge(0)] = 0.1,
        max_norm: Annotated[float, Gt(0)] | None = 1.0,
    ):
        super().__init__(tasks, alpha=2.0, max_norm=max_norm)
        self.strength, self.clip = strength, clip

    def head_gradients(
        self,
        own: HeadGradients,
        weights: Tensor,
        losses: Sequence[Tensor],
        features: Tensor | None,
        heads: Sequence[Sequence[nn.Parameter]],
    ) -> HeadGradients:
        if features is None:
            raise ValueError("features: ConsMTL needs the tensor that all heads start from")
        # An absent task's loss is a constant: it has no slope.
        slopes = [
            torch.autograd.grad(loss, features, create_graph=True)[0] if loss.requires_grad else None for loss in losses
        ]
        common = sum(w * s.detach() for w, s in zip(weights, slopes, strict=True) if s is not None)
        found = []
        for slope, head, gradients in zip(slopes, heads, own, strict=True):
            if slope is None or not head:
                found.append(gradients)
                continue
            agreement = -self.strength * (slope * common).sum()
            extra = torch.autograd.grad(agreement, head, retain_graph=True, allow_unused=True)
            # The clip is one factor for the whole head, so the direction of the extra gradient stays.
            limit = self.clip * _norm(gradients)
            norm = _norm(extra)
            factor = torch.where(norm > limit, limit / norm.clamp(min=1e-30), 1.0)
            found.append([_sum(g, factor, e) for g, e in zip(gradients, extra, strict=True)])
        return found


def _sum(own: Tensor | None, factor: Tensor, extra: Tensor | None) -> Tensor | None:
    if extra is None:
        return own
    return factor * extra if own is None else factor * extra + own


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """() the norm of a head's gradients, taken as one vector."""
    norms = [g.detach().norm() for g in gradients if g is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())
