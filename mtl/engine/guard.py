"""What must not happen in silence in a step: a negative loss under a logarithm, and a state spoilt by an overflow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.losses.base import Strategy


def host(flags: Tensor) -> list[bool] | None:
    """The flags (T,), where reading them waits for no device; None on a GPU."""
    return flags.tolist() if flags.device.type == "cpu" else None


class Watch:
    """Reads flags from a GPU without waiting for it: what a step raised is known some steps later."""

    def __init__(self) -> None:
        self._raised: Tensor | None = None  # on the device: what any step so far has raised
        self._copy: tuple[Tensor, Any] | None = None  # on its way to the host, and the event of its arrival

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return Watch()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

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


def refuse_negative(strategy: Strategy, losses: Tensor, present: Tensor | None, why: str) -> None:
    """Args:
        losses: (T,) values without a graph.
        why: what is done with the losses, for the message.

    Raises:
        ValueError: the loss of a task that is present is negative; it names method, task and epoch.
    """
    negative = losses < 0
    if present is not None:
        negative = negative & present
    if strategy.watch is None:
        strategy.watch = Watch()
    for i, raised in enumerate(strategy.watch.see(negative)):
        if raised:
            known = host(losses)
            value = "" if known is None or not known[i] < 0 else f" ({known[i]:.4g})"
            epoch = f" in epoch {strategy.epoch + 1}" if strategy.calls.epoch_starts else ""
            raise ValueError(
                f"losses[{i}] ({strategy.names[i]}): negative{value}{epoch}, but {type(strategy).__name__} {why}; "
                "add a constant to the loss, or choose a method that takes losses of any sign, such as equal or pcgrad"
            )


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
