"""Rep-MTL: equal weighting, and a regulariser on how salient the shared representation is to each task.

Wang et al., "Rep-MTL: Unleashing the Power of Representation-level Task Saliency for Multi-Task Learning", ICCV 2025.
With the task saliencies S_i = ∂L_i/∂z of the features z,

    L = Σ_i L_i + λ_tsr L_tsr + λ_csa L_csa.

Task-specific saliency regulation: P_i = |S̄_i| / Σ_j |S̄_j|, where S̄ is the mean over channels. L_tsr is the mean
entropy of P, so that each position serves one task.

Cross-task saliency alignment: a sample's saliency s_i has the affinity M_i = s_i s_iᵀ. The mean saliency of the
sample's tasks gives the sample's anchor. Affinities are pulled towards the own anchor and away from other samples'
anchors:

    L_csa = −(1/B) Σ_b Σ_i log [exp(sim(M_b, M_bi)/τ) / Σ_{k≠b} exp(sim(M_b, M_k)/τ)].

The similarity of two normalised outer products is the squared cosine of their vectors. Both λ are 0.9. The terms need
second derivatives of heads and backbone.

Two choices are ours. τ = 1: we could not find the paper's value, and there is no public code. Features (N, F) have
one position per sample; the paper has feature maps. It also uses log-losses (`step.transform=log`).
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
        if not features.requires_grad:  # a frozen backbone: the representation is not learned, so nothing to regularise
            return None
        known = [k for k, loss in enumerate(losses) if loss.requires_grad]
        if not known:
            return None
        on = torch.ones(len(losses), dtype=torch.bool, device=features.device) if present is None else present
        if len(known) < len(losses):
            on = on[known]
        # (T, N, F). `create_graph` keeps the graph, so the terms have gradients for heads and backbone.
        # An absent task's row is 0.
        rows = [torch.autograd.grad(losses[k], features, create_graph=True)[0] for k in known]
        saliency = torch.where(on[:, None, None], torch.stack(rows), 0.0)
        return self.specific * _entropy(saliency) + self.alignment * self._alignment(saliency, on)

    def _alignment(self, saliency: Tensor, on: Tensor) -> Tensor:
        """() L_csa for saliencies (T, N, F); `on` (T,) bool marks the present tasks."""
        anchors = F.normalize(saliency.sum(0), dim=1)  # (N, F)
        terms = -(F.normalize(saliency, dim=2) * anchors).sum(2).square() / self.temperature  # (T, N)
        if len(anchors) > 1:  # a single sample has no other anchors: the sum in the denominator is empty
            itself = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
            others = (anchors @ anchors.T).square() / self.temperature
            terms = terms + torch.logsumexp(others.masked_fill(itself, -torch.inf), 1)
        return torch.where(on[:, None], terms, 0.0).sum(0).mean()


def _entropy(saliency: Tensor) -> Tensor:
    """() L_tsr for saliencies (T, N, F)."""
    strength = saliency.mean(2).abs()  # (T, N)
    share = strength / strength.sum(0).clamp(min=1e-30)
    return -torch.special.xlogy(share, share.clamp(min=1e-30)).sum(0).mean()
