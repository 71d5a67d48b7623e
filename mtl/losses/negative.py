"""A negative loss under a logarithm or in a ratio is an error, which a GPU reports some steps later."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtl.losses.delayed import Delayed


def host(flags: Tensor) -> list[bool] | None:
    """The flags (T,), where reading them waits for no device; None on a GPU."""
    return flags.tolist() if flags.device.type == "cpu" else None


class DelayedFlags(Delayed):
    """Flags of many steps: what any step so far has raised."""

    def __init__(self) -> None:
        super().__init__()
        self._raised: Tensor | None = None  # on the device

    def see(self, flags: Tensor) -> list[bool]:
        """Add (T,) bool `flags`; return those that are known to have been raised up to now."""
        if (known := host(flags)) is not None:
            return known
        self._raised = flags.clone() if self._raised is None else self._raised.logical_or_(flags)
        return self.read(self._raised) or [False] * len(flags)


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
