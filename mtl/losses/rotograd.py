"""RotoGrad: learned rotations that align the tasks' feature gradients, and lengths that are homogenised.

Javaloy & Valera, "RotoGrad: Gradient Homogenization in Multitask Learning", ICLR 2022, algorithm 1: head i sees R_i z
with R_i a rotation. With g_i the gradient of the features z,

    d = C Σ_i g_i/‖g_i‖,   C = Σ_i α_i ‖g_i‖,   α_i ∝ ‖g_i‖ / ‖g_i⁰‖,

where ‖g_i⁰‖ is the length in the first step, taken anew after `burn_in` = 20 steps. R_i descends on Σ_n ‖R_i v_n − R_i⁻
g_in‖² (R_i⁻ is constant), where v is the mean of the gradients at equal lengths. We follow the authors' code here. The
paper's objective, an inner product, differs by a constant, because R_i keeps lengths. R_i = exp(A_i − A_iᵀ) starts at
the identity. The rotations should learn more slowly than the network (`lr`). Predictions need them, and they are in
the strategy's state. Heads get their own gradient.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.losses.arguments import integer
from mtl.losses.base import JacobianAggregation, masked


class RotoGrad(JacobianAggregation):
    """direction of the features = C Σ_i g_i/‖g_i‖; its own parameters turn each head's view of the features.

    Args:
        tasks: number or names of the tasks.
        features: width F of the features; the engine knows it.
        burn_in: steps after which the reference lengths are taken.
        lr: learning rate of the rotations; None follows the optimizer's.
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
        """Create the rotations of features of this width.

        Raises:
            ValueError: the width is no integer of at least 2, below which there is nothing to rotate.
        """
        if (features := integer("features", features)) < 2:
            raise ValueError(f"features: {features}; a rotation needs a width of at least 2")
        self.generators = nn.Parameter(torch.zeros(self.tasks, features, features))

    def rotations(self) -> Tensor:
        """(T, F, F) the orthogonal matrices R_i."""
        return torch.matrix_exp(self.generators - self.generators.mT)

    def views(self, features: Tensor) -> list[Tensor]:
        rotations = self.rotations().detach().to(features.dtype)
        return [features @ rotation.T for rotation in rotations]

    def aggregate(
        self, jacobian: Tensor, present: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        norms = jacobian.norm(dim=1)
        fresh = (self.reference.isnan() | (self.steps == self.burn_in)) & (norms > 0)
        self.reference.copy_(torch.where(fresh, norms, self.reference))
        self.steps += 1
        safe = torch.where(norms > 0, norms, 1.0)
        unit = jacobian / safe[:, None]
        pace = masked((norms / self.reference).nan_to_num(0.0), present)
        length = (pace * norms).sum() / pace.sum().clamp(min=1e-12)

        on = masked(torch.ones_like(norms), present)
        share = on / on.sum().clamp(min=1)
        mean = (share @ jacobian).norm() * (share @ unit)  # v: all gradients at the length of their mean
        v, own = (x.to(self.generators) for x in (mean.view_as(features), jacobian.view(self.tasks, *features.shape)))
        with torch.enable_grad():
            rotations = self.rotations()
            gap = v @ rotations.mT - own @ rotations.detach().mT
            objective = masked(gap.square().sum(2).mean(1), present).sum()
            (gradient,) = torch.autograd.grad(objective, self.generators)
        if self.generators.grad is None:
            self.generators.grad = torch.zeros_like(self.generators)
        self.generators.grad += gradient  # in the parameter's own memory layout, as fused optimizers need it
        return length * on @ unit, on * length / safe
