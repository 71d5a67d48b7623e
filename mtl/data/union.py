"""Several data sets as one: every sample has the labels of its own part, and none of the other parts' tasks.

Example::

    python train.py data=union "data.parts=[synthetic,rooms]" data.parts.rooms.height=32 data.parts.rooms.width=32

A task of the same name in two parts is one task, with labels in both. A part's own options, such as limit_train or
val_fraction, apply to the part; the union's apply to all samples together.

Two kinds of batches. By default all samples are mixed, and a batch holds whatever comes. With balanced=true every batch
holds a fixed number of samples of each part ("one loader per task"): see `mtl.data.draws.PartDraws`.

Different from LibMTL, in which each part runs through the network by itself: all parts of a batch run together. So
batch norm sees the mean and variance of all parts. Losses are the same: means over each task's labelled samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark
from mtl.data.columns import Batch, Column, Split, join
from mtl.data.draws import Draws, PartDraws, spread
from mtl.data.inputs import Image, Input
from mtl.data.labels import unlabelled
from mtl.errors import ConfigError, SetupError, UserError
from mtl.tasks import Task
from mtl.views import Augment

PART = "union.part"  # column with the number of each sample's part; no task's column can have a dot


@dataclass
class Parts(Benchmark):
    """The base class: a data set that is made of others.

    Args:
        batch_size: samples in a step, of all parts together; None for the sum of the parts' own batch sizes.
        balanced: every step has samples of each part: as many as the part's own batch size, or equally many if
            `batch_size` is given. Otherwise all samples are mixed.

    Raises:
        ValueError: the batch cannot be divided equally.
    """

    batch_size: Annotated[int, Ge(1)] | None = None
    balanced: bool = False

    option: ClassVar[str] = ""  # config key of the parts, for messages

    def __post_init__(self) -> None:
        sizes = [member.batch_size for member in self.members.values()]
        if self.batch_size is None:
            self.batch_size = sum(sizes)
        elif self.balanced and self.batch_size % len(sizes):
            raise ValueError(f"batch_size: {self.batch_size} samples cannot be divided into {len(sizes)} equal parts")
        else:
            sizes = [self.batch_size // len(sizes)] * len(sizes)
        self.shares = tuple(sizes) if self.balanced else None

    @property
    @abstractmethod
    def members(self) -> Mapping[str, Benchmark]:
        """The parts by name."""

    def prefix(self, part: str) -> str:
        """What the names of a part's tasks begin with, in the union."""
        return ""

    @cached_property
    def tasks(self) -> Sequence[Task]:
        """The tasks of all parts."""
        found: dict[str, tuple[str, Task]] = {}
        for part in self.members:
            for task in self._tasks_of(part):
                first, same = found.setdefault(task.name, (part, task))
                if same != task:
                    where = f"{first} and {part} both have a task {task.name!r}, with other labels"
                    raise ConfigError(f"data.parts: {where}; data.separate=true makes two tasks of them")
        tasks = tuple(task for _, task in found.values())
        for part in self.members:
            own = self._tasks_of(part)
            for task in tasks:
                if task not in own and (mixed := [one.name for one in own if one.column == task.column]):
                    where = f"{mixed[0]} of {part} and {task.name} of {found[task.name][0]}"
                    raise ConfigError(
                        f"data.parts: {where} have their labels in one column, {task.column!r}; data.separate=true "
                        "makes two columns of them"
                    )
        return tasks

    @cached_property
    def inputs(self) -> Mapping[str, Input]:
        """What the network reads: the same of all parts."""
        (first, one), *others = self.members.items()
        for part, member in others:
            if list(member.inputs) != list(one.inputs):
                names = [", ".join(each.inputs) for each in (one, member)]
                raise ConfigError(f"data.parts: the network reads {names[0]} of {first}, and {names[1]} of {part}")
            for name, kind in member.inputs.items():
                self._compare(name, (first, one.inputs[name]), (part, kind))
        return one.inputs

    @cached_property
    def augment(self) -> Sequence[Augment]:
        """Each kind of view that a part has, to check the label maps. Training takes each part's own: see `draws`."""
        every = [one for member in self.members.values() for one in member.augment]
        return tuple({type(one): one for one in every}.values())

    @property
    def columns(self) -> list[str]:
        return [*super().columns, PART]

    def facts(self) -> dict[str, Any]:
        """The facts of each part that has some, by the part's name."""
        return {part: facts for part, member in self.members.items() if (facts := member.facts())}

    def recall(self, facts: Mapping[str, Any]) -> None:
        for part, own in facts.items():
            self.members[part].recall(own)

    def open_table(self, file: Path) -> tuple[list[str], Batch]:
        """As the first part that reads tables; all parts have the same inputs."""
        reads = [one for one in self.members.values() if type(one).open_table is not Benchmark.open_table]
        return reads[0].open_table(file) if reads else super().open_table(file)

    def load(self) -> dict[str, Split]:
        loaded: dict[str, dict[str, Split]] = {}
        for part, member in self.members.items():
            try:
                loaded[part] = member.splits()
            except UserError as error:
                raise type(error)(f"{self.option}{part}: {error}") from error
        names = {name for splits in loaded.values() for name in splits}
        order = [name for name in ("train", "val", "test") if name in names]
        for part, splits in loaded.items():
            if lacking := names - set(splits):
                other = next(one for one, own in loaded.items() if lacking <= set(own))
                raise ConfigError(
                    f"data.parts: {other} has validation data, and {part} has none; set "
                    f"data.parts.{part}.val_fraction, too"
                )
        try:
            return {name: self._joined({part: own[name] for part, own in loaded.items()}) for name in order}
        except ValueError as error:
            raise SetupError(f"data.parts: {error}") from error

    def draws(self, train: Split) -> Draws:
        plain, part = super().draws(train), train.column(PART)
        batch, shares = plain.batch, self.shares
        if shares is not None:
            # A part of which limit_train has left nothing is not in the batches.
            batch = sum(share for p, share in enumerate(shares) if bool((part == p).any()))
        augments = [tuple(member.augment) for member in self.members.values()]
        return PartDraws(plain.size, batch, plain.augment, plain.picture, part, augments, shares)

    def _compare(self, name: str, one: tuple[str, Input], other: tuple[str, Input]) -> None:
        """Raises:
        ConfigError: the network reads the column `name` of two parts in different ways.
        """
        (first, here), (part, there) = one, other
        if type(here) is not type(there) or here.shape != there.shape:
            shown = [f"{type(i).__name__} of the shape {i.shape}" for i in (here, there)]
            raise ConfigError(f"data.parts: {name} is {shown[0]} in {first}, and {shown[1]} in {part}; they must agree")
        if vars(here) != vars(there):
            cure = "set data.mean and data.std"
            if not isinstance(here, Image):  # `data=table` takes mean and std from a table's own training rows
                table = "write both into one table, where an empty cell is a missing label"
                cure = f"{table}, or give both the same mean and std"
            raise ConfigError(f"data.parts: {name} is normalised differently in {first} and {part}; {cure}")

    def _tasks_of(self, part: str) -> list[Task]:
        """The tasks of one part, as the union calls them."""
        tasks, start = self.members[part].tasks, self.prefix(part)
        return [replace(t, name=start + t.name, target=start + t.column) if start else t for t in tasks]

    def _joined(self, splits: Mapping[str, Split]) -> Split:
        """One split of all parts. Every stretch of it has samples of each part, in proportion."""
        rows = {p: torch.arange(len(one)) if one.rows is None else one.rows for p, one in splits.items()}
        columns = {name: join([(one.columns[name], rows[p]) for p, one in splits.items()]) for name in self.inputs}
        for task in self.tasks:
            if task.column not in columns:
                columns[task.column] = self._labels(task, splits, rows)
        sizes = [len(split) for split in splits.values()]
        columns[PART] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return Split(columns, spread(sizes))

    def _labels(self, task: Task, splits: Mapping[str, Split], rows: Mapping[str, Tensor]) -> Column:
        """A task's labels in all parts: no label where a part has no such task."""
        known = {}
        for part, split in splits.items():
            if task in self._tasks_of(part):
                known[part] = split.columns[task.column.removeprefix(self.prefix(part))]
        none = unlabelled(task, next(iter(known.values())))
        pieces = [(known[p], own) if p in known else (none, torch.zeros_like(own)) for p, own in rows.items()]
        try:
            return join(pieces)
        except ValueError as error:
            raise ValueError(f"labels of task {task.name!r} in {' and '.join(known)}: {error}") from error


