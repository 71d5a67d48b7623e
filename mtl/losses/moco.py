"""MoCo: multi-objective gradient correction; MGDA's weights, computed from moving averages of the gradients.

Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach", ICLR 2023,
eq. 9-12. Every task gradient has a tracker y_i:

    y_i ← y_i − β_t (y_i − ĝ_i),    λ ← Π_simplex(λ − γ_t (Y Yᵀ + ρI) λ),    d = Yᵀ λ.

β_t = β/t^σ and γ_t = γ/t^σ, with β = 0.5, γ = 0.1, σ = 0.5, ρ = 0. y starts at 0 and λ at 1/T. The trackers hold T×P
numbers. Heads get the gradient of their own loss.

With `normalise` each gradient first gets the length of its loss, ĝ_i = L_i g_i/‖g_i‖, as in the authors' NYUv2 runs.
Otherwise ĝ_i = g_i. The authors' code, derived from CAGrad's, takes a softmax where the paper projects; we project.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from mtl.losses.base import JacobianAggregation, among_present
from mtl.losses.solvers import double, project_on_simplex


class MoCo(JacobianAggregation):
    """direction = Yᵀ λ.

    Args:
        beta: β, rate of the trackers.
        gamma: γ, step size of λ.
        sigma: σ, decay of β and γ over the steps.
        rho: ρ, pull of λ towards 1/T.
        normalise: first give each gradient the length of its loss.
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
        if present is not None:  # an absent task keeps its tracker
            rate = torch.where(present, rate, 0.0)
        trackers.lerp_(jacobian, rate[:, None])
        # The T×T part is computed in double precision: the projection compares small differences.
        G, old = double(trackers @ trackers.T), double(self.mixture)
        share, kept = among_present(old, present)
        new = project_on_simplex(share - self.gamma * decay * (G @ share + self.rho * share), present)
        self.mixture.copy_(new if present is None else torch.where(present, new * kept, old))
        weights = new.to(jacobian)
        return weights @ trackers, weights
