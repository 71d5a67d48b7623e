"""What a strategy sees and returns: the three families, told apart by what a method needs.

Shapes: T tasks, P shared parameters. losses (T,), jacobian (T, P), gramian (T, T), weights (T,), present (T,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADS = ("own", "weighted")


@dataclass(frozen=True)
class Statistics:
    """What an epoch tells a strategy: training and validation figures, never the test set's.

    losses: (T,) mean unweighted training loss of each task over the epoch; NaN where a task had no label all epoch.
    scores: (T,) each task's main metric as it is printed (accuracies in percent), on validation data where the run
        has some, else on the training batches; NaN as above. None in a loop that has no metrics.
    higher_is_better: (T,) bool, the direction of the scores.
    """

    losses: Tensor
    scores: Tensor | None = None
    higher_is_better: Tensor | None = None


class Strategy(nn.Module, ABC):
    """Base of every method. All state lives in parameters and buffers, so that a checkpoint holds it.

    Args:
        tasks: the number of tasks, or their names (then weights may be given by name).

    Attributes:
        heads: what task-specific parameters receive under a gradient method: the gradient of their own loss
            ("own"), or that gradient times the task's weight ("weighted"); each paper's way. Loss weighting always
            weights them.
        max_norm: norm to which the shared parameters' gradient is clipped, where that is part of the method.
        samples: how many independent batches a step needs (1; 3 for the double-sampling methods).
        epoch, epochs: training progress, epoch counted from 0; set by `epoch_start`.
        lr, weight_decay: of the method's own parameters; None follows the optimizer's.
    """

    heads: str = "own"
    max_norm: float | None = None
    samples: int = 1
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

    def after_step(self, losses: Tensor, present: Tensor | None = None) -> None:
        """Learn from what the step did (FAMO): losses (T,) of the same batch under the new parameters.

        The engine makes the extra forward pass for the methods that define this; a foreign loop does so itself.
        """

    def head_weights(self, weights: Tensor | None) -> Tensor | None:
        """(T,) what the heads' own gradients are multiplied by; None leaves them alone.

        Args:
            weights: (T,) of this step's gradients, as the method returned them.
        """
        return weights if self.heads == "weighted" else None

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
    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        """Weigh the tasks.

        Args:
            gramian: (T, T) inner products of the task gradients, J Jᵀ; an absent task's row and column are 0. For a
                method with `samples` = 3 it is J₁ J₂ᵀ of the first two batches, and the third one is weighed.
            present: (T,) bool as in `LossWeighting.forward`.
            losses: (T,) values, without a graph; a few methods read them, and say so when they are missing.

        Returns:
            (T,) the weight of each task's gradient.
        """


class JacobianAggregation(Strategy):
    """Family 3: the update is a function of the whole Jacobian."""

    @abstractmethod
    def aggregate(
        self, jacobian: Tensor, present: Tensor | None = None, losses: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Merge the task gradients.

        Args:
            jacobian: (T, P) one task gradient a row; an absent task's row is 0.
            present, losses: as in `GramianWeighting.weights`.

        Returns:
            (P,) the direction; parameters move against it. A method that has task weights returns (direction, weights).
        """


def masked(values: Tensor, present: Tensor | None) -> Tensor:
    """`values` (T,) with 0 where the task is absent; never multiplies, so a NaN there cannot leak."""
    return values if present is None else torch.where(present, values, torch.zeros_like(values))


def count(present: Tensor | None, like: Tensor) -> Tensor:
    """() the number of present tasks, at least 1, in the dtype of `like` (T,)."""
    return torch.full_like(like[0], len(like)) if present is None else present.sum().clamp(min=1).to(like)


def uniform(present: Tensor | None, like: Tensor) -> Tensor:
    """(T,) weights 1/T of the mean over the present tasks, in the dtype of `like`."""
    return masked(torch.ones_like(like), present) / count(present, like)


def softmax(scores: Tensor, present: Tensor | None) -> Tensor:
    """(T,) softmax over the present tasks, 0 elsewhere."""
    if present is None:
        return torch.softmax(scores, 0)
    return torch.softmax(torch.where(present, scores, -torch.inf), 0).nan_to_num(0.0)


def by_task(key: str, values: Mapping[str, float] | Sequence[float], names: Sequence[str]) -> list[float]:
    """One number for each task, given by name or in task order.

    Raises:
        ValueError: a task has none, or a name is no task's.
    """
    if isinstance(values, Mapping):
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"{key}: {unknown[0]!r} is no task; the tasks are {', '.join(names)}")
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{key}: none for {missing[0]!r}; one is needed for each of {', '.join(names)}")
        values = [values[name] for name in names]
    if len(values) != len(names):
        raise ValueError(f"{key}: {len(values)} given for {len(names)} tasks ({', '.join(names)})")
    return [float(value) for value in values]
