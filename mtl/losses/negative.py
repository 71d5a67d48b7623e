"""Refuses negative losses in methods that take their logarithms or ratios; on a GPU the error comes steps later."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtl.losses.delayed import Delayed


def host(flags: Tensor) -> list[bool] | None:
    """The flags (T,) as Python values; None on a GPU, where reading them would make the host wait."""
    return flags.tolist() if flags.device.type == "cpu" else None


class DelayedFlags(Delayed):
    """Flags that stay raised: a flag is raised if any step so far has raised it."""

    def __init__(self) -> None:
        super().__init__()
        self._raised: Tensor | None = None  # on the device

    def see(self, flags: Tensor) -> list[bool]:
        """Add (T,) bool `flags`; return the flags that the host knows to be raised by now."""
        if (known := host(flags)) is not None:
            return known
        self._raised = flags.clone() if self._raised is None else self._raised.logical_or_(flags)
        return self.read(self._raised) or [False] * len(flags)


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
