"""A task: a name, a head width, a criterion, metrics, and the rule that tells which samples carry its label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.metrics.task import Accuracy, MeanAbsoluteError, Metric


@dataclass(frozen=True)
class Task(ABC):
    """Base of every task.

    Args:
        name: key in configs, logs and tables.
        outputs: width of the task's head.
        partial: has no effect any more, and is accepted for the sake of older code: samples without a label are found
            in every batch, and every mean is over the labelled samples only.
    """

    name: str
    outputs: int
    partial: bool = False

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The first one is the task's main figure."""

    def head(self, features: int) -> nn.Module:
        """What turns features (N, F) into this task's prediction (N, outputs); may have no parameters.

        Raises:
            ValueError: no prediction of this task can be made from so many features.
        """
        return nn.Linear(features, self.outputs)

    @property
    def allowed(self) -> str:
        """What a label may be, in the words of a message."""
        return "a label must be a finite number"

    def check(self, target: Tensor) -> None:
        """Look once, when the data is loaded, at all labels (N, …) of a split.

        Raises:
            ValueError: this task cannot be trained on them; the message names the first wrong sample and its value.
        """
        labelled = self.labelled(target)
        if target.is_complex():
            raise ValueError(f"dtype {_name(target.dtype)}; {self.allowed}")
        if not isinstance(labelled, Tensor) or labelled.dtype != torch.bool:
            raise ValueError(f"{type(self).__name__}.labelled must return a bool for each sample, not {labelled!r:.60}")
        if labelled.shape != target.shape[:1]:
            size, shape = len(target), tuple(target.shape)
            hint = "; drop the second dimension with squeeze(1)" if shape[1:] == (1,) else ""
            raise ValueError(f"shape {shape}; one label for each sample has the shape ({size},){hint}")
        if target.ndim == 1 and target.is_floating_point():
            # As float32, in which losses are computed: 1e300 is infinite there.
            self.refuse(labelled & ~target.float().isfinite(), target)

    def refuse(self, wrong: Tensor, target: Tensor) -> None:
        """Raises:
        ValueError: `wrong` (bool, the shape of `target`) marks some label.
        """
        if count := int(wrong.sum()):
            first = tuple(wrong.nonzero()[0].tolist())
            others = f" ({count} labels are wrong)" if count > 1 else ""
            raise ValueError(f"sample {first[0]} has the label {target[first].item()}{others}; {self.allowed}")

    @abstractmethod
    def labelled(self, target: Tensor) -> Tensor:
        """(N,) bool: which samples carry this task's label."""

    @abstractmethod
    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(N,) loss of each sample; 0 where there is no label."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """() mean loss over the labelled samples; a differentiable 0 when there is none.

        Raises:
            ValueError: the criterion does not return one loss for each sample.
        """
        losses = self.criterion(prediction, target)
        if losses.shape != target.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}.criterion returned the shape {tuple(losses.shape)} for a "
                f"prediction {tuple(prediction.shape)}; one loss for each sample has the shape ({len(target)},)"
            )
        # A factor of exactly 1 where all samples are labelled: then this is losses.mean(), bit for bit.
        return losses.mean() * (len(target) / self.count(target).clamp(min=1).to(losses.dtype))

    def count(self, target: Tensor) -> Tensor:
        """() number of labelled samples, on the device."""
        return self.labelled(target).sum()


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over `outputs` classes; targets (N,) integers, −100 where there is no label."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Accuracy(),)

    @property
    def allowed(self) -> str:
        return f"a class must be an integer from 0 to {self.outputs - 1}, or -100 where a sample has no label"

    def check(self, target: Tensor) -> None:
        if target.is_floating_point() or target.is_complex():
            raise ValueError(f"dtype {_name(target.dtype)}; {self.allowed} (convert with .long())")
        super().check(target)
        target = target.long()
        self.refuse((target != -100) & ((target < 0) | (target >= self.outputs)), target)

    def labelled(self, target: Tensor) -> Tensor:
        # As int64, because -100 as uint8 is class 156.
        return target.long() != -100

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target.long(), ignore_index=-100, reduction="none")


@dataclass(frozen=True)
class Regression(Task):
    """Smooth L1 (Huber) loss of one number; targets (N,) numbers, NaN where there is no label.

    Its gradient is bounded, so a regression head bears the learning rates that classification is trained with.
    """

    outputs: int = 1

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (MeanAbsoluteError(),)

    @property
    def allowed(self) -> str:
        return "a number must be finite, or NaN where a sample has no label"

    def labelled(self, target: Tensor) -> Tensor:
        return ~target.isnan()

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != (len(target), 1):
            shape = tuple(prediction.shape)
            raise ValueError(f"{self.name} is one number for each sample, but its head returned the shape {shape}")
        # In the prediction's precision: labels from NumPy are float64, and would make the losses so.
        known = target.nan_to_num(0.0).to(prediction.dtype)
        loss = F.smooth_l1_loss(prediction.squeeze(1), known, reduction="none")
        return torch.where(target.isnan(), 0.0, loss)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
