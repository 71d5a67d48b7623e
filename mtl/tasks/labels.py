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
    """Cross-entropy over `outputs` classes: predictions (N, outputs), targets (N,) integers, −100 for no label."""

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


@dataclass(frozen=True)
class Regression(Task):
    """Smooth L1 (Huber) loss of one number: predictions (N, 1), targets (N,) numbers, NaN for no label.

    Its gradient is bounded. So a regression head can be trained with the learning rates that suit classification.
    """

    allowed = "a number must be finite, or NaN where a sample has no label"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (MeanAbsoluteError(),)

    def units(self, target: Tensor) -> Tensor:
        return (~target.isnan()).long()

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != (len(target), 1):
            shape = tuple(prediction.shape)
            raise ValueError(f"{self.name} is one number for each sample, but the model predicts the shape {shape}")
        # Labels from NumPy are float64, which would make the loss float64 as well. NaN is replaced before the loss,
        # because a NaN that is masked afterwards would come back in the gradient.
        known = target.nan_to_num(0.0).to(prediction.dtype)
        loss = F.smooth_l1_loss(prediction.squeeze(1), known, reduction="none")
        return torch.where(target.isnan(), 0.0, loss)

    def missing(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # Whole numbers are labels here, −100 among them.
        return super().missing(shape, dtype if dtype.is_floating_point else torch.float32)

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The number, (N,)."""
        return {"number": prediction.squeeze(1)}


def wrong_classes(target: Tensor, classes: int) -> Tensor:
    """Bool, of the shape of `target`: True for entries that are neither a class nor −100.

    Raises:
        ValueError: the dtype is not an integer type.
    """
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"dtype {str(target.dtype).removeprefix('torch.')}; convert with .long()")
    target = target.long()
    return (target != -100) & ((target < 0) | (target >= classes))
