"""A negative loss under a logarithm or in a ratio is an error, which a GPU reports some steps later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def host(flags: Tensor) -> list[bool] | None:
    """The flags (T,), where reading them waits for no device; None on a GPU."""
    return flags.tolist() if flags.device.type == "cpu" else None


class DelayedFlags:
    """Reads flags from a GPU without waiting for it: what a step raised is known some steps later."""

    def __init__(self) -> None:
        self._raised: Tensor | None = None  # on the device: what any step so far has raised
        self._copy: tuple[Tensor, Any] | None = None  # on its way to the host, and the event of its arrival

    def __deepcopy__(self, memo: dict[int, Any]) -> DelayedFlags:
        return DelayedFlags()

    def __reduce__(self) -> tuple[type[DelayedFlags], tuple[()]]:
        return DelayedFlags, ()

    def see(self, flags: Tensor) -> list[bool]:
        """Add (T,) bool `flags`; return those that are known to have been raised up to now."""
        if (known := host(flags)) is not None:
            return known
        none = [False] * len(flags)
        if flags.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return none
        self._raised = flags.clone() if self._raised is None else self._raised.logical_or_(flags)
        if self._copy is None:
            copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
            copy.copy_(self._raised, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = copy, event
            return none
        copy, event = self._copy
        if not event.query():
            return none
        self._copy = None
        return copy.tolist()


def refuse_negative(strategy: Any, losses: Tensor, present: Tensor | None, why: str) -> None:
    """Args:
        strategy: the method.
        losses: (T,) values without a graph.
        present: (T,) bool as in `LossWeighting.forward`.
        why: what is done with the losses, for the message.

    Raises:
        ValueError: the loss of a task that is present is negative; it names method, task and epoch.
    """
    negative = losses < 0
    if present is not None:
        negative = negative & present
    if strategy.watch is None:
        strategy.watch = DelayedFlags()
    for i, raised in enumerate(strategy.watch.see(negative)):
        if raised:
            known = host(losses)
            value = "" if known is None or not known[i] < 0 else f" ({known[i]:.4g})"
            epoch = f" in epoch {strategy.epoch + 1}" if strategy.calls.epoch_starts else ""
            raise ValueError(
                f"losses[{i}] ({strategy.names[i]}): negative{value}{epoch}, but {type(strategy).__name__} {why}; "
                "add a constant to the loss, or choose a method that takes losses of any sign, such as equal or pcgrad"
            )
