"""What must not happen in silence in a step: a state spoilt by an overflow. Negative losses: `mtl.losses.negative`."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.losses.base import Strategy
from mtl.losses.negative import host, refuse_negative

__all__ = ["Untouched", "host", "refuse_negative"]


class Untouched:
    """Keeps a strategy's buffers as they were, for a step whose losses or gradients turn out not to be finite.

    A GradScaler skips such a step and goes on; a running average would never be finite again. On a CPU random numbers
    are drawn again as well. On a GPU they are used up, as the host does not know of the overflow: the next ones are
    independent of them and as good.
    """

    def __init__(self, strategy: Strategy):
        self._strategy = strategy
        self._before = [(name, b.clone()) for name, b in strategy.named_buffers() if b is not None]
        self._missing = [name for name in strategy.lazy if getattr(strategy, name) is None]
        self._draws = strategy.draws()

    def __bool__(self) -> bool:
        """Whether there is anything to restore by now."""
        return bool(self._before or self._missing or self._strategy.draws())

    @torch.no_grad()
    def unless(self, finite: Tensor) -> None:
        """Restore the buffers where `finite` () is False; the device decides, the host does not wait."""
        if host(finite[None]) == [False]:
            self._strategy.redraw(self._draws)
        now = dict(self._strategy.named_buffers())
        for name, before in self._before:
            if (buffer := now.get(name)) is not None and buffer.shape == before.shape:
                buffer.copy_(torch.where(finite, buffer, before))
        for name in self._missing:  # made in this step; every average begins with zeros
            if (buffer := now.get(name)) is not None:
                buffer.copy_(torch.where(finite, buffer, torch.zeros_like(buffer)))
