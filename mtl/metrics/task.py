"""Metrics of one task, accumulated on the device.

A metric turns a batch into a small state tensor; states of batches add up; `compute` reads the sum on the host.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Metric(ABC):
    """One figure of a task.

    Attributes:
        name: key in logs and tables.
        unit: shown behind the number ("%" or "").
        higher_is_better: direction, for choosing the best epoch and the best strategy.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True

    @abstractmethod
    def update(self, prediction: Tensor, target: Tensor) -> Tensor:
        """State (K,) of one batch, on the device, without a host sync; samples without a label add nothing.

        Args:
            prediction: (N, outputs) of the task's head.
            target: (N,), −100 or NaN where there is no label.
        """

    @abstractmethod
    def compute(self, state: list[float], count: float) -> float:
        """The figure from the summed state of `count` labelled samples; NaN where there is none."""


class Accuracy(Metric):
    """Share of samples whose highest score is the label, in percent."""

    name, unit, higher_is_better = "accuracy", "%", True

    def update(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.argmax(1) == target).sum()[None]

    def compute(self, state: list[float], count: float) -> float:
        return 100.0 * state[0] / count if count else math.nan


class MeanAbsoluteError(Metric):
    """Mean |prediction − target|, in the target's unit."""

    name, higher_is_better = "mae", False

    def update(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction.squeeze(1) - target.to(prediction.dtype)).abs()
        return torch.where(target.isnan(), 0.0, error).sum()[None]

    def compute(self, state: list[float], count: float) -> float:
        return state[0] / count if count else math.nan
