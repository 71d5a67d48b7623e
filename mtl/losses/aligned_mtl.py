"""Aligned-MTL: aligns the principal components of the gradient matrix, so that its condition number is 1.

Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, eq. 9-11 and algorithm 1: with
G = V Λ Vᵀ over the non-zero eigenvalues and the tasks' preferences p = 1,

    d = σ Jᵀ V Λ^{−½} Vᵀ p,     σ = √λ_min;

`scale=median` and `rmse` take the root of the median or the mean of the eigenvalues instead (the authors' code). The
rank is that of the Gramian at its own precision. Heads get their own gradient.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked
from mtl.losses.solvers import decomposable, double


class AlignedMTL(GramianWeighting):
    """weights = σ V Λ^{−½} Vᵀ 1.

    Args:
        tasks: number or names of the tasks.
        scale: to which singular value all are set: min is the paper's; median (the lower one of an even number); rmse.
    """

    claims = ("scale_free",)

    def __init__(self, tasks: int | Sequence[str], scale: Literal["min", "median", "rmse"] = "min"):
        super().__init__(tasks)
        self.scale = scale

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        eps = torch.finfo(gramian.dtype).eps
        values, vectors = torch.linalg.eigh(decomposable(double(gramian)))
        kept = values > values[-1] * len(values) * eps
        rank = kept.sum().clamp(min=1)
        if self.scale == "min":
            target = torch.where(kept, values, torch.inf).min()
        elif self.scale == "median":  # eigenvalues ascend, so the kept ones are the last `rank`
            target = values.gather(0, (len(values) - rank + (rank - 1) // 2)[None])[0]
        else:
            target = torch.where(kept, values, 0.0).sum() / rank
        inverse = torch.where(kept, (target / torch.where(kept, values, 1.0)).sqrt(), 0.0)
        ones = masked(torch.ones_like(values), present)
        weights = vectors @ (inverse * (vectors.T @ ones))
        return masked(torch.where(values[-1] > 0, weights, ones), present)
