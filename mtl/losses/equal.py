"""Equal weighting (EW, linear scalarisation, unitary scalarisation): the sum of the losses, L = Σ_i L_i.

Defended by Kurin et al., "In Defense of the Unitary Scalarization for Deep Multi-Task Learning", NeurIPS 2022. We
take the sum. With the mean, the same learning rate would give a step T times smaller.
"""

from torch import Tensor

from mtl.losses.base import LossWeighting, masked


class Equal(LossWeighting):
    """L = Σ_i L_i."""

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(losses, present).sum()
