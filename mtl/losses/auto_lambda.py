"""Auto-λ: task weights learned by gradient descent on the primary tasks' loss after a look-ahead step.

Liu et al., "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR 2022, eq. 3-5. The look-ahead step θ' = θ −
η ∇Σ_i λ_i L_i uses one half of the batch. L_P is the primary tasks' loss on the other half. A finite difference gives
the gradient for λ:

    ∂L_P(θ')/∂λ_i ≈ −η [L_i(θ + ε d) − L_i(θ − ε d)] / 2ε,    d = ∇L_P(θ'),  ε = 0.01/‖d‖.

λ starts at 0.1 and follows Adam with learning rate 1e-4 (NYUv2; 3e-5 elsewhere). It is not normalised and may become
negative. All tasks are primary by default. The method needs four extra passes.

The authors draw the second batch from a separate loader; here it is the other half of the batch. They add momentum
and weight decay to the look-ahead step; here it is plain gradient descent.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked
from mtl.losses.meta import Adam, check_rate, gradients, move, tried_out


class AutoLambda(LossWeighting):
    """L = Σ_i λ_i L_i.

    Args:
        primary: names of the tasks whose loss the weights shall reduce; None means all tasks.
        init: initial λ.
        lr: learning rate of λ.

    Raises:
        ValueError: a primary task does not exist, or the list is empty.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        primary: Sequence[str] | None = None,
        init: Annotated[float, Gt(0)] = 0.1,
        lr: Annotated[float, Gt(0)] = 1e-4,
    ):
        super().__init__(tasks)
        if primary is not None and not primary:
            raise ValueError(f"primary: names no task; the tasks are {', '.join(self.names)}, and null is all of them")
        if unknown := set(primary or ()) - set(self.names):
            raise ValueError(f"primary: {sorted(unknown)[0]!r} is no task; the tasks are {', '.join(self.names)}")
        goal = [float(primary is None or name in primary) for name in self.names]
        self.register_buffer("goal", torch.tensor(goal))
        self.register_buffer("task_weights", torch.full((self.tasks,), float(init)))
        self.meta = Adam(self.tasks, lr)

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return (self.task_weights.to(losses) * masked(losses, present)).sum()

    def look_ahead(
        self,
        losses_of: Callable[[int], Tensor],
        parameters: Sequence[nn.Parameter],
        lr: float,
        present: Tensor | None = None,
    ) -> None:
        check_rate(self, lr)
        parameters = [p for p in parameters if p.requires_grad]
        with tried_out(parameters) as before:
            # θ' = θ − η ∇Σ λ_i L_i, on the first half of the batch.
            (step,) = gradients((masked(self.task_weights, present) * losses_of(0)).sum()[None], parameters)
            move(parameters, before, step, -lr)
            # d = ∇L_P(θ'), on the second half.
            (direction,) = gradients((masked(self.goal, present) * losses_of(1)).sum()[None], parameters)
            # The step θ ± ε d has the length 0.01, whatever the gradient's scale.
            epsilon = 0.01 / torch.nn.utils.get_total_norm(direction).clamp(min=1e-12)
            # The finite difference needs forward passes only, so no second derivative is computed.
            with torch.no_grad():
                move(parameters, before, direction, epsilon)
                above = losses_of(0)
                move(parameters, before, direction, -epsilon)
                below = losses_of(0)
        with torch.no_grad():
            self.task_weights.copy_(self.meta(self.task_weights, -lr * (above - below) / (2 * epsilon), present))
