"""Numbers that a GPU computes, read some steps later, so that no step waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LATE = 50  # reads after which a copy that has not arrived is waited for; so nothing stays unknown for longer


class Delayed:
    """Reads a tensor of numbers that only ever grow in meaning, such as flags that once raised stay raised."""

    def __init__(self) -> None:
        self._copy: tuple[Tensor, Any] | None = None  # on its way to the host, and the event of its arrival
        self._age = 0  # reads since the copy was sent

    def __deepcopy__(self, memo: dict[int, Any]) -> Delayed:
        return type(self)()

    def __reduce__(self) -> tuple[type[Delayed], tuple[()]]:
        return type(self), ()

    def read(self, values: Tensor) -> list[Any] | None:
        """What is known of `values`: now on a CPU, as of some steps ago on a GPU; None while nothing is known."""
        if values.device.type == "cpu":
            return values.tolist()
        # Not watched: other devices have no such events, and an event cannot be queried while a graph is captured.
        if values.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        if self._copy is None:
            # Pinned memory: only then does the copy run beside the computation.
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
