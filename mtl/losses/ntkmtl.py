"""NTKMTL: balances the tasks' convergence speeds, which are eigenvalues of their neural tangent kernels.

Qin et al., "NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel Perspective", NeurIPS
2025. The convergence speed of task i is the largest eigenvalue λ_i of its kernel J_i J_iᵀ. With one group of samples
(n = 1) the kernel is the scalar ‖g_i‖², and

    w_i = (Σ_j λ_j / λ_i)^p,   λ_i = ‖g_i‖²,   d = Σ_i w_i g_i.

p = ½ (¾ for NYUv2). Heads get the gradient of their own loss. `max_norm` = 1 is the authors' clip of the shared
gradient.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.solvers import double


class NTKMTL(GramianWeighting):
    """weights = (tr G / G_ii)^p.

    Args:
        power: p; 0 is equal weighting, and ½ gives all weighted gradients the same norm.
        max_norm: clip of the shared gradient's norm; None does not clip.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        power: Annotated[float, Ge(0)] = 0.5,
        max_norm: Annotated[float, Gt(0)] | None = 1.0,
    ):
        super().__init__(tasks)
        self.power, self.max_norm = power, max_norm

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        squares = double(gramian).diagonal()
        # A zero gradient stays zero under any weight, so 1 is as good as the infinite one of the formula.
        return masked(torch.where(squares > 0, (squares.sum() / squares) ** self.power, 1.0), present)
