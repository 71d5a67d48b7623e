"""Batches for training and evaluation, from data on the device or, when too large for it, through a DataLoader.

Both paths share the draws (made on the CPU, once an epoch, for all samples) and the arithmetic, so a run's numbers do
not depend on where its data lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtl.data.base import Benchmark
from mtl.data.check import pieces
from mtl.data.columns import Batch, Split
from mtl.data.inputs import Image
from mtl.random import stream
from mtl.views import View


class TrainingBatches:
    """An epoch's augmented batches; `epoch(k)` is a function of (seed, k) alone.

    Args:
        split: the training samples.
        benchmark: gives batch size, inputs, tasks and augmentation.
        device: of the batches.
        seed: of the run.
        smallest: an epoch's last batch is left out when it has fewer samples (batch norm needs two in each part that a
            strategy splits a batch into).

    Attributes:
        partial: names of the tasks that lack the label of some sample.
    """

    def __init__(self, split: Split, benchmark: Benchmark, device: torch.device, seed: int, smallest: int = 2):
        self.benchmark, self.device, self.seed, self.size = benchmark, device, seed, len(split)
        self.partial = frozenset(
            t.name
            for t in benchmark.tasks
            if t.column in split.columns and not all(t.labelled(part).all() for part in pieces(split, t.column))
        )
        self.resident = _resident(split, benchmark, device)
        self.split = split.to(device) if self.resident else split
        full, rest = divmod(self.size, benchmark.batch_size)
        self.steps = full + (rest >= smallest)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch `epoch`, counted from 0: inputs and labels by column."""
        size = self.benchmark.batch_size
        order = torch.randperm(self.size, generator=stream(self.seed, "order", epoch))
        view = self._view(epoch)
        if self.resident:
            order = order.to(self.device, non_blocking=True)
            gathered = ((self.split.columns, self.split.positions(index)) for index in order.split(size))
        else:
            batches = stream_batches(self.split, order.split(size)[: self.steps], self.benchmark.workers, self.device)
            gathered = ((batch, None) for batch in batches)
        for i, (columns, rows) in enumerate(islice(gathered, self.steps)):
            seen = None if view is None else view.take(slice(i * size, (i + 1) * size))
            yield ready(self.benchmark, columns, rows, seen)

    def _view(self, epoch: int) -> View | None:
        """What each sample shows of its picture, in the order of training."""
        view, draws = None, partial(stream, self.seed)
        for augment in self.benchmark.augment:
            drawn = augment.draw(self.size, picture(self.benchmark), lambda name: draws(name, epoch))
            view = drawn if view is None else view.then(drawn)
        return None if view is None else view.to(self.device)


class EvaluationBatches:
    """All samples in order, not augmented, in batches of the benchmark's `eval_batch_size`.

    Args: as `TrainingBatches`.
    """

    def __init__(self, split: Split, benchmark: Benchmark, device: torch.device):
        self.benchmark, self.device, self.size = benchmark, device, len(split)
        self.batch_size = benchmark.eval_batch_size
        self.resident = _resident(split, benchmark, device)
        self.split = split.to(device) if self.resident else split

    def __iter__(self) -> Iterator[Batch]:
        if self.resident:
            starts = range(0, self.size, self.batch_size)
            batches = (self.split.batch(slice(start, start + self.batch_size)) for start in starts)
        else:
            indices = torch.arange(self.size).split(self.batch_size)
            batches = stream_batches(self.split, indices, self.benchmark.workers, self.device)
        for batch in batches:
            yield ready(self.benchmark, batch)


def ready(
    benchmark: Benchmark, columns: Mapping[str, Tensor], rows: Tensor | None = None, view: View | None = None
) -> Batch:
    """A batch as the network and the tasks get it.

    Args:
        columns: by name, on the device.
        rows: (B,) which rows of the columns; None for all, in this order.
        view: what the B samples show of their pictures; None for all of them.
    """
    batch = {}
    for name, one in benchmark.inputs.items():
        batch[name] = one.ready(one.moves(columns[name], rows, view))
    for task in benchmark.tasks:
        if task.column not in batch and task.column in columns:
            batch[task.column] = task.moves(columns[task.column], rows, view)
    return batch


def picture(benchmark: Benchmark) -> tuple[int, int]:
    """(height, width) of the images, which a random view is drawn for."""
    return next(one.shape[1:] for one in benchmark.inputs.values() if isinstance(one, Image))


def _resident(split: Split, benchmark: Benchmark, device: torch.device) -> bool:
    if benchmark.residency != "auto":
        return benchmark.residency == "device"
    if device.type == "cuda":
        return split.bytes < torch.cuda.mem_get_info(device)[0] // 2
    return split.bytes < 4 * 2**30  # the host's own memory: beyond this, memory-mapped columns are read as needed


class _Chunks(Dataset):
    """One item is one batch: DataLoader workers gather whole batches, not single images."""

    def __init__(self, split: Split, indices: Sequence[Tensor]):
        self.split, self.indices = split, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Batch:
        return self.split.batch(self.indices[i])


def stream_batches(
    split: Split, indices: Sequence[Tensor], workers: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The rows at each of the `indices`, read by DataLoader processes and sent to the device."""
    pinned = device.type == "cuda"
    for batch in DataLoader(_Chunks(split, indices), batch_size=None, num_workers=workers, pin_memory=pinned):
        yield {name: column.to(device, non_blocking=True) for name, column in batch.items()}
