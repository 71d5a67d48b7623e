"""DualProj: the mean gradient, projected on the dual cone of the task gradients so that no task is harmed.

Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, eq. 11. They project the current
task's gradient so that no remembered task's loss grows. Quinton & Rey (2024, section 4) project the mean gradient of
several tasks:

    d = the vector nearest to (1/T) Σ_i g_i with g_i·d ≥ 0 for all i.

Heads get the gradient of their own loss.
"""

from torch import Tensor

from mtl.losses.base import GramianWeighting, masked, uniform
from mtl.losses.host import on_host
from mtl.losses.solvers import double, project_on_cone


class DualProj(GramianWeighting):
    """weights = argmin over v ≥ 1/T of vᵀGv."""

    claims = ("non_conflicting", "scale_free")

    @on_host
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(project_on_cone(gramian, uniform(present, double(gramian)[0])[None])[0], present)
