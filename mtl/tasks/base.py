"""A task: a name, a loss, metrics, and the number of labels of each sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.metrics.base import Metric, Score
from mtl.views import Fixed, Moves

INSTEAD = {  # methods of older versions, and their replacements, for the error message
    "labelled": "units(target), the number of labelled units of each sample",
    "head": "a backbone with a method decoder(task)",
    "check": "wrong(target), which marks the wrong labels",
}


@dataclass(frozen=True)
class Task(ABC):
    """Base of every task. A subclass defines `criterion`, `units` and `metrics`.

    A unit is one label: the class of a sample, or of a pixel in a dense task. Losses and metrics are means over units.

    Args:
        name: key in configs, logs and tables.
        outputs: number of values that the decoder predicts for each unit, such as the number of classes.
        target: the column with the labels; empty for the column with the task's own name.
        index: the task's labels are column number `index` of a matrix (N, K). Tasks that differ only in this number and
            their names are computed together: see `mtl.tasks.alike`.

    Attributes:
        moves: how a label changes when its image is cropped, flipped or scaled.
        allowed: description of the allowed labels, for error messages.
        apart: fields that no `criterion`, `units` or metric's `update` reads. Alike tasks may differ in them.
    """

    name: str
    outputs: int = 1
    target: str = ""
    index: int | None = field(default=None, kw_only=True)

    moves: ClassVar[Moves] = Fixed()
    allowed: ClassVar[str] = "a label must be a finite number"
    apart: ClassVar[frozenset[str]] = frozenset({"name", "index"})

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, now in INSTEAD.items():
            if callable(vars(cls).get(name)):
                raise TypeError(f"{cls.__name__} defines {name}, which no Task has any more; write {now}")

    @property
    @abstractmethod
    def metrics(self) -> Sequence[Metric]:
        """The task's metrics. The first score of the first metric is the main one: it chooses the best epoch."""

    @abstractmethod
    def criterion(self, prediction: Any, target: Any) -> Tensor:
        """(N,) the loss of each sample, summed over its labelled units; 0 if the sample has none."""

    @abstractmethod
    def units(self, target: Any) -> Tensor:
        """(N,) int64, the number of labelled units of each sample: 0 or 1 for a class, the labelled pixels of a map."""

    def answers(self, prediction: Any) -> dict[str, Tensor]:
        """What a user reads of a prediction, {name: (N, …)}, such as the class instead of the scores of all classes."""
        return {"prediction": prediction}

    def named(self, answer: str) -> Sequence[str]:
        """The names of an answer's values 0, 1, …, such as class names; empty if its values are numbers."""
        return ()

    def draw(self, images: Tensor | None, prediction: Any, target: Any) -> tuple[Tensor, Tensor] | None:
        """Pictures of the truth and of the prediction for N samples. By default a task has none.

        Args:
            images: (N, H, W, 3) uint8, the images of the samples; None if the network reads no image.
            prediction, target: as in `criterion`, without gradient.

        Returns:
            truth and prediction, (N, height, width, 3) uint8 each. The same value has the same colour in both. Black
            marks what has no label.
        """
        return None

    def wrong(self, target: Tensor) -> Tensor:
        """Bool, of the shape of `target`: True for labels that are not allowed. Called once, when data is loaded."""
        if target.ndim == 1 and target.is_floating_point():
            # Losses are computed in float32. There, a label of 1e300 would be infinite.
            return self.labelled(target) & ~target.float().isfinite()
        return torch.zeros_like(target, dtype=torch.bool)

    def missing(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A label that counts as none: NaN for floats, −100 for integers. A subclass may mark it in another way.

        Args:
            shape: of one sample's label.
            dtype: of the labels. The result may have another one, if this one cannot hold the mark.
        """
        if dtype.is_floating_point:
            return torch.full(shape, nan, dtype=dtype)
        return torch.full(shape, -100, dtype=dtype if dtype.is_signed else torch.int64)

    @property
    def column(self) -> str:
        """The name of the column with the labels."""
        return self.target or self.name

    def select(self, column: Tensor) -> Tensor:
        """The task's own labels from (rows of) its column: the column itself, or one column of a matrix."""
        return column if self.index is None else column[:, self.index]

    @property
    def scores(self) -> list[Score]:
        """The scores of all metrics; the first one is the main one."""
        return [score for metric in self.metrics for score in metric.scores]

    def labelled(self, target: Any) -> Tensor:
        """(N,) bool: whether each sample has a label of this task."""
        return self.units(target) > 0

    def count(self, target: Any) -> Tensor:
        """() the number of labelled units of a batch, on the device."""
        return self.units(target).sum()

    def loss(self, prediction: Any, target: Any) -> Tensor:
        """() the mean loss over a batch's labelled units; a differentiable 0 if there are none.

        Raises:
            ValueError: the criterion does not return one loss for each sample.
        """
        return self.mean_loss(prediction, target, self.units(target))

    def mean_loss(self, prediction: Any, target: Any, units: Tensor) -> Tensor:
        """`loss` of a batch whose samples have `units` (N,): training has counted them already."""
        losses = self.checked_losses(prediction, target, units)
        # The same as losses.sum() / units.sum(), up to rounding. In this form the factor is exactly 1 if each sample
        # has one label, so the result equals losses.mean() bit for bit.
        return losses.mean() * (len(losses) / units.sum().clamp(min=1).to(losses.dtype))

    def checked_losses(self, prediction: Any, target: Any, units: Tensor) -> Tensor:
        """(N,) `criterion` of a batch whose samples have `units` (N,).

        Raises:
            ValueError: the criterion does not return one loss for each sample.
        """
        losses = self.criterion(prediction, target)
        if losses.shape != units.shape:
            raise ValueError(
                f"{type(self).__name__}.criterion returned the shape {tuple(losses.shape)} for a "
                f"prediction {_shape(prediction)}; one loss for each sample has the shape {tuple(units.shape)}"
            )
        return losses


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
