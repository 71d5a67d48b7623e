"""MoCo: multi-objective gradient correction, MGDA's weights from gradients that are tracked over steps.

Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach", ICLR 2023,
eq. 9-12: every task gradient has a tracker y_i, and

    y_i ← y_i − β_t (y_i − ĝ_i),    λ ← Π_simplex(λ − γ_t (Y Yᵀ + ρI) λ),    d = Yᵀ λ,

β_t = β/t^σ and γ_t = γ/t^σ with β = 0.5, γ = 0.1, σ = 0.5, ρ = 0; y starts at 0 and λ at 1/T. With `normalise` each
gradient is first scaled to the length of its loss, ĝ_i = L_i g_i/‖g_i‖, as in the authors' NYUv2 runs; else ĝ_i = g_i.
(Their CAGrad-derived code takes a softmax where the paper projects.) The tracker holds T×P numbers. Heads get their own
gradient.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from mtl.losses.base import JacobianAggregation
from mtl.losses.solvers import double, project_on_simplex


class MoCo(JacobianAggregation):
    """direction = Yᵀ λ.

    Args:
        tasks: number or names of the tasks.
        beta: β, rate of the trackers.
        gamma: γ, step size of λ.
        sigma: σ, decay of both over the steps.
        rho: ρ, pull of λ towards 1/T.
        normalise: scale each gradient to the length of its loss first.
    """

    has_weights = True
    lazy = ("trackers",)

    def __init__(
        self,
        tasks: int | Sequence[str],
        beta: Annotated[float, Gt(0), Le(1)] = 0.5,
        gamma: Annotated[float, Gt(0)] = 0.1,
        sigma: Annotated[float, Ge(0)] = 0.5,
        rho: Annotated[float, Ge(0)] = 0.0,
        normalise: bool = True,
    ):
        super().__init__(tasks)
        self.needs_positive = normalise
        self.beta, self.gamma, self.sigma, self.rho, self.normalise = beta, gamma, sigma, rho, normalise
        self.register_buffer("mixture", torch.full((self.tasks,), 1 / self.tasks, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

    def aggregate(
        self, jacobian: Tensor, present: Tensor | None = None, losses: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        trackers = self.kept("trackers", jacobian)
        if self.normalise:
            if losses is None:
                raise ValueError("MoCo with normalise=true needs the losses of the step")
            norms = jacobian.norm(dim=1)
            jacobian = jacobian * (losses / torch.where(norms > 0, norms, 1.0)).to(jacobian)[:, None]
        self.steps += 1
        decay = self.steps**-self.sigma
        rate = (self.beta * decay).to(jacobian).expand(self.tasks)
        if present is not None:
            rate = torch.where(present, rate, 0.0)
        trackers.lerp_(jacobian, rate[:, None])
        G, old = double(trackers @ trackers.T), double(self.mixture)
        share = old if present is None else torch.where(present, old, 0.0)
        total = share.sum().clamp(min=1e-12)
        share = share / total
        new = project_on_simplex(share - self.gamma * decay * (G @ share + self.rho * share), present)
        self.mixture.copy_(new if present is None else torch.where(present, new * total, old))
        weights = new.to(jacobian)
        return weights @ trackers, weights
