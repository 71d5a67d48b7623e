"""GradNorm: task weights that give every task the gradient norm its training progress calls for.

Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", ICML 2018, eq.
1-2 and algorithm 1. With n_i = ‖g_i‖ and the inverse training rate r_i = (L_i/L_i(0)) / mean_j (L_j/L_j(0)),

    w ← w − η ∇_w Σ_i |w_i n_i − Ḡ r_i^α|,   Ḡ = mean_i w_i n_i (target held constant),   then Σ_i w_i = T.

α = 1.5 and η = 0.025 (NYUv2). Shared parameters and heads follow Σ w_i L_i, with the weights before the update.

- The norms are taken over all shared parameters. The paper takes the last shared layer only, to save time.
  `step.gradients=features` takes the norms at that layer's output, which costs no more.
- A weight stays above 1e-4, because nothing in the rule keeps it positive.

`mean=geometric` follows L = Π_i L_i^{w_i/Σw} with the same w. Yun & Cho, ICCV 2023 (AMTL), do this with other
weights. Task i's gradient then counts w_i/Σw · L/L_i. No paper says which norms to balance in that case; here they
stay the norms of w_i g_i.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.losses.base import FLOOR, GramianWeighting, Mean, count, logs, masked, renormalised
from mtl.losses.solvers import double


class GradNorm(GramianWeighting):
    """weights = w with Σ w = T; with mean=geometric w_i/Σw · L/L_i.

    Args:
        alpha: α, strength of the pull towards equal training rates.
        lr: η, step size of the weights.
        mean: how the weighted losses are combined.
    """

    heads = "weighted"
    needs_positive = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        alpha: Annotated[float, Ge(0)] = 1.5,
        lr: Annotated[float, Gt(0)] = 0.025,
        mean: Mean = "arithmetic",
    ):
        super().__init__(tasks)
        self.alpha, self.step_size, self.mean = alpha, lr, mean
        self.register_buffer("task_weights", torch.ones(self.tasks, dtype=torch.float64))
        self.register_buffer("initial", torch.full((self.tasks,), torch.nan, dtype=torch.float64))

    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        if losses is None:
            raise ValueError("GradNorm needs the losses of the step")
        on = torch.ones_like(losses, dtype=torch.bool) if present is None else present
        norms, losses = double(gramian).diagonal().clamp(min=0).sqrt(), double(losses)
        # L(0) of a task is its loss in the first step in which it has labels.
        self.initial.copy_(torch.where(self.initial.isnan() & on, losses, self.initial))
        old = renormalised(self.task_weights, present).clone()
        number = count(present, old)
        progress = torch.where(on, losses / self.initial.clamp(min=1e-12), 0.0)
        rate = progress / (progress.sum() / number).clamp(min=1e-12)
        target = (old * norms).sum() / number * rate**self.alpha
        # The target is constant, so the gradient of |w n − target| for w is n times a sign. The lower bound is ours.
        moved = (old - self.step_size * norms * (old * norms - target).sign()).clamp(min=1e-4)
        # Absent tasks keep their weight. The weights of the present tasks keep their sum.
        moved = moved * (self.task_weights * on).sum() / (moved * on).sum().clamp(min=1e-12)
        self.task_weights.copy_(torch.where(on, moved, self.task_weights))
        if self.mean == "arithmetic":
            return old
        # ∂L/∂L_i of the geometric mean, computed from logarithms as in `combine`. A loss of 0 has none and weighs 0.
        share, log = old / old.sum().clamp(min=FLOOR), logs(losses, present)
        return masked(share * ((share * log).sum() - log).exp(), losses >= FLOOR)
