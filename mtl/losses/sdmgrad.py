"""SDMGrad: direction-oriented multi-objective descent, MGDA pulled towards the mean gradient, with double sampling.

Xiao, Ban, Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms", NeurIPS 2023,
algorithm 1: with three independent batches and g₀ the mean gradient, S times

    w ← Π_simplex(w − β [J₁ (J₂ᵀ w + λ g₀₂)]),      then      d = (J₃ᵀ w + λ g₀₃) / (1 + λ).

λ = 0.3, S = 20, β = 10 with momentum 0.5, w warm-started at 1/T, and J₁J₂ᵀ divided by the square of its mean root
diagonal before: all as in the authors' code, which however evaluates all three Jacobians on one batch by an aliased
buffer. Here they are the thirds of a batch. Heads get their own gradient, the mean over the three.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from mtl.losses.base import GramianWeighting, masked, uniform
from mtl.losses.solvers import double, project_on_simplex


class SDMGrad(GramianWeighting):
    """weights = (w + λ/T) / (1 + λ), Σ = 1.

    Args:
        tasks: number or names of the tasks.
        regularisation: λ; 0 is stochastic MGDA, large values tend to the mean gradient.
        lr: β, step size of w.
        momentum: of these steps.
        steps: S.
    """

    samples = 3

    def __init__(
        self,
        tasks: int | Sequence[str],
        regularisation: Annotated[float, Ge(0)] = 0.3,
        lr: Annotated[float, Gt(0)] = 10.0,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.5,
        steps: Annotated[int, Ge(1)] = 20,
    ):
        super().__init__(tasks)
        self.regularisation, self.step_size, self.momentum, self.steps = regularisation, lr, momentum, steps
        self.register_buffer("mixture", torch.full((self.tasks,), 1 / self.tasks, dtype=torch.float64))

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        G = double(gramian)
        roots = (G.diagonal().clamp(min=0) + 1e-4).sqrt()  # two batches: the diagonal may be negative
        mean = uniform(present, G[0])
        scale = (roots * mean).sum()
        G = G / scale**2
        pull = self.regularisation * (G @ mean)
        w = masked(self.mixture, present)
        share = w.sum()  # absent tasks keep theirs
        w = torch.where(share > 0, w / share, mean)
        velocity = None
        for _ in range(self.steps):
            gradient = torch.addmv(pull, G, w)
            velocity = gradient if velocity is None else gradient.add_(velocity, alpha=self.momentum)
            w = project_on_simplex(torch.add(w, velocity, alpha=-self.step_size), present)
        held = w if present is None else torch.where(present, w * share, self.mixture)
        self.mixture.copy_(held)
        return (w + self.regularisation * mean) / (1 + self.regularisation)
