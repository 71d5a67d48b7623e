"""Rep-MTL: regularises how salient the shared representation is to each task, on top of equal weighting.

Wang et al., "Rep-MTL: Unleashing the Power of Representation-level Task Saliency for Multi-Task Learning", ICCV 2025.
With the task saliencies S_i = ∂L_i/∂z of the features z,

    L = Σ_i L_i + λ_tsr L_tsr + λ_csa L_csa.

Task-specific saliency regulation: P_i = |S̄_i| / Σ_j |S̄_j| with S̄ the mean over channels, and L_tsr the mean
entropy of P, so that each position serves one task. Cross-task saliency alignment: the affinities M_i = s_i s_iᵀ of a
sample's saliency s_i are drawn to the sample's anchor (that of the tasks' mean saliency) and away from other samples'
anchors,

    L_csa = −(1/B) Σ_b Σ_i log [exp(sim(M_b, M_bi)/τ) / Σ_{k≠b} exp(sim(M_b, M_k)/τ)],

where the similarity of two normalised outer products is the squared cosine of their vectors. λ = 0.9 each. τ = 1 is our
choice: the paper's value could not be found out, and there is no public code. Features (N, F) have one position a
sample; the paper has feature maps, and log-losses (`step.transform=log`). The terms need second derivatives of heads
and backbone.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.losses.base import LossWeighting, masked


class RepMTL(LossWeighting):
    """L = Σ_i L_i + λ_tsr L_tsr + λ_csa L_csa.

    Args:
        tasks: number or names of the tasks.
        specific: λ_tsr.
        alignment: λ_csa.
        temperature: τ; the default is this project's, not the paper's.
    """

    flat = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        specific: Annotated[float, Ge(0)] = 0.9,
        alignment: Annotated[float, Ge(0)] = 0.9,
        temperature: Annotated[float, Gt(0)] = 1.0,
    ):
        super().__init__(tasks)
        self.specific, self.alignment, self.temperature = specific, alignment, temperature

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(losses, present).sum()

    def regulariser(
        self, losses: Sequence[Tensor], features: Tensor | None, present: Tensor | None = None
    ) -> Tensor | None:
        if features is None:
            raise ValueError("features: Rep-MTL needs the tensor that all heads start from")
        if not features.requires_grad:  # a frozen backbone: no representation is learned that could be regularised
            return None
        known = [k for k, loss in enumerate(losses) if loss.requires_grad]
        if not known:
            return None
        on = torch.ones(len(losses), dtype=torch.bool, device=features.device) if present is None else present
        if len(known) < len(losses):
            on = on[known]
        # (T, N, F), with the graph that leads on to heads and backbone; an absent task's row is 0.
        rows = [torch.autograd.grad(losses[k], features, create_graph=True)[0] for k in known]
        saliency = torch.where(on[:, None, None], torch.stack(rows), 0.0)
        return self.specific * _entropy(saliency) + self.alignment * self._alignment(saliency, on)

    def _alignment(self, saliency: Tensor, on: Tensor) -> Tensor:
        anchors = F.normalize(saliency.sum(0), dim=1)  # (N, F)
        terms = -(F.normalize(saliency, dim=2) * anchors).sum(2).square() / self.temperature  # (T, N)
        if len(anchors) > 1:
            itself = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
            others = (anchors @ anchors.T).square() / self.temperature
            terms = terms + torch.logsumexp(others.masked_fill(itself, -torch.inf), 1)
        return torch.where(on[:, None], terms, 0.0).sum(0).mean()


def _entropy(saliency: Tensor) -> Tensor:
    strength = saliency.mean(2).abs()  # (T, N)
    share = strength / strength.sum(0).clamp(min=1e-30)
    return -torch.special.xlogy(share, share.clamp(min=1e-30)).sum(0).mean()
