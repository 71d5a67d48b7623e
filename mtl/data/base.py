"""What a benchmark is: tasks, splits of uint8 images, and the augmentation of its protocol."""

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
from mtl.data.columns import Split
from mtl.errors import ConfigError, SetupError, UserError, one_line, out_of_memory
from mtl.random import stream
from mtl.tasks import Task


@dataclass
class Benchmark(ABC):
    """A data set with its tasks and its protocol's augmentation. Subclass it, say the class attributes, write `load`.

    Args:
        batch_size: training samples a step; the last batch of an epoch may be smaller.
        limit_train: use only the first so many training samples.
        limit_test: use only the first so many test samples.
        val_fraction: share of the training samples held out for validation (after limit_train); the same samples
            for every seed, so that seeds differ in training only.
        residency: where images and labels live. auto: on the training device when they fit into half of its free
            memory.
        workers: DataLoader processes when the data stays on the host.

    Attributes:
        tasks: the tasks; the first one's first metric chooses the best epoch.
        mean, std: per channel, of images scaled to [0, 1].
        crop_padding: zero padding of the random crop; 0 is no crop.
        flip: whether images are flipped left-right at random.
    """

    batch_size: Annotated[int, Ge(1)] = 128
    limit_train: Annotated[int, Ge(1)] | None = None
    limit_test: Annotated[int, Ge(1)] | None = None
    val_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    residency: Literal["auto", "device", "host"] = "auto"
    workers: Annotated[int, Ge(0)] = 2

    tasks: ClassVar[Sequence[Task]]
    image_shape: ClassVar[tuple[int, int, int]]  # (C, H, W)
    mean: ClassVar[Sequence[float]]
    std: ClassVar[Sequence[float]]
    crop_padding: ClassVar[int] = 0
    flip: ClassVar[bool] = False

    @abstractmethod
    def load(self) -> tuple[Split, Split]:
        """Read the training and the test split; called once, after all checks of the config.

        Raises:
            mtl.config.SetupError: the data is missing, damaged or cannot be downloaded.
        """

    def splits(self) -> dict[str, Split]:
        """`train`, `test` and, with a val_fraction, `val`, limited as the fields say; they share what `load` returned.

        Raises:
            mtl.config.SetupError: `load` fails, or what it returned does not fit the tasks or image_shape.
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
        # Labels of no task, as a subclass with fewer tasks leaves them, go no further.
        train, test = (
            Split(part.all_images, {t.name: part.all_targets[t.name] for t in self.tasks}, part.rows) for part in loaded
        )
        train, test = train.select(slice(self.limit_train)), test.select(slice(self.limit_test))
        if not self.val_fraction:
            return {"train": train, "test": test}
        held_out = max(1, round(len(train) * self.val_fraction))
        order = torch.randperm(len(train), generator=stream(0, "val_split"))
        # Sorted, so that memory-mapped images are read in file order.
        return {
            "train": train.select(order[held_out:].sort().values),
            "val": train.select(order[:held_out].sort().values),
            "test": test,
        }


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
    except Exception as error:
        # What we refuse begins with the attribute's name; the rest comes from a property of the user's own.
        ours = isinstance(error, ValueError) and not blame(error)
        what = f".{error}" if ours else f": {type(error).__name__}: {one_line(error)}{blame(error)}"
        raise ConfigError(f"data: {type(benchmark).__name__}{what}") from error
    return benchmark
