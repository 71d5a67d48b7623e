"""SDMGrad: direction-oriented multi-objective descent; MGDA pulled towards the mean gradient, with double sampling.

Xiao, Ban, Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms", NeurIPS 2023,
algorithm 1. With three independent batches and the mean gradient g₀, S times

    w ← Π_simplex(w − β [J₁ (J₂ᵀ w + λ g₀₂)]),      then      d = (J₃ᵀ w + λ g₀₃) / (1 + λ).

As in the authors' code: λ = 0.3, S = 20, and β = 10 with momentum 0.5. w starts at 1/T and is kept between the steps.
J₁J₂ᵀ is first divided by the square of its mean root diagonal. The authors' code evaluates all three Jacobians on one
batch, because of an aliased buffer. Here the three batches are the thirds of one batch. Heads get the gradient of
their own loss, averaged over the three.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from mtl.losses.base import GramianWeighting, among_present, uniform
from mtl.losses.host import on_host
from mtl.losses.solvers import double, project_on_simplex


class SDMGrad(GramianWeighting):
    """weights = (w + λ/T) / (1 + λ), Σ = 1.

    Args:
        regularisation: λ; 0 is stochastic MGDA, and large values tend to the mean gradient.
        lr: β, step size of w.
        momentum: momentum of the steps of w.
        steps: S, the number of steps of w per update.
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
        weights, mixture = self._moved(gramian, self.mixture, present)
        self.mixture.copy_(mixture)
        return weights

    @on_host
    def _moved(self, gramian: Tensor, mixture: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        G = double(gramian)
        roots = (G.diagonal().clamp(min=0) + 1e-4).sqrt()  # J₁ J₂ᵀ of two batches may have a negative diagonal
        mean = uniform(present, G[0])
        scale = (roots * mean).sum()
        # Without this, the step size β would have to fit the scale of the losses.
        G = G / scale**2
        pull = self.regularisation * (G @ mean)
        w, kept = among_present(mixture.to(G), present)
        # Momentum acts within the S steps of one update only.
        velocity = None
        for _ in range(self.steps):
            gradient = torch.addmv(pull, G, w)
            velocity = gradient if velocity is None else gradient.add_(velocity, alpha=self.momentum)
            w = project_on_simplex(torch.add(w, velocity, alpha=-self.step_size), present)
        held = w if present is None else torch.where(present, w * kept, mixture)
        return (w + self.regularisation * mean) / (1 + self.regularisation), held
