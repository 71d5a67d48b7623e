"""Tasks with one label a sample: a class, or a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.task import Accuracy, MeanAbsoluteError, Metric
from mtl.tasks.base import Task, _name


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
