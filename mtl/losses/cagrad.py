"""CAGrad: conflict-averse gradient descent, the best worst-case improvement near the mean gradient.

Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, eq. 3 and algorithm 1:

    d = argmax min_i g_i·d  over ‖d − g₀‖ ≤ c‖g₀‖,  g₀ = (1/T) Σ_i g_i;   d = g₀ + c‖g₀‖ g_w / ‖g_w‖.

c = 0.4 (NYUv2; 0.5 in the toy). c = 0 is the mean gradient; large c tends to MGDA. Heads get the gradient of their
own loss. The authors' code also divides by 1 + c² (`rescale: true`).

The problem is solved exactly here (mtl/losses/solvers.py). The authors' solver, SLSQP, stops at its starting point w
= 1/T if the gradients are small.
"""

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked, uniform
from mtl.losses.host import on_host
from mtl.losses.solvers import double, steepest_worst_case


class CAGrad(GramianWeighting):
    """weights = 1/T + c‖g₀‖/‖g_w‖ w.

    Args:
        c: radius of the ball around the mean gradient, as a share of that gradient's norm.
        rescale: divide the step by 1 + c², as the authors' code does.
    """

    claims = ("scale_free",)

    def __init__(self, tasks: int | Sequence[str], c: Annotated[float, Ge(0)] = 0.4, rescale: bool = False):
        super().__init__(tasks)
        self.c, self.rescale = c, rescale

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        mean = uniform(present, double(gramian)[0])
        slopes = double(gramian) @ mean  # g_i·g₀
        length = (mean @ slopes).clamp(min=0).sqrt()  # ‖g₀‖; rounding can make its square slightly negative
        # d = g₀ plus the best displacement in the ball of radius c‖g₀‖.
        weights = mean + steepest_worst_case(gramian, slopes, self.c * length, present)
        return masked(weights / (1 + self.c**2) if self.rescale else weights, present)
