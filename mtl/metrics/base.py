"""The base class of metrics: a state on the device that adds up over batches, and the values computed from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """A value that a metric computes, such as "accuracy".

    Attributes:
        name: key in logs and tables.
        unit: shown after the value ("%", "°" or "").
        higher_is_better: False for errors. It decides which epoch and which method is the best.
        may_lack: whether the labels may leave the value undefined, such as F1 without a positive label. Then `compute`
            returns NaN, which is no divergence.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    may_lack: bool = False


def precise(prediction: Tensor) -> Tensor:
    """The prediction in float32 or more. In bf16, labels and errors would be rounded to three digits."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


class Metric(ABC):
    """A metric: sums over all batches of a split, and at the end the scores computed from these sums.

    Example: the state may be a confusion matrix. It gives both mIoU and pixel accuracy.

    Attributes:
        scores: the scores that `compute` returns. The first score of a task's first metric is the task's main metric.
        training: whether it is also measured on the training batches. False saves the time of an expensive metric.
    """

    scores: Sequence[Score]
    training: bool = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if {"name", "unit", "higher_is_better"} & vars(cls).keys() and "scores" not in vars(cls):
            shown = getattr(cls, "name", "f1")
            raise TypeError(
                f"{cls.__name__}: a Metric says scores = (Score({shown!r}),) now, instead of a name and unit"
            )

    @abstractmethod
    def zero(self) -> Tensor:
        """The state before the first batch: zeros of any fixed shape, as int64 or float64."""

    @abstractmethod
    def update(self, state: Tensor, prediction: Any, target: Any) -> None:
        """Add a batch to `state`, in place. The host must not wait for the device: no `.item()`, no `bincount`.

        Samples without a label add nothing. The states of two halves of a split must add up to the state of the whole.

        Args:
            state: the sums over the earlier batches, in the form that `zero` returns.
            prediction: the task's prediction of a batch, as the model returns it.
            target: the task's labels of the same batch.
        """

    @abstractmethod
    def compute(self, state: Tensor) -> Mapping[str, float]:
        """{score name: value} from a final state, in float64 on the host; NaN if no sample had a label."""


class Mean(Metric):
    """A mean over all labelled units: samples, or pixels. A subclass defines `add`, and `scores` with one score.

    If the score's unit is "%", the mean is multiplied by 100.
    """

    @abstractmethod
    def add(self, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The sum () over a batch's labelled units, and their number ()."""

    def zero(self) -> Tensor:
        # float64: a float32 sum over millions of pixels would lose digits.
        return torch.zeros(2, dtype=torch.float64)

    def update(self, state: Tensor, prediction: Any, target: Any) -> None:
        for total, value in zip(state, self.add(prediction, target), strict=True):
            total += value

    def compute(self, state: Tensor) -> dict[str, float]:
        (score,) = self.scores
        total, units = state.tolist()
        factor = 100.0 if score.unit == "%" else 1.0
        return {score.name: factor * total / units if units else float("nan")}
