"""A physical quantity that is trained in standard deviations and reported in its unit.

A `Regression` standardises its labels in each step. Its mean and deviation are known when it is made, and alike tasks
must share them. A `Quantity` has labels that were standardised when they were loaded. So K quantities of one matrix are
computed together, and their mean and deviation may be known later: QM9's follow from a split that depends on the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric, Score
from mtl.metrics.labels import MeanAbsoluteError
from mtl.tasks.labels import Regression


@dataclass(eq=False)  # each data set has its own, so that tasks of two data sets are two
class Standard:
    """Mean and standard deviation of a quantity, in its unit. The data set sets them, or recalls them.

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
        self.recall({"mean": mean, "std": std})

    def recall(self, facts: Mapping[str, float]) -> None:
        """Take the mean and standard deviation of a run's training."""
        self.mean, self.std, self.known = float(facts["mean"]), float(facts["std"]), True

    def facts(self) -> dict[str, float]:
        """What `recall` takes."""
        return {"mean": self.mean, "std": self.std}

    def of(self, values: Tensor) -> Tensor:
        """`values` in standard deviations from the mean."""
        # In float64 first: of a total energy, float32 would lose the digits that tell molecules apart.
        return ((values.double() - self.mean) / self.std).float()


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
    standard: Standard = field(default_factory=Standard)

    apart: ClassVar[frozenset[str]] = Regression.apart | {"unit", "standard"}

    @property
    def metrics(self) -> Sequence[Metric]:
        return (ErrorInUnits(self.unit, self.standard),)

    def distance(self, number: Tensor, known: Tensor) -> Tensor:
        return F.mse_loss(number, known, reduction="none")

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The number in its unit, (N,); called "standardised" of a run whose run.json lacks both."""
        number = prediction.squeeze(1)
        if not self.standard.known:
            return {"standardised": number}
        return {"number": number.float() * self.standard.std + self.standard.mean}
