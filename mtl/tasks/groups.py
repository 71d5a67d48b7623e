"""Tasks that are alike are computed together, so that 40 attributes cost about as much as one task.

Tasks are alike if they read columns of one matrix (`Task.index`) and differ in nothing else except their names, and
fields that play no part in a step, such as a unit (`Task.apart`).
Everywhere else they stay T separate tasks. Here, the predictions of K alike tasks are stacked:

- Losses: `criterion` and `units` work on each sample by itself. So the K·N predictions are one batch of K·N samples.
- Metrics: `update` runs once for K states, under `torch.vmap`. If it cannot, such as for a metric that calls a library,
  it runs once for each task.

A task that is like no other one is computed by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.metrics.base import Metric
from mtl.metrics.tally import Tally
from mtl.tasks.base import Task
from mtl.tasks.predictions import Predictions

Labels = Mapping[str, Tensor]  # a batch: its columns by name
Units = Sequence[Tensor]  # for each group of alike tasks (K, N) int64, the labelled units of each task and sample


def alike(kind: Callable[..., Task], names: Sequence[str], *, target: str, **arguments: Any) -> tuple[Task, ...]:
    """K tasks of one kind whose labels are the columns of one matrix (N, K). They are computed together.

    Example: ``tasks = alike(Classification, ["smiling", "young"], outputs=2, target="attributes")``.

    Args:
        kind: class of the tasks.
        names: of the tasks, in the order of the matrix's columns.
        target: name of the data set's column that holds the matrix.
        arguments: further arguments, the same for all tasks.
    """
    return tuple(kind(name, target=target, index=i, **arguments) for i, name in enumerate(names))


def places_of_alike(tasks: Sequence[Task]) -> list[list[int]]:
    """The positions of the tasks, those of alike tasks in one list. A task like no other one has a list of its own."""
    found: list[list[int]] = []
    for i, task in enumerate(tasks):
        same = next((places for places in found if _alike(tasks[places[0]], task)), None)
        if same is None:
            found.append([i])
        else:
            same.append(i)
    return found


def _alike(a: Task, b: Task) -> bool:
    if a.index is None or b.index is None or type(a) is not type(b):
        return False
    keys = {*vars(a), *vars(b)} - a.apart
    return all(_same(vars(a).get(key), vars(b).get(key)) for key in keys)


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # arrays have no single answer
        return False


class Groups:
    """The tasks of a run, with everything that is computed for all of them: losses, counts, metrics.

    Args:
        tasks: in the order of the predictions.
    """

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = list(tasks)
        self._groups = [_Group([self.tasks[i] for i in places], places) for places in places_of_alike(self.tasks)]

    def units(self, batch: Labels) -> Units:
        """The labelled units of each sample. A step counts them once, and hands them to what needs them."""
        return [group.units(batch) for group in self._groups]

    def losses(self, predictions: Sequence[Any], batch: Labels, units: Units | None = None) -> list[Tensor]:
        """T scalars: the mean loss over each task's labelled units, as `Task.loss`.

        Args:
            units: of `units(batch)`, if they are known already.
        """
        units = self.units(batch) if units is None else units
        pairs = zip(self._groups, units, strict=True)
        return self._ordered(group.losses(predictions, batch, known) for group, known in pairs)

    def sums(self, predictions: Sequence[Any], batch: Labels) -> Tensor:
        """(T,) the loss of each task, summed over its labelled units."""
        return self._joined([group.sums(predictions, batch) for group in self._groups])

    def counts(self, units: Units) -> Tensor:
        """(T,) int64, the number of labelled units of each task."""
        return self._joined([known.sum(1) for known in units])

    def labelled(self, units: Units) -> Tensor:
        """(N, T) bool: whether sample n has a label of task t."""
        return self._joined([known > 0 for known in units]).T

    def update(self, predictions: Sequence[Any], batch: Labels, tally: Tally, training: bool = False) -> None:
        """Add a batch to the states of all metrics in `tally`.

        Args:
            training: whether it is a training batch, on which some metrics are not measured.
        """
        for group in self._groups:
            prediction, target = group.prediction(predictions), group.target(batch)
            for name, metric in group.metrics.items():
                if metric.training or not training:
                    tally.update(name, metric, prediction, target)

    def scores(self, place: int, read: Mapping[str, Tensor]) -> dict[str, float]:
        """{score name: value} of one task's metrics, from the states that `update` has added up.

        A metric without a state was not measured, and has no score here.

        Args:
            place: position of the task.
            read: as from `Tally.read`.
        """
        group = next(group for group in self._groups if place in group.places)
        found = {}
        for state, metric in zip(group.states(place, read), self.tasks[place].metrics, strict=True):
            if state is None:
                continue
            values = metric.compute(state)
            found |= {score.name: values[score.name] for score in metric.scores}
        return found

    def _joined(self, found: Sequence[Tensor]) -> Tensor:
        """(T, …) the groups' results (K, …), in the order of the tasks."""
        if len(found) == 1:  # then the places are 0, 1, 2, …
            return found[0]
        return torch.stack(self._ordered(rows.unbind() for rows in found))

    def _ordered(self, found: Iterator[Sequence[Tensor]]) -> list[Tensor]:
        """The results of all groups, in the order of the tasks."""
        ordered: list[Any] = [None] * len(self.tasks)
        for group, results in zip(self._groups, found, strict=True):
            for place, result in zip(group.places, results, strict=True):
                ordered[place] = result
        return ordered


