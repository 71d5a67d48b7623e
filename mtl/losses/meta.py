"""Tools for methods that train their task weights by themselves, without the model's optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Adam(nn.Module):
    """Adam (Kingma & Ba, ICLR 2015) for one small vector. Its state is in buffers, so that checkpoints hold it.

    torch.optim.Adam keeps its state in a dictionary of its own. A strategy's `state_dict` would lose that.

    Args:
        size: length of the vector.
        lr: learning rate.
    """

    def __init__(self, size: int, lr: float):
        super().__init__()
        self.lr = lr
        for name in ("first", "second", "steps"):
            self.register_buffer(name, torch.zeros(size))

    def forward(self, value: Tensor, gradient: Tensor, present: Tensor | None = None) -> Tensor:
        """`value` (T,) after one step against `gradient`. Absent and non-finite entries keep their value and state."""
        finite = gradient.isfinite()  # one infinity would stay in the moving averages for ever
        present = finite if present is None else present & finite
        steps = self.steps + 1
        first = torch.lerp(self.first, gradient.to(self.first), 0.1)
        second = torch.lerp(self.second, gradient.to(self.second).square(), 0.001)
        step = first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
        # In place: the buffers must stay the same tensors, because a captured CUDA graph reads them.
        for old, new in ((self.first, first), (self.second, second), (self.steps, steps)):
            old.copy_(torch.where(present, new, old))
        return torch.where(present, value - self.lr * step.to(value), value)


def gradients(losses: Tensor, parameters: Sequence[nn.Parameter]) -> list[tuple[Tensor, ...]]:
    """The gradients of each loss (N,) for each parameter; zeros if the loss does not depend on the parameter."""
    if not losses.requires_grad:  # no task has a label in this batch, so there is no graph
        return [tuple(torch.zeros_like(p) for p in parameters) for _ in losses]
    last = len(losses) - 1
    return [
        torch.autograd.grad(loss, parameters, retain_graph=i < last, materialize_grads=True)
        for i, loss in enumerate(losses)
    ]


@torch.no_grad()
def move(parameters: Sequence[nn.Parameter], start, directions, length: Tensor | float) -> None:
    """Set parameters to start + length · direction."""
    for p, s, d in zip(parameters, start, directions, strict=True):
        p.copy_(s + length * d)


@contextmanager
def tried_out(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield copies of the parameters. Afterwards the parameters get these values back, also after an exception."""
    before = [p.detach().clone() for p in parameters]
    try:
        yield before
    finally:
        restore(parameters, before)


def check_rate(strategy: nn.Module, lr: Any) -> None:
    """Check the learning rate of a look-ahead step. A tensor is not checked.

    Raises:
        ValueError: `lr` is no finite number of at least 0.
    """
    if isinstance(lr, Tensor):
        return  # reading its value would wait for a GPU
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf:
        raise ValueError(
            f"lr: {lr!r}; {type(strategy).__name__}.look_ahead needs the optimizer's learning rate, "
            "such as optimizer.param_groups[0]['lr']"
        )


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], start: Sequence[Tensor]) -> None:
    """Set parameters to start."""
    for p, s in zip(parameters, start, strict=True):
        p.copy_(s)
