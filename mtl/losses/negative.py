"""Refuses negative losses in methods that take their logarithms or ratios; on a GPU the error comes steps later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def host(flags: Tensor) -> list[bool] | None:
    """The flags (T,) as Python values; None on a GPU, where reading them would make the host wait."""
    return flags.tolist() if flags.device.type == "cpu" else None


class DelayedFlags:
    """Reads flags from a GPU without waiting for it: a flag raised in one step is known some steps later."""

    def __init__(self) -> None:
        self._raised: Tensor | None = None  # (T,) on the device: the flags raised in any step so far
        self._copy: tuple[Tensor, Any] | None = None  # a copy on its way to the host, and the event of its arrival

    def __deepcopy__(self, memo: dict[int, Any]) -> DelayedFlags:
        return DelayedFlags()

    def __reduce__(self) -> tuple[type[DelayedFlags], tuple[()]]:
        return DelayedFlags, ()

    def see(self, flags: Tensor) -> list[bool]:
        """Add (T,) bool `flags`; return the flags that the host knows to be raised by now."""
        if (known := host(flags)) is not None:
            return known
        none = [False] * len(flags)
        # Not watched: other devices have no such events, and an event cannot be queried while a graph is captured.
        if flags.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return none
        self._raised = flags.clone() if self._raised is None else self._raised.logical_or_(flags)
        if self._copy is None:
            # Pinned memory: only then does the copy run beside the computation.
            copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            copy.copy_(self._raised, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = copy, event
            return none
        copy, event = self._copy
        if not event.query():  # not arrived yet: ask again in the next step
            return none
        self._copy = None
        return copy.tolist()


def refuse_negative(strategy: Any, losses: Tensor, present: Tensor | None, why: str) -> None:
    """Raise an error if a loss is negative.

    Args:
        strategy: the method.
        losses: (T,) values without a graph.
        present: (T,) bool as in `LossWeighting.forward`.
        why: what the method does with the losses, such as "takes their logarithms"; it ends the message.

    Raises:
        ValueError: the loss of a present task is negative. The message names method, task and epoch.
    """
    negative = losses < 0
    if present is not None:
        negative = negative & present
    if strategy.watch is None:
        strategy.watch = DelayedFlags()
    for i, raised in enumerate(strategy.watch.see(negative)):
        if raised:
            known = host(losses)
            # On a GPU the flag is from an earlier step, so the value of today would be the wrong one.
            value = "" if known is None or not known[i] < 0 else f" ({known[i]:.4g})"
            epoch = f" in epoch {strategy.epoch + 1}" if strategy.calls.epoch_starts else ""
            raise ValueError(
                f"losses[{i}] ({strategy.names[i]}): negative{value}{epoch}, but {type(strategy).__name__} {why}; "
                "add a constant to the loss, or choose a method that takes losses of any sign, such as equal or pcgrad"
            )
