"""A physical quantity that is trained in standard deviations and reported in its unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric, Score
from mtl.metrics.labels import MeanAbsoluteError
from mtl.tasks.labels import Regression


@dataclass
class Standard:
    """Mean and standard deviation of a quantity, in its unit. The data set sets them when it is loaded.

    Attributes:
        known: whether they are set.
    """

    mean: float = 0.0
    std: float = 1.0
    known: bool = False

    def set(self, values: Tensor) -> None:
        """Mean and standard deviation of the finite `values` (N,).

        Raises:
            ValueError: all values are the same, or there are none.
        """
        values = values[values.isfinite()].double()
        mean, std = (float(values.mean()), float(values.std())) if len(values) > 1 else (0.0, 0.0)
        if not std > 0:
            raise ValueError(f"{len(values)} values with a standard deviation of {std}; different values are needed")
        self.mean, self.std, self.known = mean, std, True


class ErrorInUnits(MeanAbsoluteError):
    """Mean |prediction − target| of standardised numbers, in the quantity's unit.

    Args:
        unit: of the quantity.
        standard: its mean and standard deviation.
    """

    def __init__(self, unit: str, standard: Standard):
        super().__init__()
        self.scores, self.standard = (Score("mae", unit and f" {unit}", higher_is_better=False),), standard

    def compute(self, state: Tensor) -> dict[str, float]:
        # The state is a sum of standardised errors. The unit comes in on the host, so a step copies nothing.
        return {name: value * self.standard.std for name, value in super().compute(state).items()}


@dataclass(frozen=True)
class Quantity(Regression):
    """Squared error of one standardised number: predictions (N, 1), targets (N,) numbers, NaN for no label.

    The mean absolute error is in the unit of the quantity.

    Args:
        unit: shown after the error, such as "meV".
        standard: mean and standard deviation; the data set sets them when it is loaded.
    """

    unit: str = ""
    standard: Standard = field(default_factory=Standard, compare=False)

    @property
    def metrics(self) -> Sequence[Metric]:
        return (ErrorInUnits(self.unit, self.standard),)

    def distance(self, number: Tensor, known: Tensor) -> Tensor:
        return F.mse_loss(number, known, reduction="none")

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The number in its unit, (N,); called "standardised" while mean and deviation are unknown, without data."""
        number = prediction.squeeze(1)
        if not self.standard.known:
            return {"standardised": number}
        return {"number": number * self.standard.std + self.standard.mean}
