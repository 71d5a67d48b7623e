"""A task: a name, a loss, metrics, and the rule that tells how many labels a sample carries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.metrics.base import Metric, Score
from mtl.views import Fixed, Moves


@dataclass(frozen=True)
class Task(ABC):
    """Base of every task. A subclass writes `criterion`, `units` and `metrics`.

    Args:
        name: key in configs, logs and tables.
        outputs: numbers that the decoder predicts for each labelled unit: classes, or 1, or 3 for a direction.
        target: the column that holds the labels; empty for the column of the task's name.

    Attributes:
        moves: how a label follows its image when the image is cropped, flipped or scaled.
        allowed: what a label may be, for messages.
    """

    name: str
    outputs: int = 1
    target: str = ""

    moves: ClassVar[Moves] = Fixed()
    allowed: ClassVar[str] = "a label must be a finite number"

    @property
    @abstractmethod
    def metrics(self) -> Sequence[Metric]:
        """The first score of the first metric is the task's main score."""

    @abstractmethod
    def criterion(self, prediction: Any, target: Any) -> Tensor:
        """(N,) loss of each sample, summed over the sample's labelled units; 0 where there is no label."""

    @abstractmethod
    def units(self, target: Any) -> Tensor:
        """(N,) int64, how many labelled units each sample has: 1 or 0 for a class, the labelled pixels of a map."""

    def answers(self, prediction: Any) -> dict[str, Tensor]:
        """What a user reads of a prediction, {name: (N, …)}, such as the class instead of the scores of all classes."""
        return {"prediction": prediction}

    def wrong(self, target: Tensor) -> Tensor:
        """Bool, of the shape of `target`: labels that the task cannot be trained on. Asked once, at loading."""
        if target.ndim == 1 and target.is_floating_point():
            # As float32, in which losses are computed: 1e300 is infinite there.
            return self.labelled(target) & ~target.float().isfinite()
        return torch.zeros_like(target, dtype=torch.bool)

    @property
    def column(self) -> str:
        """Name of the column with the labels."""
        return self.target or self.name

    @property
    def scores(self) -> list[Score]:
        """Of all metrics; the first one is the main one."""
        return [score for metric in self.metrics for score in metric.scores]

    def labelled(self, target: Any) -> Tensor:
        """(N,) bool: which samples carry a label of this task."""
        return self.units(target) > 0

    def count(self, target: Any) -> Tensor:
        """() number of labelled units, on the device."""
        return self.units(target).sum()

    def loss(self, prediction: Any, target: Any) -> Tensor:
        """() mean loss over the labelled units; a differentiable 0 when there is none.

        Raises:
            ValueError: the criterion does not return one loss for each sample.
        """
        losses, units = self.criterion(prediction, target), self.units(target)
        if losses.shape != units.shape:
            raise ValueError(
                f"{type(self).__name__}.criterion returned the shape {tuple(losses.shape)} for a "
                f"prediction {_shape(prediction)}; one loss for each sample has the shape {tuple(units.shape)}"
            )
        # A factor of exactly 1 where each sample has one label: then this is losses.mean(), bit for bit.
        return losses.mean() * (len(losses) / units.sum().clamp(min=1).to(losses.dtype))


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
