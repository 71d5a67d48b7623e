"""What a loop tells a strategy of its epochs, and the checks of it: progress, mean losses and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mtl.losses.arguments import integer

LARGEST = torch.finfo(torch.float32).max  # what a method's own numbers can hold


@dataclass(frozen=True)
class Statistics:
    """What an epoch tells a strategy: training and validation figures, never the test set's.

    losses: (T,) mean unweighted training loss of each task over the epoch; NaN where a task had no label all epoch.
    scores: (T,) each task's main metric as it is printed (accuracies in percent), on validation data where the run
        has some, else on the training batches; NaN as above. None in a loop that has no metrics.
    higher_is_better: (T,) bool, the direction of the scores.
    percent: whether accuracies are in percent for certain. Then a score of 0.5 is half a percent; else a method that
        needs percents takes it for a fraction, and refuses it.
    """

    losses: Tensor
    scores: Tensor | None = None
    higher_is_better: Tensor | None = None
    percent: bool = False


def check_progress(epoch: Any, epochs: Any) -> tuple[int, int]:
    """`epoch` and `epochs` as Python integers. An epoch past the last one is allowed: a training may be prolonged.

    Raises:
        ValueError: one of them is no integer, the epoch is negative, or there is no epoch at all.
    """
    epoch, epochs = integer("epoch", epoch), integer("epochs", epochs)
    if epochs < 1:
        raise ValueError(f"epochs: {epochs}; the number of all epochs is at least 1, as in epoch_start(epoch, epochs)")
    if epoch < 0:
        raise ValueError(f"epoch: {epoch}; epochs are counted from 0")
    return epoch, epochs


def once_an_epoch(epoch_end: Callable[..., Any]) -> Callable[..., Any]:
    """A method's `epoch_end` that refuses to learn from the same epoch twice.

    A loop that never calls `epoch_start` says with each `epoch_end` that one more epoch is over.
    """

    @wraps(epoch_end)
    def wrapper(strategy: Any, *args: Any, **kwargs: Any) -> Any:
        calls = strategy.calls
        if calls.epoch_starts and calls.ended:
            raise RuntimeError(
                f"{type(strategy).__name__}: epoch_end was called twice in epoch {strategy.epoch}; call "
                "strategy.epoch_start(epoch, epochs) before each epoch, strategy.epoch_end(statistics) once after it"
            )
        return epoch_end(strategy, *args, **kwargs)

    return wrapper


def mean_losses(strategy: Any, statistics: Statistics) -> Tensor:
    """(T,) the mean losses, for a method that takes logarithms or ratios of them; NaN where a task had no label.

    Raises:
        ValueError: one is negative or infinite; the message names method, task and epoch.
    """
    losses = statistics.losses.detach()
    for i, value in enumerate(losses.tolist()):
        if value < 0 or value > LARGEST:
            kind = "too large" if value > 0 else "negative"
            cure = "lower the learning rate" if value > 0 else "add a constant to the loss"
            raise ValueError(
                f"losses[{i}]: {type(strategy).__name__} takes logarithms or ratios of mean losses, and the mean "
                f"loss of {strategy.names[i]} is {kind} ({value:.4g}) in epoch {strategy.epoch + 1}; {cure}"
            )
    return losses


def finite_scores(strategy: Any, statistics: Statistics) -> Tensor:
    """(T,) the scores; NaN where a task had no label.

    Raises:
        ValueError: there are none, or one is infinite.
    """
    if statistics.scores is None:
        raise ValueError(
            f"scores: {type(strategy).__name__} weighs the tasks by their scores, and Statistics holds none; "
            "give Statistics(losses, scores, higher_is_better)"
        )
    scores = statistics.scores.detach()
    for i, value in enumerate(scores.tolist()):
        if abs(value) > LARGEST:
            refuse_score(strategy, i, value, "must be finite (in float32), or NaN for a task without a label")
    return scores


def refuse_score(strategy: Any, i: int, value: float, why: str) -> None:
    """Raises:
    ValueError: always; it names the method, the task and the epoch.
    """
    raise ValueError(
        f"scores[{i}] ({strategy.names[i]}): {value:.4g} in epoch {strategy.epoch + 1}; for {type(strategy).__name__} "
        f"a score {why}"
    )


def check_unit(strategy: Any, statistics: Statistics, references: Tensor | None = None) -> None:
    """Accuracies and what they are compared with have one unit.

    Args:
        references: (T,) scores that the method was given; None stands for percents.

    Raises:
        ValueError: scores up to 1 beside references above 1, or the reverse, of all tasks whose score is better when
            higher.
    """
    scores, higher = statistics.scores, statistics.higher_is_better
    higher = torch.ones_like(scores, dtype=torch.bool) if higher is None else higher.to(scores.device)
    known = higher & ~scores.isnan()
    found = scores[known].tolist()
    wanted = [100.0] * len(found) if references is None else references.to(scores.device)[known].tolist()
    shown = ", ".join(f"{value:.4g}" for value in found)
    name = type(strategy).__name__
    small = any(found) and all(0 <= s <= 1 < w for s, w in zip(found, wanted, strict=True))
    if small and not statistics.percent and not strategy.calls.epoch_ends:  # later they are a training that has failed
        raise ValueError(
            f"scores: {shown} look like fractions, but {name} needs accuracies in percent; multiply them by 100 "
            "(or say Statistics(..., percent=True) if they are percents)"
        )
    if found and all(0 < w <= 1 < s and s > 2 * w for s, w in zip(found, wanted, strict=True)):
        given = ", ".join(f"{value:.4g}" for value in wanted)
        raise ValueError(
            f"{strategy.single_task_argument}: {given} look like fractions beside scores of {shown}; give {name} both "
            "in one unit, accuracies in percent"
        )
