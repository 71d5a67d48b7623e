"""What a benchmark is: tasks, inputs, the augmentation of its protocol, and the splits that it loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt

from mtl.config import schema
from mtl.config.source import blame
from mtl.data.check import check_declared, check_loaded
from mtl.data.columns import Batch, Split
from mtl.data.inputs import Input
from mtl.errors import ConfigError, SetupError, UserError, one_line, out_of_memory
from mtl.random import stream
from mtl.tasks import Task
from mtl.views import Augment


@dataclass
class Benchmark(ABC):
    """A data set with its tasks and its protocol's augmentation. Subclass it, say the class attributes, write `load`.

    Args:
        batch_size: training samples a step; the last batch of an epoch may be smaller.
        limit_train: use only the first so many training samples.
        limit_test: use only the first so many test samples.
        val_fraction: share of the training samples held out for validation (after limit_train); the same samples
            for every seed, so that seeds differ in training only.
        residency: where inputs and labels live. auto: on the training device when they fit into half of its free
            memory.
        workers: DataLoader processes when the data stays on the host.
        eval_batch_size: samples that are evaluated together. They may be more than in training, as no gradient is kept.

    Attributes:
        tasks: the tasks; the first one's main score chooses the best epoch.
        inputs: what the network reads, by column. Images are called "image".
        augment: random views of the training images, in this order. All pictures of a sample follow: image and maps.
    """

    batch_size: Annotated[int, Ge(1)] = 128
    limit_train: Annotated[int, Ge(1)] | None = None
    limit_test: Annotated[int, Ge(1)] | None = None
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    residency: Literal["auto", "device", "host"] = "auto"
    workers: Annotated[int, Ge(0)] = 2
    eval_batch_size: Annotated[int, Ge(1)] = 500

    tasks: ClassVar[Sequence[Task]]
    inputs: ClassVar[Mapping[str, Input]]
    augment: ClassVar[Sequence[Augment]] = ()

    @abstractmethod
    def load(self) -> Mapping[str, Split]:
        """Read {"train": …, "test": …}, and "val" where the data set has validation data of its own.

        Called once, after all checks of the config.

        Raises:
            mtl.errors.SetupError: the data is missing, damaged or cannot be downloaded.
        """

    @property
    def columns(self) -> list[str]:
        """Names of the columns that inputs and tasks read."""
        return list(dict.fromkeys([*self.inputs, *(task.column for task in self.tasks)]))

    def example(self, size: int, generator: torch.Generator) -> Batch:
        """Random inputs of `size` samples, to try a network out before the data is loaded."""
        return {name: one.example(size, generator) for name, one in self.inputs.items()}

    def one(self) -> Batch:
        """Random inputs of one sample, always the same, to count what a network computes."""
        return self.example(1, torch.Generator().manual_seed(0))

    def splits(self) -> dict[str, Split]:
        """`train`, `test` and maybe `val`, limited as the fields say; they share what `load` returned.

        Raises:
            mtl.errors.SetupError: `load` fails, or what it returned does not fit the tasks or inputs.
        """
        try:
            loaded = self.load()
        except UserError:
            raise
        except Exception as error:  # whatever a user's own code raises
            if out_of_memory(error):
                raise
            what = f"{type(self).__name__}.load(): {type(error).__name__}: {one_line(error)}"
            raise SetupError(f"data: {what}{blame(error)}") from error
        check_loaded(self, loaded)
        # Other columns go no further, such as the labels of tasks that a subclass has dropped.
        splits = {name: split.only(self.columns) for name, split in loaded.items()}
        splits["train"] = splits["train"].select(slice(self.limit_train))
        splits["test"] = splits["test"].select(slice(self.limit_test))
        return self._hold_out(splits) if self.val_fraction else splits

    def _hold_out(self, splits: dict[str, Split]) -> dict[str, Split]:
        if "val" in splits:
            name = type(self).__name__
            raise ConfigError(f"data.val_fraction={self.val_fraction}: {name} has validation data of its own; use 0")
        train, test = splits["train"], splits["test"]
        held_out = max(1, round(len(train) * self.val_fraction))
        order = torch.randperm(len(train), generator=stream(0, "val_split"))
        # Sorted, so that memory-mapped images are read in file order.
        val = train.select(order[:held_out].sort().values)
        return {"train": train.select(order[held_out:].sort().values), "val": val, "test": test}


def build_benchmark(node: Mapping[str, Any]) -> Benchmark:
    """Build the data set that a checked data node describes; nothing is read yet.

    Raises:
        ConfigError: it is no Benchmark, or its class attributes do not fit together.
    """
    benchmark = schema.build(node, "data")
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(f"data.{schema.TARGET}={node[schema.TARGET]}: must make a Benchmark, not {benchmark!r:.60}")
    try:
        check_declared(benchmark)
    except UserError:  # a file that says how large the images are is missing
        raise
    except Exception as error:
        # What we refuse begins with the attribute's name; the rest comes from a property of the user's own.
        ours = isinstance(error, ValueError) and not blame(error)
        what = f".{error}" if ours else f": {type(error).__name__}: {one_line(error)}{blame(error)}"
        raise ConfigError(f"data: {type(benchmark).__name__}{what}") from error
    return benchmark
