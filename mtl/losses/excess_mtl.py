"""ExcessMTL: tasks with a large excess risk get more weight; robust to noisy labels.

He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, eq. 5-7 and algorithm 1. The AdaGrad sums S_i ←
S_i + g_i² serve as a diagonal Hessian. They give an estimate of the excess risk of task i:

    E_i = Σ_p g_ip² / √(S_ip + 1e-7),     w_i ← w_i exp(η E_i / E_i(0)),  normalised to Σ w = T.

The shared parameters follow d = Σ w_i g_i; heads follow w_i ∇L_i. η = 0.01. w starts at 1, and the first step only
records E(0). The sums hold T×P numbers.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from mtl.losses.base import JacobianAggregation, masked, renormalised


class ExcessMTL(JacobianAggregation):
    """direction = Σ_i w_i g_i.

    Args:
        eta: η, step size of the weights.
    """

    has_weights = True
    lazy = ("squares",)
    heads = "weighted"

    def __init__(self, tasks: int | Sequence[str], eta: Annotated[float, Gt(0)] = 0.01):
        super().__init__(tasks)
        self.eta = eta
        self.register_buffer("task_weights", torch.ones(self.tasks, dtype=torch.float64))
        self.register_buffer("initial", torch.full((self.tasks,), torch.nan, dtype=torch.float64))

    def aggregate(self, jacobian: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        squares = self.kept("squares", jacobian)
        on = torch.ones(self.tasks, dtype=torch.bool, device=jacobian.device) if present is None else present
        squared = jacobian * jacobian
        squares += squared  # an absent task's row is 0
        excess = (squared / (squares + 1e-7).sqrt()).sum(1).double()
        first = self.initial.isnan() & on & (excess > 0)  # E(0) of a task: in the first step with labels
        self.initial.copy_(torch.where(first, excess, self.initial))
        growth = torch.where(on & ~first, (self.eta * excess / self.initial).nan_to_num(0.0).exp(), 1.0)
        moved = self.task_weights * growth
        # Absent tasks keep their weight. The weights of the present tasks keep their sum.
        moved = moved * masked(self.task_weights, present).sum() / masked(moved, present).sum().clamp(min=1e-12)
        self.task_weights.copy_(torch.where(on, moved, self.task_weights))
        weights = renormalised(self.task_weights, present).to(jacobian)
        return weights @ jacobian, weights
