"""Learning-rate schedules as pure functions of progress. They have no state, so a resumed run is exact.

One exception is `Plateau`, which follows a metric. Its state is saved with the run.

Every schedule multiplies the learning rate of every parameter group by `factor(progress, epochs)`. `progress` counts
epochs from 0; with `interval="step"` it has a fraction. A linear warm-up may come first. Its factor multiplies the
first rate of the schedule:

    interval=epoch    (progress + 1) / (warmup_epochs + 1)
    interval=step     progress / warmup_epochs
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from mtl.config.constructors import check_hinted
from mtl.config.schema import hints_of
from mtl.errors import suggest


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

    def rate(self, initial: float, progress: float, epochs: int) -> float:
        """The learning rate at `progress`, from the initial one."""
        return initial * self(progress, epochs)

    def check(self, names: Sequence[str], tasks: int) -> None:  # noqa: B027
        """Check that the schedule fits the run, before training.

        Args:
            names: of all results that `epoch_end` will be given.
            tasks: their number.

        Raises:
            ValueError: it does not; the message begins with the argument's name.
        """

    def epoch_end(self, values: Mapping[str, float], mains: Mapping[str, bool]) -> None:  # noqa: B027
        """Learn from an epoch's results. Most schedules do nothing.

        Args:
            values: {"fine_loss": …, "fine_accuracy": …} on validation data, or on training data if there is none.
            mains: {main metric of each task: whether higher is better}, in the order of the tasks.
        """

    def reads(self, mains: Sequence[str]) -> Sequence[str]:
        """The names of the metrics that `epoch_end` reads. `mains` are the main ones of all tasks."""
        return ()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the progress: numbers by name."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from `state`; an empty one is the state before the first epoch."""

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


@dataclass
class Plateau(Schedule):
    """Multiplied by `gamma` when a result has not improved for more than `patience` epochs (ReduceLROnPlateau).

    The result comes from validation data, or from the training batches if there is none. It never comes from test data.
    An improvement is a change by more than a ten-thousandth of the best result, as in torch. (torch multiplies the best
    result by 0.9999, so that even a worse result improves on a negative one. Here it must be better.)

    Args:
        gamma: the factor.
        patience: epochs without an improvement that are accepted.
        min_lr: no learning rate falls below it; a rate that starts below it never falls.
        metric: the result, such as "u0_mae" or "fine_accuracy"; empty for the mean of all tasks' losses.
        baselines: for each task the main metric of its single-task model. The result is then Δm, the mean relative loss
            against them, as in Nash-MTL and FAMO; `metric` must be empty.
    """

    interval: Literal["epoch"] = "epoch"
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.1
    patience: Annotated[int, Ge(0)] = 10
    min_lr: Annotated[float, Ge(0)] = 0.0
    metric: str = ""
    baselines: Sequence[float] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric and self.baselines:
            raise ValueError("metric: leave it empty where baselines are given, which decide by Δm")
        if not all(self.baselines):
            raise ValueError("baselines: Δm divides by them, so none may be 0")
        self.load_state({})

    def factor(self, progress: float, epochs: int) -> float:
        return self.gamma**self._cuts

    def rate(self, initial: float, progress: float, epochs: int) -> float:
        return max(super().rate(initial, progress, epochs), min(initial, self.min_lr))

    def check(self, names: Sequence[str], tasks: int) -> None:
        if self.metric and self.metric not in names:
            known = ", ".join(names)
            raise ValueError(f"metric={self.metric}: none of {known}{suggest(self.metric, names)}")
        if self.baselines and len(self.baselines) != tasks:
            raise ValueError(f"baselines: {len(self.baselines)} numbers for {tasks} tasks; one for each is needed")

    def epoch_end(self, values: Mapping[str, float], mains: Mapping[str, bool]) -> None:
        value = self._result(values, mains)
        # A result is NaN if no sample has a label. That is no improvement.
        if value < self._best - 1e-4 * (abs(self._best) if math.isfinite(self._best) else 0.0):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited > self.patience:
            self._cuts, self._waited = self._cuts + 1, 0

    def reads(self, mains: Sequence[str]) -> Sequence[str]:
        return mains if self.baselines else [self.metric] if self.metric else ()

    def _result(self, values: Mapping[str, float], mains: Mapping[str, bool]) -> float:
        """The result, where less is better."""
        if self.metric:
            return values[self.metric] * (-1 if mains.get(self.metric, False) else 1)
        if self.baselines:
            rows = zip(self.baselines, mains.items(), strict=True)
            return _mean([(values[m] - b) / abs(b) * (-1 if higher else 1) for b, (m, higher) in rows])
        return _mean([value for name, value in values.items() if name.endswith("_loss")])

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "cuts": self._cuts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._best: float = state.get("best", math.inf)
        self._waited: int = state.get("waited", 0)
        self._cuts: int = state.get("cuts", 0)


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are numbers: a task without labels has NaN."""
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan
