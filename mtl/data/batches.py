"""Batches for training and evaluation. The data lives on the device, or comes from the host through a DataLoader.

Random numbers (order, crops, flips) are drawn on the CPU, once per epoch, for all samples. Both ways use the same draws
and the same arithmetic. So a run's results do not depend on where its data lives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtl.data.base import Benchmark
from mtl.data.check import pieces
from mtl.data.columns import Batch, Column, Split
from mtl.views import View


class TrainingBatches:
    """The augmented batches of each epoch. They depend only on the seed and the number of the epoch.

    Args:
        split: the training samples.
        benchmark: gives batch size, inputs, tasks and augmentation.
        device: of the batches.
        seed: of the run.
        smallest: the last batch of an epoch is dropped if it has fewer samples than this. Batch norm needs two samples
            in each part of a batch, and some methods split a batch into two or three parts.

    Attributes:
        labels: {task: number of samples with its label}, of the tasks that some sample lacks.
        samples: number of samples in an epoch.
    """

    def __init__(self, split: Split, benchmark: Benchmark, device: torch.device, seed: int, smallest: int = 2):
        self.benchmark, self.device, self.seed, self.size = benchmark, device, seed, len(split)
        known = {
            t.name: sum(int(t.labelled(t.select(part)).sum()) for part in pieces(split, t.column))
            for t in benchmark.tasks
            if t.column in split.columns
        }
        self.labels = {name: number for name, number in known.items() if number < len(split)}
        self.resident = _resident(split, benchmark, device)
        self.split = split.to(device) if self.resident else split
        self.draws = benchmark.draws(split)
        self.samples = self.draws.samples
        # Every full batch, and the rest if it is large enough. The order changes in each epoch, so no sample is lost.
        full, rest = divmod(self.samples, self.draws.batch)
        self.steps = full + (rest >= smallest)

    @property
    def partial(self) -> frozenset[str]:
        """Names of the tasks for which some sample has no label."""
        return frozenset(self.labels)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, counted from 0. A batch holds inputs and labels by column."""
        size = self.draws.batch
        order = self.draws.order(self.seed, epoch)
        view = self.draws.view(self.seed, epoch, order)
        view = None if view is None else view.to(self.device)
        if self.resident:
            # Only row numbers are computed here. `ready` gathers the rows together with the crop, in one operation.
            rows = self.split.positions(order)
            pairs = zip(rows.split(size), rows.to(self.device, non_blocking=True).split(size), strict=True)
            gathered = (_chosen(self.split.columns, rows, moved) for rows, moved in pairs)
        else:
            # The DataLoader's processes gather the rows, so `ready` selects none.
            batches = stream_batches(self.split, order.split(size)[: self.steps], self.benchmark.workers, self.device)
            gathered = ((batch, {}) for batch in batches)
        for i, (columns, rows) in enumerate(islice(gathered, self.steps)):
            seen = None if view is None else view.take(slice(i * size, (i + 1) * size))
            yield ready(self.benchmark, columns, rows, seen)


class EvaluationBatches:
    """All samples in order, without augmentation, in batches of the benchmark's `eval_batch_size`.

    The arguments are as in `TrainingBatches`.
    """

    def __init__(self, split: Split, benchmark: Benchmark, device: torch.device):
        self.benchmark, self.device, self.size = benchmark, device, len(split)
        self.resident = _resident(split, benchmark, device)
        self.split = split.to(device) if self.resident else split

    def __iter__(self) -> Iterator[Batch]:
        size = self.benchmark.eval_batch_size
        if self.resident:
            batches = (self.split.batch(slice(start, start + size)) for start in range(0, self.size, size))
        else:
            indices = torch.arange(self.size).split(size)
            batches = stream_batches(self.split, indices, self.benchmark.workers, self.device)
        for batch in batches:
            yield ready(self.benchmark, batch)


def ready(
    benchmark: Benchmark,
    columns: Mapping[str, Column],
    rows: Mapping[str, Tensor] = MappingProxyType({}),
    view: View | None = None,
) -> Batch:
    """Make a batch for the network and the tasks: select rows, apply the views, normalise the images.

    Args:
        columns: the columns by name, on the device.
        rows: {column: (B,) the rows to select}. A column that is not named here holds the B samples only.
        view: the views of the B samples; None without augmentation.
    """
    batch = {}
    for name, one in benchmark.inputs.items():
        batch[name] = one.ready(one.moves(columns[name], rows.get(name), view))
    # Label maps follow their image's view: `moves` says how. Two tasks may share a column, which is then moved once.
    for task in benchmark.tasks:
        if task.column not in batch and task.column in columns:
            batch[task.column] = task.moves(columns[task.column], rows.get(task.column), view)
    return batch


def _chosen(
    columns: Mapping[str, Column], rows: Tensor, moved: Tensor
) -> tuple[dict[str, Column], Mapping[str, Tensor]]:
    """The columns, and the rows that are still to be selected from some of them.

    Rows of a tensor are selected together with the crop. Ragged and joined columns are cut down to the rows here. The
    host must know how many values they have.

    Args:
        rows, moved: (B,) the same row numbers, on the host and on the device.
    """
    chosen = {name: c if isinstance(c, Tensor) else c.take(rows, moved) for name, c in columns.items()}
    return chosen, {name: moved for name, c in columns.items() if isinstance(c, Tensor)}


def _resident(split: Split, benchmark: Benchmark, device: torch.device) -> bool:
    """Whether the split is kept on the training device."""
    if benchmark.residency != "auto":
        return benchmark.residency == "device"
    if device.type == "cuda":
        return split.bytes < torch.cuda.mem_get_info(device)[0] // 2
    return split.bytes < 4 * 2**30  # 4 GiB; larger memory-mapped columns are read from disk as needed


class _Chunks(Dataset):
    """A data set for DataLoader with one item per batch: a worker gathers a whole batch at once, not single images."""

    def __init__(self, split: Split, indices: Sequence[Tensor]):
        self.split, self.indices = split, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Batch:
        return self.split.batch(self.indices[i])


def stream_batches(split: Split, indices: Sequence[Tensor], workers: int, device: torch.device) -> Iterator[Batch]:
    """One batch for each of the `indices`, gathered by DataLoader processes and sent to the device."""
    # Only from pinned memory can a batch be copied to a GPU while the GPU computes.
    pinned = device.type == "cuda"
    for batch in DataLoader(_Chunks(split, indices), batch_size=None, num_workers=workers, pin_memory=pinned):
        yield {name: column.to(device, non_blocking=True) for name, column in batch.items()}
