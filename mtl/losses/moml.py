"""MOML: multi-objective meta-learning of the task weights, by a look-ahead step and MGDA.

Ye et al., "Multi-Objective Meta Learning", NeurIPS 2021. A look-ahead step θ' = θ − η ∇Σ_k w_k L_k uses the weights w
= softmax(v). MGDA on the hypergradients then moves v so that all tasks' held-out losses fall. For a single look-ahead
step the hypergradients are exact inner products,

    ∂L_i(θ')/∂w_k = −η ⟨∇L_i(θ'), ∇L_k(θ)⟩,

so no second derivative is needed. v starts at 1/T and follows Adam with learning rate 1e-4. The look-ahead rate is η
= 1e-4 (NYUv2). The hypergradients are normalised to unit length before MGDA (Office). The method needs 2T extra
passes. The held-out data are the other half of the batch; the authors hold out a validation set.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from mtl.losses.base import LossWeighting, masked, softmax
from mtl.losses.host import on_host
from mtl.losses.meta import Adam, check_rate, gradients, move, tried_out
from mtl.losses.solvers import double, shortest


class MOML(LossWeighting):
    """L = Σ_i w_i L_i, w = softmax(v), Σ = 1.

    Args:
        look_ahead_lr: η, the learning rate of the look-ahead step; None uses the optimizer's current rate.
        lr: learning rate of v.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        look_ahead_lr: Annotated[float, Gt(0)] | None = 1e-4,
        lr: Annotated[float, Gt(0)] = 1e-4,
    ):
        super().__init__(tasks)
        self.look_ahead_lr = look_ahead_lr
        self.register_buffer("logits", torch.full((self.tasks,), 1 / self.tasks))
        self.meta = Adam(self.tasks, lr)

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return (softmax(self.logits, present).to(losses) * masked(losses, present)).sum()

    def look_ahead(
        self,
        losses_of: Callable[[int], Tensor],
        parameters: Sequence[nn.Parameter],
        lr: float,
        present: Tensor | None = None,
    ) -> None:
        rate = lr if self.look_ahead_lr is None else self.look_ahead_lr
        check_rate(self, rate)
        parameters = [p for p in parameters if p.requires_grad]
        with tried_out(parameters) as before:
            # `inner` is the Jacobian at θ on the first half of the batch, `outer` the one at θ' on the second.
            inner = _jacobian(losses_of(0), parameters)
            weights = softmax(self.logits, present).to(inner)
            _shift(parameters, before, weights @ inner, -rate)
            outer = _jacobian(losses_of(1), parameters)
        slopes = -rate * outer @ inner.T  # ∂L_i/∂w_k
        slopes = weights * (slopes - (slopes @ weights)[:, None])  # ∂L_i/∂v_k: the chain rule of the softmax
        norms = slopes.norm(dim=1)
        unit = slopes / norms.clamp(min=1e-30)[:, None]
        # A task without labels has the slope 0. MGDA must not take it for the shortest vector.
        some = norms > 0 if present is None else present & (norms > 0)
        mixture = on_host(shortest)(double(unit) @ double(unit).T, some).to(unit)
        self.logits.copy_(self.meta(self.logits, (mixture @ unit).to(self.logits), present))


def _jacobian(losses: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """(T, P) the gradients, at least in single precision: in half precision their inner products would overflow."""
    rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients(losses, parameters)])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _shift(parameters, start, direction: Tensor, length: float) -> None:
    """Set parameters to start + length · direction, where the direction is one vector (P,)."""
    pieces = direction.split([p.numel() for p in parameters])
    move(parameters, start, [piece.view(p.shape) for p, piece in zip(parameters, pieces, strict=True)], length)
