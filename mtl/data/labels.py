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
    if bool(task.labelled(task.select(one)).any()):
        kind = type(task).__name__
        raise ValueError(f"task {task.name!r} cannot be without a label: {kind}.units counts {kind}.missing() as one")
    return one


def shares(fraction: float | Mapping[str, float], tasks: Sequence[Task]) -> list[tuple[Task, float]]:
    """Each task that loses labels, and the share that it keeps. Of tasks with the same labels, the first one.

    Raises:
        ValueError: there is no such task, or two tasks share their labels and not the number.
    """
    if isinstance(fraction, Mapping):
        names = [task.name for task in tasks]
        for name in fraction:
            if name not in names:
                raise ValueError(f"there is no task {name!r}, only {', '.join(names)}{suggest(name, names)}")
    found: dict[tuple[str, int | None], tuple[Task, float]] = {}
    for task in tasks:
        share = fraction.get(task.name, 1.0) if isinstance(fraction, Mapping) else fraction
        first, same = found.setdefault((task.column, task.index), (task, share))
        if same != share:
            raise ValueError(
                f"{first.name} and {task.name} share the column {task.column!r}; give both the same number"
            )
    return [(task, share) for task, share in found.values() if share < 1]


def keep_labels(split: Split, fraction: float | Mapping[str, float], tasks: Sequence[Task]) -> Split:
    """The same samples with fewer labels. Which ones are kept depends on no run's seed, and 10 % are among the 20 %.

    Tasks lose their labels each by itself, even if they read one matrix.

    Args:
        fraction: share of the labelled samples that keep their label, at least one; by task, or one for all.

    Raises:
        ValueError: as in `shares` and `unlabelled`.
    """
    columns = dict(split.columns)
    cells: dict[str, list[tuple[Task, Tensor]]] = {}  # in matrices, by their columns' names
    for task, share in shares(fraction, tasks):
        have = torch.cat([task.labelled(task.select(part)) for part in pieces(split, task.column)]).nonzero().flatten()
        stream_name = task.column if task.index is None else task.name
        order = torch.randperm(len(have), generator=stream(0, "label_fraction", stream_name))
        lost = split.positions(have[order[max(1, round(len(have) * share)) :]])
        if task.index is None:
            columns[task.column] = _without(columns[task.column], lost, task)
        else:
            cells.setdefault(task.column, []).append((task, lost))
    for name, lost in cells.items():
        columns[name] = _without_cells(columns[name], lost)
    return Split(columns, split.rows)


def _without(column: Column, rows: Tensor, task: Task) -> Column:
    """The column with no label in the given rows. The column itself stays as it is."""
    # One row is added to the column, which holds no label. It stands wherever a label is lost.
    return _replaced(column, rows, unlabelled(task, column), torch.zeros_like(rows))


def _without_cells(column: Column, lost: Sequence[tuple[Task, Tensor]]) -> Column:
    """The matrix without a label in the given rows of the given tasks. The column itself stays as it is."""
    rows = torch.cat([own for _, own in lost]).unique()  # sorted
    # Only rows that lose a label are copied.
    empty = [unlabelled(task, column) for task, _ in lost]
    kind = join([(one, rows[:0]) for one in (column, *empty)]).dtype  # that can hold the marks of all tasks
    changed = column[rows].to(kind)
    for (task, own), none in zip(lost, empty, strict=True):
        changed[torch.searchsorted(rows, own), task.index] = task.select(none)[0].to(kind)
    return _replaced(column, rows, changed, torch.arange(len(rows)))


def _replaced(column: Column, rows: Tensor, other: Column, positions: Tensor) -> Column:
    """The column in which the given rows are rows of the column `other`, at `positions`."""
    chosen = torch.arange(len(column))
    longer = join([(column, chosen), (other, torch.arange(len(other)))])
    chosen[rows] = len(column) + positions
    return longer.pick(chosen) if isinstance(longer, Joined) else longer.take(chosen)
