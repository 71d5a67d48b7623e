"""Tasks with one label per sample: a class, or a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric
from mtl.metrics.labels import Accuracy, MeanAbsoluteError
from mtl.tasks.base import Task


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over `outputs` classes: predictions (N, outputs), targets (N,) integers, −100 for no label.

    Args:
        classes: names of the classes, for the answers; empty if they have none.

    Raises:
        ValueError: there is another number of names than of classes.
    """

    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.classes and len(self.classes) != self.outputs:
            raise ValueError(f"classes: {len(self.classes)} names of {self.outputs} classes")

    @property
    def metrics(self) -> Sequence[Metric]:
        return (Accuracy(),)

    @property
    def allowed(self) -> str:
        return f"a class must be an integer from 0 to {self.outputs - 1}, or -100 where a sample has no label"

    def wrong(self, target: Tensor) -> Tensor:
        return wrong_classes(target, self.outputs)

    def units(self, target: Tensor) -> Tensor:
        # Converted first: in uint8, −100 would be 156.
        return (target.long() != -100).long()

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target.long(), ignore_index=-100, reduction="none")

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The likeliest class and its probability, (N,) each."""
        probability, likeliest = prediction.softmax(1).max(1)
        return {"class": likeliest, "probability": probability}

    def named(self, answer: str) -> Sequence[str]:
        return self.classes if answer == "class" else ()


@dataclass(frozen=True)
class Regression(Task):
    """Smooth L1 (Huber) loss of one number: predictions (N, 1), targets (N,) numbers, NaN for no label.

    Its gradient is bounded. So a regression head can be trained with the learning rates that suit classification.

    Args:
        mean, std: of the training labels. The model predicts, and the loss compares, standardised numbers:
            (label − mean) / std. Labels, metrics and answers are in the label's own unit.

    Raises:
        ValueError: `std` is not greater than 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std: {self.std}; labels are divided by it, so it must be greater than 0")

    allowed = "a number must be finite, or NaN where a sample has no label"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (MeanAbsoluteError(self.mean, self.std),)

    def units(self, target: Tensor) -> Tensor:
        return (~target.isnan()).long()

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != (len(target), 1):
            shape = tuple(prediction.shape)
            raise ValueError(f"{self.name} is one number for each sample, but the model predicts the shape {shape}")
        # Labels from NumPy are float64, which would make the loss float64 as well. NaN is replaced before the loss,
        # because a NaN that is masked afterwards would come back in the gradient.
        known = target.nan_to_num(0.0)
        if self._scaled:
            known = (known - self.mean) / self.std
        loss = self.distance(prediction.squeeze(1), known.to(prediction.dtype))
        return torch.where(target.isnan(), 0.0, loss)

    def distance(self, number: Tensor, known: Tensor) -> Tensor:
        """(N,) the loss of each number, given the right one."""
        return F.smooth_l1_loss(number, known, reduction="none")

    def missing(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # Whole numbers are labels here, −100 among them.
        return super().missing(shape, dtype if dtype.is_floating_point else torch.float32)

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The number, (N,), in the labels' unit."""
        number = prediction.squeeze(1)
        return {"number": number.float() * self.std + self.mean if self._scaled else number}

    @property
    def _scaled(self) -> bool:
        return (self.mean, self.std) != (0.0, 1.0)


def wrong_classes(target: Tensor, classes: int) -> Tensor:
    """Bool, of the shape of `target`: True for entries that are neither a class nor −100.

    Raises:
        ValueError: the dtype is not an integer type.
    """
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"dtype {str(target.dtype).removeprefix('torch.')}; convert with .long()")
    target = target.long()
    return (target != -100) & ((target < 0) | (target >= classes))
