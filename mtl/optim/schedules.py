"""Learning-rate schedules as pure functions of progress. They have no state, so a resumed run is exact.

Every schedule multiplies the learning rate of every parameter group by `factor(progress, epochs)`. `progress` counts
epochs from 0; with `interval="step"` it has a fraction. A linear warm-up may come first. Its factor multiplies the
first rate of the schedule:

    interval=epoch    (progress + 1) / (warmup_epochs + 1)
    interval=step     progress / warmup_epochs
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from mtl.config.constructors import check_hinted
from mtl.config.schema import hints_of


@dataclass
class Schedule(ABC):
    """Base class of the schedules.

    Args:
        warmup_epochs: epochs of linear warm-up; the schedule itself starts after them.
        interval: "epoch": the rate changes once an epoch; "step": it changes at every step.
    """

    warmup_epochs: Annotated[int, Ge(0)] = 0
    interval: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        check_hinted(hints_of(type(self)), vars(self), type(self).__name__)

    def __call__(self, progress: float, epochs: int) -> float:
        """Multiplier of the learning rate at `progress` out of `epochs` epochs. After the last epoch it stays constant.

        Raises:
            ValueError: the progress is negative, or no epoch is left after the warm-up.
        """
        if not progress >= 0:
            raise ValueError(f"progress: {progress}; epochs are counted from 0")
        if epochs <= self.warmup_epochs:
            raise ValueError(f"epochs: {epochs}; must be more than warmup_epochs={self.warmup_epochs}")
        # A training may go on after its planned end; the formulas hold up to that end only.
        progress = min(progress, epochs)
        if progress < self.warmup_epochs:
            offset = 1 if self.interval == "epoch" else 0  # otherwise the whole first epoch would train at rate 0
            return (progress + offset) / (self.warmup_epochs + offset) * self.factor(0.0, epochs - self.warmup_epochs)
        return self.factor(progress - self.warmup_epochs, epochs - self.warmup_epochs)

    @abstractmethod
    def factor(self, progress: float, epochs: int) -> float:
        """Multiplier without the warm-up; 0 <= progress <= epochs, counted from the end of the warm-up."""


@dataclass
class Constant(Schedule):
    """The rate never changes."""

    def factor(self, progress: float, epochs: int) -> float:
        return 1.0


@dataclass
class Cosine(Schedule):
    """Half a cosine from 1 to `final`: Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts.

    Args:
        final: multiplier at the end of the last epoch. With interval=epoch the last epoch itself is still above it.
    """

    final: Annotated[float, Ge(0), Le(1)] = 0.0

    def factor(self, progress: float, epochs: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress / epochs)) / 2


@dataclass
class StepDecay(Schedule):
    """Multiplied by `gamma` every `every` epochs."""

    every: Annotated[int, Ge(1)] = 30
    gamma: Annotated[float, Gt(0)] = 0.1

    def factor(self, progress: float, epochs: int) -> float:
        return self.gamma ** (int(progress) // self.every)


@dataclass
class MultiStep(Schedule):
    """Multiplied by `gamma` at each of the `milestones`, which count epochs after the warm-up."""

    milestones: Sequence[Annotated[int, Ge(1)]] = (60, 120, 160)
    gamma: Annotated[float, Gt(0)] = 0.2

    def factor(self, progress: float, epochs: int) -> float:
        return self.gamma ** sum(progress >= m for m in self.milestones)


@dataclass
class Polynomial(Schedule):
    """(1 − progress / epochs) ** power. With power 1 it is a straight line down to 0."""

    power: Annotated[float, Gt(0)] = 1.0

    def factor(self, progress: float, epochs: int) -> float:
        return (1 - progress / epochs) ** self.power


@dataclass
class OneCycle(Schedule):
    """Up from 1/`initial_divisor` to 1, then down to 1/(initial_divisor · final_divisor), both along half a cosine.

    Smith & Topin, "Super-Convergence", 2018. The optimizer's learning rate is the peak. The paper also cycles the
    momentum; here it stays constant.

    Args:
        peak: share of the run at which the peak is reached.
        initial_divisor: the peak divided by the first rate.
        final_divisor: the first rate divided by the last one.
    """

    interval: Literal["epoch", "step"] = "step"
    peak: Annotated[float, Gt(0), Lt(1)] = 0.3
    initial_divisor: Annotated[float, Gt(0)] = 25.0
    final_divisor: Annotated[float, Gt(0)] = 1e4

    def factor(self, progress: float, epochs: int) -> float:
        low, end = 1 / self.initial_divisor, 1 / (self.initial_divisor * self.final_divisor)
        done = progress / epochs
        if done < self.peak:
            start, stop, share = low, 1.0, done / self.peak
        else:
            start, stop, share = 1.0, end, (done - self.peak) / (1 - self.peak)
        return stop + (start - stop) * (1 + math.cos(math.pi * share)) / 2
