"""What must not happen in silence in a step: a state spoilt by an overflow. Negative losses: `mtl.losses.negative`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtl.losses.base import LossWeighting, Strategy
from mtl.losses.negative import host, refuse_negative

__all__ = ["Untouched", "host", "kept", "refuse_negative"]


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


@contextmanager
def kept(strategy: Strategy, values: Tensor, gramian: Tensor, own: Sequence[Sequence[Tensor | None]]) -> Iterator[None]:
    """A method that learns from gradients in here keeps its buffers where losses or gradients are not finite.

    Loss weighting has computed its weights by now; its step looks for itself once `.grad` is written.

    Args:
        values: (T,) losses.
        gramian: (T, T) of the shared gradients.
        own: the heads' gradients.
    """
    untouched = None
    keeps = strategy.lazy or any(True for _ in strategy.buffers()) or values.device.type == "cpu"  # its draws
    if keeps and not isinstance(strategy, LossWeighting):
        finite = values.isfinite().all() & gramian.isfinite().all() & _finite(own)
        # A copy of the buffers costs as much as the Jacobian. On a CPU it is known beforehand that none is needed.
        untouched = None if host(finite[None]) == [True] else Untouched(strategy)
    yield
    if untouched:
        untouched.unless(finite)


def _finite(own: Sequence[Sequence[Tensor | None]]) -> Tensor | bool:
    """() whether the heads' gradients are finite."""
    found = [g.to_dense() if g.is_sparse else g for head in own for g in head if g is not None]
    return torch.nn.utils.get_total_norm(found).isfinite() if found else True
