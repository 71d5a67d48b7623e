"""Aligned-MTL: gives all principal components of the gradient matrix the same length, so its condition number is 1.

Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, eq. 9-11 and algorithm 1. With
G = V Λ Vᵀ over the non-zero eigenvalues and the tasks' preferences p = 1,

    d = σ Jᵀ V Λ^{−½} Vᵀ p,     σ = √λ_min.

`scale=median` and `scale=rmse` are options of the authors' code: σ is the root of the median or of the mean
eigenvalue. An eigenvalue counts as zero if it is below the rounding error of the Gramian. Heads get the gradient of
their own loss.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.host import on_host
from mtl.losses.solvers import decomposable, double


class AlignedMTL(GramianWeighting):
    """weights = σ V Λ^{−½} Vᵀ 1.

    Args:
        scale: the common length σ of all components: min (the paper's); median (the lower of the two middle ones if
            their number is even); rmse.
    """

    claims = ("scale_free",)

    def __init__(self, tasks: int | Sequence[str], scale: Literal["min", "median", "rmse"] = "min"):
        super().__init__(tasks)
        self.scale = scale

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        eps = torch.finfo(gramian.dtype).eps
        values, vectors = torch.linalg.eigh(decomposable(double(gramian)))
        # `eps` belongs to the Gramian's own dtype, not to float64: its rounding decides which eigenvalues are real.
        kept = values > values[-1] * len(values) * eps
        rank = kept.sum().clamp(min=1)
        if self.scale == "min":
            target = torch.where(kept, values, torch.inf).min()
        elif self.scale == "median":  # eigenvalues ascend, so the kept ones are the last `rank`
            target = values.gather(0, (len(values) - rank + (rank - 1) // 2)[None])[0]
        else:
            target = torch.where(kept, values, 0.0).sum() / rank
        # σ / √λ, or 0 for an eigenvalue that counts as zero. The inner `where` avoids a division by 0.
        inverse = torch.where(kept, (target / torch.where(kept, values, 1.0)).sqrt(), 0.0)
        ones = masked(torch.ones_like(values), present)
        weights = vectors @ (inverse * (vectors.T @ ones))
        # All gradients are 0: any weights give the same step.
        return masked(torch.where(values[-1] > 0, weights, ones), present)
