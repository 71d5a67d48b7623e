"""What a metric is: a state on the device that adds up over batches, and the numbers that are read from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One number that a metric gives, such as "accuracy".

    Attributes:
        name: key in logs and tables.
        unit: shown behind the number ("%", "°" or "").
        higher_is_better: direction, for choosing the best epoch and the best strategy.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True


class Metric(ABC):
    """A tensor that grows over the batches of a split, and the scores that are computed from it at the end.

    Example: a confusion matrix is one state, and gives both mIoU and pixel accuracy.

    Attributes:
        scores: what `compute` returns; the first score of a task's first metric is the task's main score.
    """

    scores: Sequence[Score]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if {"name", "unit", "higher_is_better"} & vars(cls).keys() and "scores" not in vars(cls):
            shown = getattr(cls, "name", "f1")
            raise TypeError(
                f"{cls.__name__}: a Metric says scores = (Score({shown!r}),) now, instead of a name and unit"
            )

    @abstractmethod
    def zero(self) -> Tensor:
        """The state before the first batch: zeros of any fixed shape, int64 or float64."""

    @abstractmethod
    def update(self, state: Tensor, prediction: Any, target: Any) -> None:
        """Add a batch to `state`, in place, on its device, without waiting for the device.

        Samples without a label add nothing. The states of two halves of a split must add up to the state of the whole.

        Args:
            state: as from `zero`, after the batches before.
            prediction: the task's prediction of a batch, as the model returns it.
            target: the task's labels of the same batch.
        """

    @abstractmethod
    def compute(self, state: Tensor) -> Mapping[str, float]:
        """{score name: value} from a final state, float64 on the host; NaN where no sample had a label."""


class Mean(Metric):
    """A mean over all labelled units, such as samples or pixels. Subclasses say `scores`, of one score, and `add`.

    A score in percent is one hundred times the mean, which then is a share.
    """

    @abstractmethod
    def add(self, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
        """() the sum over the labelled units of a batch, and () their number."""

    def zero(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def update(self, state: Tensor, prediction: Any, target: Any) -> None:
        for total, value in zip(state, self.add(prediction, target), strict=True):
            total += value

    def compute(self, state: Tensor) -> dict[str, float]:
        (score,) = self.scores
        total, units = state.tolist()
        factor = 100.0 if score.unit == "%" else 1.0
        return {score.name: factor * total / units if units else float("nan")}
