"""ConsMTL: consistent multi-task learning; the heads, too, turn so that the tasks' feature gradients agree.

Qin, Wang, Yan, "Towards Consistent Multi-Task Learning: Unlocking the Potential of Task-Specific Parameters", CVPR
2025. The shared parameters follow FairGrad with α = 2, G w = w^{−1/2}. Head i follows

    ∇_i L_i + clip(∇_i [−λ ⟨∂L_i/∂z, sg Σ_j w_j ∂L_j/∂z⟩], 0.1 ‖∇_i L_i‖),

∇_i being the gradient for the head's parameters and z the features. λ = 1 (NYUv2; 50 for Cityscapes and CelebA, 1e-3
for QM9), the clip 0.1. The authors' code selects the data set by commented-out lines; here these are two options.
`max_norm` = 1 is their clip of the shared gradient. A second derivative of each head is needed.
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
        tasks: number or names of the tasks.
        strength: λ.
        clip: longest extra gradient of a head, as a share of its own gradient's norm.
        max_norm: clip of the shared gradient's norm; None does not clip.
    """

    claims = ("non_conflicting",)  # what is added to the heads has another scale than their own gradients

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
        weights: Tensor | None = None,
        losses: Sequence[Tensor] = (),
        features: Tensor | None = None,
        heads: Sequence[Sequence[nn.Parameter]] = (),
    ) -> HeadGradients:
        if features is None:
            raise ValueError("features: ConsMTL needs the tensor that all heads start from")
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
    norms = [g.detach().norm() for g in gradients if g is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())
