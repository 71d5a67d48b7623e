"""Reads numbers from a GPU some steps after it has computed them, so that no step waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LATE = 50  # after this many reads, the host waits for a copy that has still not arrived


class Delayed:
    """Reads a tensor whose older values stay true, such as flags that are never lowered once they are raised."""

    def __init__(self) -> None:
        self._copy: tuple[Tensor, Any] | None = None  # on its way to the host, and the event of its arrival
        self._age = 0  # reads since the copy was sent

    def __deepcopy__(self, memo: dict[int, Any]) -> Delayed:
        return type(self)()

    def __reduce__(self) -> tuple[type[Delayed], tuple[()]]:
        return type(self), ()

    def read(self, values: Tensor) -> list[Any] | None:
        """The `values`: the current ones on a CPU, and some steps old on a GPU. None if no copy has arrived yet."""
        # Other devices have no such events, and while a CUDA graph is captured no event may be queried.
        if values.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        if self._copy is None:
            # Only into pinned memory can a copy run while the GPU computes.
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            copy.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy, self._age = (copy, event), 0
            return None
        copy, event = self._copy
        self._age += 1
        if not event.query():
            if self._age < LATE:
                return None
            event.synchronize()
        self._copy = None
        return copy.tolist()