class _Group:
    """K alike tasks, or one task. Its methods return one result for each task.

    Args:
        tasks: the tasks.
        places: their positions among all tasks.
    """

    def __init__(self, tasks: Sequence[Task], places: Sequence[int]):
        self.places, self.first, self.size = places, tasks[0], len(tasks)
        self.alone = self.size == 1
        self._columns = _columns([task.index for task in tasks])
        several = {} if self.alone else {"tasks": self.size}
        self.metrics = {
            f"{self.first.name}/{i}": _Several(metric, **several) if several else metric
            for i, metric in enumerate(self.first.metrics)
        }  # a name with a slash: no task's name contains one

    def prediction(self, predictions: Sequence[Any]) -> Any:
        """(K, N, …) the tasks' predictions; of a single task, its prediction."""
        if self.alone:
            return predictions[self.places[0]]
        if isinstance(predictions, Predictions):
            return predictions.stack(self.places)
        return torch.stack([predictions[i] for i in self.places])

    def target(self, batch: Labels) -> Tensor:
        """(K, N, …) the tasks' labels; of a single task, its labels (N, …)."""
        column = batch[self.first.column]
        if self.alone:
            return self.first.select(column)
        if isinstance(self._columns, slice):
            return column[:, self._columns].movedim(1, 0)
        # Not column[:, list]: a list would be copied to the device in every step.
        return torch.stack([column[:, i] for i in self._columns])

    def losses(self, predictions: Sequence[Any], batch: Labels, units: Tensor) -> Sequence[Tensor]:
        prediction, target = self.prediction(predictions), self.target(batch)
        if self.alone:
            if type(self.first).loss is not Task.loss:  # a user's own mean counts for itself
                return [self.first.loss(prediction, target)]
            return [self.first.mean_loss(prediction, target, units[0])]
        losses = self.first.checked_losses(prediction.flatten(0, 1), target.flatten(0, 1), units.flatten())
        losses = losses.view(self.size, -1)
        # As in `Task.loss`, for each row.
        factor = losses.shape[1] / units.sum(1).clamp(min=1).to(losses.dtype)
        return (losses.mean(1) * factor).unbind()

    def sums(self, predictions: Sequence[Any], batch: Labels) -> Tensor:
        prediction, target = self.prediction(predictions), self.target(batch)
        if self.alone:
            return self.first.criterion(prediction, target).sum()[None]
        losses = self.first.criterion(prediction.flatten(0, 1), target.flatten(0, 1))
        return losses.view(self.size, -1).sum(1)

    def units(self, batch: Labels) -> Tensor:
        target = self.target(batch)
        if self.alone:
            return self.first.units(target)[None]
        return self.first.units(target.flatten(0, 1)).view(self.size, -1)

    def states(self, place: int, read: Mapping[str, Tensor]) -> list[Tensor | None]:
        """The metric states of one task; None for a metric that was not measured."""
        states = [read.get(name) for name in self.metrics]
        return states if self.alone else [None if s is None else s[self.places.index(place)] for s in states]


class _Several:
    """One metric of K alike tasks: the state has one row for each task."""

    def __init__(self, metric: Metric, tasks: int):
        self.metric, self.tasks, self.training = metric, tasks, metric.training
        self._together: bool | None = None  # whether `update` can run for all tasks at once; None: not tried yet

    def zero(self) -> Tensor:
        zero = self.metric.zero()
        return zero.expand(self.tasks, *zero.shape).clone()

    def update(self, state: Tensor, prediction: Any, target: Any) -> None:
        if self._together is None:
            self._together = self._works(torch.zeros_like(state), prediction, target)
        if self._together:
            self._at_once(state, prediction, target)
        else:
            for row, p, t in zip(state, prediction, target, strict=True):
                self.metric.update(row, p, t)

    def _at_once(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        def update(row: Tensor, p: Tensor, t: Tensor) -> Tensor:
            self.metric.update(row, p, t)
            return row

        torch.vmap(update)(state, prediction, target)

    def _works(self, state: Tensor, prediction: Tensor, target: Tensor) -> bool:
        """Try it on a state of its own, because a failing update may have changed a part of the state."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # vmap warns of functions that it runs once for each task, and slowly
                self._at_once(state, prediction, target)
        except Exception:  # whatever a metric does that vmap cannot: `.item()`, NumPy, `if` on a value
            return False
        return True


def check_alike(tasks: Sequence[Task], predictions: Sequence[Any], batch: Labels) -> None:
    """Check on a small batch that alike tasks get the same results together as each one by itself.

    Raises:
        ValueError: a loss or a metric does not; the message names the task.
    """
    groups = Groups(tasks)
    if len(groups._groups) == len(tasks):
        return
    tally = Tally(batch[tasks[0].column].device)
    losses = groups.losses(predictions, batch)
    groups.update(predictions, batch, tally)
    read = tally.read()
    for i, task in enumerate(tasks):
        target, single = task.select(batch[task.column]), Tally(losses[i].device)
        single.add("loss", task.loss(predictions[i], target))
        for k, metric in enumerate(task.metrics):
            single.update(f"/{k}", metric, predictions[i], target)
        alone = single.read()
        what = "loss", losses[i].double().cpu(), alone.pop("loss")
        group = next(group for group in groups._groups if i in group.places)
        names = [f"metric {type(metric).__name__}" for metric in task.metrics]
        for name, found, expected in [what, *zip(names, group.states(i, read), alone.values(), strict=True)]:
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise ValueError(
                    f"task {task.name!r}: its {name} is another one when it is computed together with the tasks that "
                    f"are like it, from the column {task.column!r}. Each sample must count by itself, and what differs "
                    "between tasks must be a field of the task; or give each task a column of its own, without index"
                )


def _columns(indices: Sequence[int | None]) -> slice | Sequence[int]:
    """The columns as a slice if they follow each other; otherwise as they are."""
    first = indices[0]
    if first is None or list(indices) != list(range(first, first + len(indices))):
        return [i for i in indices if i is not None]
    return slice(first, first + len(indices))