@dataclass
class Union(Parts):
    """A union of any data sets whose inputs have the same shape.

    Args:
        parts: the data sets by name. On the command line, a list of data options.
        separate: all tasks are named PART_TASK. So two parts may have different tasks of one name.
        mean, std: of the images of all parts; None for the parts' own, which must then be the same.

    Raises:
        ValueError: there is no part.
    """

    parts: Mapping[str, Benchmark] = field(kw_only=True)
    separate: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    option: ClassVar[str] = "data.parts."

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping) or not self.parts:
            raise ValueError("parts: at least one data set is needed, as in data.parts=[digits]")
        for name, part in self.parts.items():
            if not isinstance(part, Benchmark):
                raise ValueError(f"parts: {name} must be a Benchmark, not {part!r:.60}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"{'mean' if self.mean is None else 'std'}: must be set, too")
        super().__post_init__()

    @property
    def members(self) -> Mapping[str, Benchmark]:
        return self.parts

    def prefix(self, part: str) -> str:
        return f"{part}_" if self.separate else ""

    @cached_property
    def inputs(self) -> Mapping[str, Input]:
        return {
            name: Image(one.shape, self.mean, self.std) if isinstance(one, Image) and self.mean is not None else one
            for name, one in super().inputs.items()
        }

    def _compare(self, name: str, one: tuple[str, Input], other: tuple[str, Input]) -> None:
        if self.mean is not None and isinstance(one[1], Image) and isinstance(other[1], Image):
            one, other = ((part, Image(image.shape)) for part, image in (one, other))
        super()._compare(name, one, other)
