"""Sums that grow on the device while an epoch runs, and are read once at its end."""

from __future__ import annotations

import torch
from torch import Tensor


class Sums:
    """Named sums on the device, read by the host in a single transfer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add `value` (any shape, the same at every call) to the sum called `name`."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> dict[str, list[float]]:
        """All sums as flat lists; the only point at which the host waits for the device."""
        if not self._sums:
            return {}
        numbers = torch.cat([t.flatten() for t in self._sums.values()]).tolist()
        result, offset = {}, 0
        for name, t in self._sums.items():
            result[name] = numbers[offset : offset + t.numel()]
            offset += t.numel()
        return result
