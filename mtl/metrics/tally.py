"""Sums that grow on the device during an epoch, and are read once at its end.

Reading a number from a GPU makes the host wait until all queued work is done. So nothing is read in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Summed(Protocol):
    """What a `Tally` adds up: a metric, or one metric of several tasks at once."""

    def zero(self) -> Tensor:
        """The state before the first batch."""
        ...

    def update(self, state: Tensor, prediction: Any, target: Any) -> None:
        """Add a batch to the state, in place."""
        ...


class Tally:
    """Named sums and metric states on one device. The host reads all of them in a single transfer.

    Args:
        device: the device of everything that is added.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._states: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` to the sum called `name`. It may have any shape, but the same one at every call."""
        self.add_all({name: value})

    def add_all(self, values: Mapping[str, Tensor]) -> None:
        """As `add`, for several sums. On a GPU it takes one kernel if all values are floating-point numbers."""
        sums, further = [], []
        for name, value in values.items():
            # Counts stay integers: float32 cannot count beyond 2²⁴.
            value = value.detach().float() if value.is_floating_point() else value.detach().long()
            if name in self._states:
                sums.append(self._states[name])
                further.append(value)
            else:
                self._states[name] = value.clone()
        if sums:
            torch._foreach_add_(sums, further)

    def update(self, name: str, metric: Summed, prediction: object, target: object) -> None:
        """Add a batch to the state of a metric."""
        if name not in self._states:
            self._states[name] = metric.zero().to(self.device, non_blocking=True)
        metric.update(self._states[name], prediction, target)

    def read(self) -> dict[str, Tensor]:
        """All sums and states, in float64 on the host. Only here does the host wait for the device."""
        if not self._states:
            return {}
        numbers = torch.cat([t.flatten().double() for t in self._states.values()]).cpu()
        sizes = [t.numel() for t in self._states.values()]
        return {
            name: part.view(t.shape) for (name, t), part in zip(self._states.items(), numbers.split(sizes), strict=True)
        }
