"""What a strategy sees and returns: the three families, told apart by what a method needs.

Shapes: T tasks, P shared parameters. losses (T,), jacobian (T, P), gramian (T, T), weights (T,), present (T,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADS = ("own", "weighted")


@dataclass(frozen=True)
class Statistics:
    """What an epoch of training tells a strategy; training figures only, never the test set.

    losses: (T,) mean unweighted training loss of each task over the epoch; NaN where a task had no label all epoch.
    """

    losses: Tensor


class Strategy(nn.Module, ABC):
    """Base of every method. All state lives in parameters and buffers, so that a checkpoint holds it.

    Args:
        tasks: the number of tasks, or their names (then weights may be given by name).

    Attributes:
        heads: what task-specific parameters receive under a gradient method: the gradient of their own loss
            ("own"), or that gradient times the task's weight ("weighted"). Loss weighting always weights them.
        epoch, epochs: training progress, epoch counted from 0; set by `epoch_start`.
        lr, weight_decay: of the method's own parameters; None follows the optimizer's.
    """

    heads: str = "own"
    lr: float | None = None
    weight_decay: float | None = 0.0

    def __init__(self, tasks: int | Sequence[str]):
        super().__init__()
        self.names = tuple(map(str, range(tasks))) if isinstance(tasks, int) else tuple(tasks)
        if not self.names:
            raise ValueError("tasks: at least one task is needed")
        self.epoch, self.epochs = 0, 1
        self._seed = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return len(self.names)

    def epoch_start(self, epoch: int, epochs: int, seed: int = 0) -> None:
        """Tell the progress and reseed the method's random stream.

        Reseeding each epoch makes the draws a function of (seed, epoch), so a resumed run needs no generator state.
        """
        self.epoch, self.epochs, self._seed = epoch, epochs, seed
        for generator in self._generators.values():
            generator.manual_seed(seed)

    def epoch_end(self, statistics: Statistics) -> None:
        """Learn from the epoch that has ended (DWA and its kin)."""

    def generator(self, device: torch.device) -> torch.Generator:
        """The method's own random stream on `device`: never the global one, which data and dropout share."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


class LossWeighting(Strategy):
    """Family 1: combines the losses into one scalar; one backward pass."""

    @abstractmethod
    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine the losses.

        Args:
            losses: (T,) differentiable; an absent task's entry is a constant 0.
            present: (T,) bool, False where the batch holds no label of that task; None when all are present.

        Returns:
            () the scalar to differentiate.
        """


class GramianWeighting(Strategy):
    """Family 2: the update is `jacobian.T @ weights` with weights a function of the Gramian alone."""

    @abstractmethod
    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        """Weigh the tasks.

        Args:
            gramian: (T, T) inner products of the task gradients, J Jᵀ; an absent task's row and column are 0.
            present: (T,) bool as in `LossWeighting.forward`.

        Returns:
            (T,) the weight of each task's gradient.
        """


class JacobianAggregation(Strategy):
    """Family 3: the update is a function of the whole Jacobian."""

    @abstractmethod
    def aggregate(self, jacobian: Tensor, present: Tensor | None = None) -> Tensor:
        """Merge the task gradients.

        Args:
            jacobian: (T, P) one task gradient a row; an absent task's row is 0.
            present: (T,) bool as in `LossWeighting.forward`.

        Returns:
            (P,) the direction; parameters move against it.
        """


def masked(values: Tensor, present: Tensor | None) -> Tensor:
    """`values` (T,) with 0 where the task is absent; never multiplies, so a NaN there cannot leak."""
    return values if present is None else torch.where(present, values, torch.zeros_like(values))
