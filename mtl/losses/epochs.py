"""The results of an epoch that a method may learn from (mean losses and scores), with their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mtl.losses.arguments import integer

LARGEST = torch.finfo(torch.float32).max  # a method's buffers are float32


@dataclass(frozen=True)
class Statistics:
    """The results of an epoch for a method: training losses and validation metrics, never results of the test set.

    Attributes:
        losses: (T,) mean unweighted training loss of each task over the epoch; NaN if a task had no label in it.
        scores: (T,) each task's main metric; accuracies are in percent. Measured on validation data, or on the training
            batches if there is none. NaN if a task had no label. None in a loop without metrics.
        higher_is_better: (T,) bool, False for metrics that are errors.
        percent: whether it is certain that accuracies are in percent. If not, a score such as 0.5 is taken for a
            fraction, and refused by methods that need percent.
    """

    losses: Tensor
    scores: Tensor | None = None
    higher_is_better: Tensor | None = None
    percent: bool = False


def check_progress(epoch: Any, epochs: Any) -> tuple[int, int]:
    """`epoch` and `epochs` as Python integers. `epoch` may exceed `epochs`, because a training may be prolonged.

    Raises:
        ValueError: one of them is not an integer, `epoch` is negative, or `epochs` is less than 1.
    """
    epoch, epochs = integer("epoch", epoch), integer("epochs", epochs)
    if epochs < 1:
        raise ValueError(f"epochs: {epochs}; the number of all epochs is at least 1, as in epoch_start(epoch, epochs)")
    if epoch < 0:
        raise ValueError(f"epoch: {epoch}; epochs are counted from 0")
    return epoch, epochs


def once_an_epoch(epoch_end: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method's `epoch_end`, so that a second call in one epoch raises an error.

    In a loop that never calls `epoch_start`, each call of `epoch_end` counts as the end of another epoch.
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
    """(T,) the mean losses, for a method that takes their logarithms or ratios; NaN if a task had no label.

    Raises:
        ValueError: a mean loss is negative or infinite; the message names method, task and epoch.
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
    """(T,) the scores; NaN if a task had no label.

    Raises:
        ValueError: there are no scores, or a score is infinite.
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
    """Raise the error for a score that a method cannot use.

    Args:
        strategy: the method.
        i: number of the task.
        value: the score.
        why: the end of the message, such as "must be positive".

    Raises:
        ValueError: always; the message names the method, the task and the epoch.
    """
    raise ValueError(
        f"scores[{i}] ({strategy.names[i]}): {value:.4g} in epoch {strategy.epoch + 1}; for {type(strategy).__name__} "
        f"a score {why}"
    )


def check_unit(strategy: Any, statistics: Statistics, references: Tensor | None = None) -> None:
    """Check that scores and references have the same unit: 0.7 beside a reference of 70 is a fraction beside percent.

    Args:
        strategy: the method.
        statistics: the epoch's results.
        references: (T,) scores that the user gave to the method, such as single-task results; None means percent.

    Raises:
        ValueError: for all tasks whose score is better when higher, scores are at most 1 and references above 1, or the
            reverse.
    """
    scores, higher = statistics.scores, statistics.higher_is_better
    higher = torch.ones_like(scores, dtype=torch.bool) if higher is None else higher.to(scores.device)
    known = higher & ~scores.isnan()
    found = scores[known].tolist()
    wanted = [100.0] * len(found) if references is None else references.to(scores.device)[known].tolist()
    shown = ", ".join(f"{value:.4g}" for value in found)
    name = type(strategy).__name__
    # `any`, because scores of 0 may be in either unit.
    small = any(found) and all(0 <= s <= 1 < w for s, w in zip(found, wanted, strict=True))
    if small and not statistics.percent and not strategy.calls.epoch_ends:  # later, low scores mean a bad training
        raise ValueError(
            f"scores: {shown} look like fractions, but {name} needs accuracies in percent; multiply them by 100 "
            "(or say Statistics(..., percent=True) if they are percents)"
        )
    # s > 2 w, because a score may exceed its reference a little in the same unit, such as 1.1 beside 1.0.
    if found and all(0 < w <= 1 < s and s > 2 * w for s, w in zip(found, wanted, strict=True)):
        given = ", ".join(f"{value:.4g}" for value in wanted)
        raise ValueError(
            f"{strategy.single_task_argument}: {given} look like fractions beside scores of {shown}; give {name} both "
            "in one unit, accuracies in percent"
        )
