"""Metrics of tasks with one label per sample."""

from __future__ import annotations

from torch import Tensor

from mtl.metrics.base import Mean, Score, precise


class Accuracy(Mean):
    """Share of samples whose highest output is the label, in percent.

    Predictions (N, C), targets (N,), −100 for a sample without a label.
    """

    scores = (Score("accuracy", "%"),)

    def add(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        target = target.long()  # in uint8, −100 would be 156
        return (prediction.argmax(1) == target).sum(), (target != -100).sum()


class MeanAbsoluteError(Mean):
    """Mean |prediction − target|, in the target's unit.

    Predictions (N, 1), targets (N,), NaN for a sample without a label.

    Args:
        std, mean: a prediction is multiplied by `std` and added to `mean`, which gives the target's unit.
    """

    scores = (Score("mae", higher_is_better=False),)

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        self.mean, self.std = mean, std

    def add(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        known = ~target.isnan()
        prediction = precise(prediction).squeeze(1)
        if (self.mean, self.std) != (0.0, 1.0):
            prediction = prediction * self.std + self.mean
        error = (prediction - target.to(prediction.dtype)).abs()
        return error.masked_fill(~known, 0.0).sum(), known.sum()
