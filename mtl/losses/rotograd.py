"""RotoGrad: learned rotations that align the tasks' feature gradients, and one length for all of them.

Javaloy & Valera, "RotoGrad: Gradient Homogenization in Multitask Learning", ICLR 2022, algorithm 1. Head i receives
R_i z with a rotation R_i. With the gradient g_i of the features z,

    d = C Σ_i g_i/‖g_i‖,   C = Σ_i α_i ‖g_i‖,   α_i ∝ ‖g_i‖ / ‖g_i⁰‖.

‖g_i⁰‖ is the length in the first step. It is measured again after `burn_in` = 20 steps. R_i descends on Σ_n ‖R_i v_n
− R_i⁻ g_in‖². R_i⁻ is constant. v is the mean of the gradients at equal lengths. We follow the authors' code here.
The paper's objective, an inner product, differs by a constant, because R_i keeps lengths.

R_i = exp(A_i − A_iᵀ) starts at the identity. The rotations should learn more slowly than the network (`lr`).
Predictions need the rotations too, so keep the strategy's state with the model. Heads get the gradient of their own
loss.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.arguments import integer
from mtl.losses.base import JacobianAggregation, masked


class RotoGrad(JacobianAggregation):
    """direction for the features = C Σ_i g_i/‖g_i‖. Its parameters rotate the features that each head receives.

    Args:
        features: width F of the features. The engine fills it in.
        burn_in: number of steps after which the reference lengths are measured again.
        lr: learning rate of the rotations; None uses the optimizer's.
    """

    has_weights = True
    gradients = "features"
    flat = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        features: Annotated[int, Ge(2)] | None = None,
        burn_in: Annotated[int, Ge(0)] = 20,
        lr: Annotated[float, Ge(0)] | None = 0.01,
    ):
        super().__init__(tasks)
        self.burn_in, self.lr = burn_in, lr
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reference", torch.full((self.tasks,), torch.nan))
        if features is not None:
            self.prepare(features)

    def prepare(self, features: int) -> None:
        """Create the rotations for features of this width.

        Raises:
            ValueError: the width is no integer of at least 2. One dimension cannot be rotated.
        """
        if (features := integer("features", features)) < 2:
            raise ValueError(f"features: {features}; a rotation needs a width of at least 2")
        self.generators = nn.Parameter(torch.zeros(self.tasks, features, features))

    def rotations(self) -> Tensor:
        """(T, F, F) the orthogonal matrices R_i."""
        return torch.matrix_exp(self.generators - self.generators.mT)

    def views(self, features: Tensor) -> list[Tensor]:
        # Detached: the losses do not train the rotations, only `aggregate` does.
        rotations = self.rotations().detach().to(features.dtype)
        return [features @ rotation.T for rotation in rotations]

    def aggregate(
        self, jacobian: Tensor, present: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        norms = jacobian.norm(dim=1)
        # The reference length of a task: from its first step, and once more after `burn_in` steps.
        fresh = (self.reference.isnan() | (self.steps == self.burn_in)) & (norms > 0)
        self.reference.copy_(torch.where(fresh, norms, self.reference))
        self.steps += 1
        safe = torch.where(norms > 0, norms, 1.0)
        unit = jacobian / safe[:, None]
        # `pace` is α before its normalisation, and `length` is C.
        pace = masked((norms / self.reference).nan_to_num(0.0), present)
        length = (pace * norms).sum() / pace.sum().clamp(min=1e-12)

        on = masked(torch.ones_like(norms), present)
        share = on / on.sum().clamp(min=1)
        mean = (share @ jacobian).norm() * (share @ unit)  # v: the gradients at the length of their mean, averaged
        v, own = (x.to(self.generators) for x in (mean.view_as(features), jacobian.view(self.tasks, *features.shape)))
        # Gradient methods run without a graph. The rotations have their own small objective, which needs one.
        with torch.enable_grad():
            rotations = self.rotations()
            gap = v @ rotations.mT - own @ rotations.detach().mT
            objective = masked(gap.square().sum(2).mean(1), present).sum()
            (gradient,) = torch.autograd.grad(objective, self.generators)
        if self.generators.grad is None:
            self.generators.grad = torch.zeros_like(self.generators)
        self.generators.grad += gradient  # added in place: fused optimizers need the parameter's own memory layout
        return length * on @ unit, on * length / safe
