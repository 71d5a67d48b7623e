"""Labels that are taken away, or were never there: a share of the labels, and samples without a task's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.data.check import pieces
from mtl.data.columns import Column, Joined, Ragged, Split, join
from mtl.errors import suggest
from mtl.random import stream
from mtl.tasks import Task


def unlabelled(task: Task, column: Column) -> Column:
    """A column of one sample without a label, with rows like those of `column`.

    Raises:
        ValueError: the task takes every value for a label.
    """
    if isinstance(column, Ragged):
        one: Column = Ragged(column.values[:0], torch.tensor([-1]))
    else:
        one = task.missing(column.shape[1:], column.dtype)[None]
    if bool(task.labelled(one).any()):
        kind = type(task).__name__
        raise ValueError(f"task {task.name!r} cannot be without a label: {kind}.units counts {kind}.missing() as one")
    return one


def shares(fraction: float | Mapping[str, float], tasks: Sequence[Task]) -> dict[str, float]:
    """{column: share of the labels that are kept}, without the columns that keep all.

    Raises:
        ValueError: there is no such task, or two tasks share a column and not the number.
    """
    if isinstance(fraction, Mapping):
        names = [task.name for task in tasks]
        for name in fraction:
            if name not in names:
                raise ValueError(f"there is no task {name!r}, only {', '.join(names)}{suggest(name, names)}")
    found: dict[str, float] = {}
    for task in tasks:
        share = fraction.get(task.name, 1.0) if isinstance(fraction, Mapping) else fraction
        if found.setdefault(task.column, share) != share:
            first = next(one.name for one in tasks if one.column == task.column)
            raise ValueError(f"{first} and {task.name} share the column {task.column!r}; give both the same number")
    return {column: share for column, share in found.items() if share < 1}


def keep_labels(split: Split, fraction: float | Mapping[str, float], tasks: Sequence[Task]) -> Split:
    """The same samples with fewer labels. Which ones are kept depends on no run's seed, and 10 % are among the 20 %.

    Args:
        fraction: share of the labelled samples that keep their label, at least one; by task, or one for all.

    Raises:
        ValueError: as in `shares` and `unlabelled`.
    """
    columns = dict(split.columns)
    for name, share in shares(fraction, tasks).items():
        task = next(one for one in tasks if one.column == name)
        have = torch.cat([task.labelled(part) for part in pieces(split, name)]).nonzero().flatten()
        order = torch.randperm(len(have), generator=stream(0, "label_fraction", name))
        lost = have[order[max(1, round(len(have) * share)) :]]
        columns[name] = _without(columns[name], split.positions(lost), task)
    return Split(columns, split.rows)


def _without(column: Column, rows: Tensor, task: Task) -> Column:
    """The column with no label in the given rows. The column itself stays as it is."""
    chosen = torch.arange(len(column))
    # One row is added to the column, which holds no label. It stands wherever a label is lost.
    longer = join([(column, chosen), (unlabelled(task, column), torch.zeros(1, dtype=torch.int64))])
    chosen[rows] = len(column)
    return longer.pick(chosen) if isinstance(longer, Joined) else longer.take(chosen)
