"""The base class of every data set: tasks, inputs, the augmentation of its protocol, and the splits that it loads.

Example: `mtl.data.digits` is a complete one in forty lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt

from mtl.config import schema
from mtl.config.source import blame
from mtl.data.check import check_declared, check_loaded
from mtl.data.columns import Batch, Split
from mtl.data.draws import Draws
from mtl.data.inputs import Image, Input
from mtl.data.labels import keep_labels, shares
from mtl.errors import ConfigError, SetupError, UserError, one_line, out_of_memory
from mtl.random import stream
from mtl.tasks import Task
from mtl.views import Augment

Fraction = Annotated[float, Gt(0), Le(1)]


@dataclass
class Benchmark(ABC):
    """A data set with its tasks and augmentation. A subclass sets `tasks`, `inputs` and `augment`, and writes `load`.

    Args:
        batch_size: training samples in a step; the last batch of an epoch may be smaller.
        limit_train: use only the first `limit_train` training samples; None uses all.
        limit_test: use only the first `limit_test` test samples; None uses all.
        val_fraction: share of the training samples held out for validation, after limit_train. Every seed holds out the
            same samples, so that seeds differ in training only.
        residency: where inputs and labels live: on the training device, or on the host. auto: on the device if they
            fit into half of its free memory.
        workers: number of DataLoader processes, if the data stays on the host.
        eval_batch_size: samples that are evaluated together; more than in training, as no activations are kept.
        label_fraction: share of the training samples that keep their label, for each task or for all, of those that
            have one. Tasks lose labels each by itself. Every seed keeps the same ones, and a smaller share is a part of
            a larger one. Validation and test samples keep all labels.

    Attributes:
        tasks: the tasks. By default, the first task's main metric chooses the best epoch.
        select: "mean" chooses the best epoch by the mean of all tasks' main metrics instead, which must be of one kind.
        inputs: the columns that the network reads, by name. Images are called "image".
        augment: random views of the training images, applied in this order. Label maps follow their image.
    """

    batch_size: Annotated[int, Ge(1)] = 128
    limit_train: Annotated[int, Ge(1)] | None = None
    limit_test: Annotated[int, Ge(1)] | None = None
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    residency: Literal["auto", "device", "host"] = "auto"
    workers: Annotated[int, Ge(0)] = 2
    eval_batch_size: Annotated[int, Ge(1)] = 500
    label_fraction: Fraction | dict[str, Fraction] = 1.0

    tasks: ClassVar[Sequence[Task]]
    select: ClassVar[Literal["first", "mean"]] = "first"
    inputs: ClassVar[Mapping[str, Input]]
    augment: ClassVar[Sequence[Augment]] = ()

    @abstractmethod
    def load(self) -> Mapping[str, Split]:
        """Read the data: {"train": …, "test": …}, and "val" if the data set has its own validation data.

        It is called once, after all checks of the config.

        Raises:
            mtl.errors.SetupError: the data is missing, damaged or cannot be downloaded.
        """

    def facts(self) -> dict[str, Any]:
        """What the model needs and the class learns from its files, such as class names, in a form that JSON can hold.

        It is saved in run.json, so that the model can be used without these files.
        """
        return {}

    def recall(self, facts: Mapping[str, Any]) -> None:
        """Take the facts of a run's training, before anything else is asked for. It is called if there are any."""
        raise TypeError(f"{type(self).__name__} has facts(), so that it needs recall(facts), too")

    def open_table(self, file: Path) -> tuple[list[str], Batch]:
        """The samples in a table: what each is called, and the columns that the network reads.

        Raises:
            ValueError: the network reads no tables.
        """
        raise ValueError("the model reads no tables; give images, or its columns as an .npy or .npz file")

    @property
    def noun(self) -> str:
        """What a sample is called in messages."""
        return "image" if "image" in self.inputs else "sample"

    @property
    def columns(self) -> list[str]:
        """Names of the columns that inputs and tasks read."""
        return list(dict.fromkeys([*self.inputs, *(task.column for task in self.tasks)]))

    def example(self, size: int, generator: torch.Generator) -> Batch:
        """Random inputs of `size` samples, to try a network out before the data is loaded."""
        return {name: one.example(size, generator) for name, one in self.inputs.items()}

    def one(self) -> Batch:
        """Random inputs of one sample, the same at every call, to count a network's operations."""
        return self.example(1, torch.Generator().manual_seed(0))

    def splits(self) -> dict[str, Split]:
        """Load the data and check it. Then apply limit_train, limit_test, val_fraction, label_fraction, in this order.

        No tensor is copied.

        Returns:
            "train", "test" and maybe "val".

        Raises:
            mtl.errors.SetupError: `load` fails, or its splits do not fit the tasks or inputs.
        """
        try:
            loaded = self.load()
        except UserError:
            raise
        except Exception as error:  # whatever a user's own code raises
            if out_of_memory(error):  # not a mistake in the user's code: let the process end with its usual message
                raise
            what = f"{type(self).__name__}.load(): {type(error).__name__}: {one_line(error)}"
            raise SetupError(f"data: {what}{blame(error)}") from error
        check_loaded(self, loaded)
        # Columns that nobody reads are dropped here, such as the labels of tasks that a subclass leaves out. Otherwise
        # they would take memory on the device.
        splits = {name: split.only(self.columns) for name, split in loaded.items()}
        splits["train"] = splits["train"].select(slice(self.limit_train))
        splits["test"] = splits["test"].select(slice(self.limit_test))
        if self.val_fraction:
            splits = self._hold_out(splits)
        try:
            splits["train"] = keep_labels(splits["train"], self.label_fraction, self.tasks)
        except ValueError as error:
            raise ConfigError(f"data.label_fraction={self.label_fraction}: {error}") from error
        return splits

    def draws(self, train: Split) -> Draws:
        """Which training samples each epoch has, in which order and views."""
        images = (one.shape[1:] for one in self.inputs.values() if isinstance(one, Image))
        return Draws(len(train), self.batch_size, self.augment, next(images, None))

    def _hold_out(self, splits: dict[str, Split]) -> dict[str, Split]:
        if "val" in splits:
            name = type(self).__name__
            raise ConfigError(f"data.val_fraction={self.val_fraction}: {name} has validation data of its own; use 0")
        train, test = splits["train"], splits["test"]
        held_out = max(1, round(len(train) * self.val_fraction))
        # Seed 0, whatever the run's seed is: the validation samples are a part of the protocol.
        order = torch.randperm(len(train), generator=stream(0, "val_split"))
        # Sorted, because memory-mapped images are read faster in file order.
        val = train.select(order[:held_out].sort().values)
        return {"train": train.select(order[held_out:].sort().values), "val": val, "test": test}


def build_benchmark(node: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Benchmark:
    """Build the data set that a checked data node describes. No data is read yet.

    Args:
        facts: of the training of a run that is loaded; None otherwise.

    Raises:
        ConfigError: the class is not a Benchmark, or its class attributes do not fit together.
    """
    benchmark = schema.build(node, "data")
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(f"data.{schema.TARGET}={node[schema.TARGET]}: must make a Benchmark, not {benchmark!r:.60}")
    try:
        if facts:
            benchmark.recall(facts)
        check_declared(benchmark)
    except UserError:  # a file that says how large the images are is missing
        raise
    except Exception as error:
        # Our own errors begin with the attribute's name. Any other error comes from the user's code, such as a property
        # `tasks`; its message needs the kind of error, and the file and line.
        ours = isinstance(error, ValueError) and not blame(error)
        what = f".{error}" if ours else f": {type(error).__name__}: {one_line(error)}{blame(error)}"
        raise ConfigError(f"data: {type(benchmark).__name__}{what}") from error
    try:
        shares(benchmark.label_fraction, benchmark.tasks)
    except ValueError as error:
        raise ConfigError(f"data.label_fraction={benchmark.label_fraction}: {error}") from error
    return benchmark
