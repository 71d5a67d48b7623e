"""Protects a method's buffers from an overflow. (The check for negative losses is in `mtl.losses.negative`.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtl.losses.base import LossWeighting, Strategy
from mtl.losses.negative import host, refuse_negative

__all__ = ["Untouched", "host", "kept", "refuse_negative"]


class Untouched:
    """Copies of a strategy's buffers, to be put back if the step's losses or gradients are not finite.

    A GradScaler skips such a step and continues. But a running average that has taken in a NaN would stay NaN. On a
    CPU, the random stream is put back as well. On a GPU it is not, because the host does not know of the overflow. Then
    the next step uses other random numbers, which does no harm.
    """

    def __init__(self, strategy: Strategy):
        self._strategy = strategy
        self._before = [(name, b.clone()) for name, b in strategy.named_buffers() if b is not None]
        self._missing = [name for name in strategy.lazy if getattr(strategy, name) is None]
        self._draws = strategy.draws()

    def __bool__(self) -> bool:
        """Whether there is anything that might have to be restored."""
        return bool(self._before or self._missing or self._strategy.draws())

    @torch.no_grad()
    def unless(self, finite: Tensor) -> None:
        """Restore the buffers if `finite` () is False. The device decides, so that the host does not wait."""
        if host(finite[None]) == [False]:
            self._strategy.redraw(self._draws)
        now = dict(self._strategy.named_buffers())
        for name, before in self._before:
            if (buffer := now.get(name)) is not None and buffer.shape == before.shape:
                buffer.copy_(torch.where(finite, buffer, before))
        for name in self._missing:  # buffers that this step has created; every average starts with zeros
            if (buffer := now.get(name)) is not None:
                buffer.copy_(torch.where(finite, buffer, torch.zeros_like(buffer)))


@contextmanager
def kept(strategy: Strategy, values: Tensor, gramian: Tensor, own: Sequence[Sequence[Tensor | None]]) -> Iterator[None]:
    """Around a gradient method's update of its buffers: puts them back if losses or gradients are not finite.

    Loss weighting is not handled here. `accumulate` checks it, once `.grad` is written.

    Args:
        strategy: the method.
        values: (T,) losses.
        gramian: (T, T) Gramian of the shared gradients.
        own: the heads' gradients.
    """
    untouched = None
    keeps = strategy.lazy or any(True for _ in strategy.buffers()) or values.device.type == "cpu"  # its random stream
    if keeps and not isinstance(strategy, LossWeighting):
        finite = values.isfinite().all() & gramian.isfinite().all() & _finite(own)
        # A copy of (T, P) buffers costs as much as the Jacobian. On a CPU the host can see that no copy is needed.
        untouched = None if host(finite[None]) == [True] else Untouched(strategy)
    yield
    if untouched:
        untouched.unless(finite)


def _finite(own: Sequence[Sequence[Tensor | None]]) -> Tensor | bool:
    """() whether all the heads' gradients are finite."""
    found = [g.to_dense() if g.is_sparse else g for head in own for g in head if g is not None]
    return torch.nn.utils.get_total_norm(found).isfinite() if found else True
