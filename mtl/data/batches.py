"""Batches for training and evaluation, from data on the device or, when too large for it, through a DataLoader.

Both paths share the draws (made on the CPU, once an epoch, for all samples) and the arithmetic, so a run's numbers do
not depend on where its data lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mtl.data.base import Benchmark, Split
from mtl.random import stream

Batch = tuple[Tensor, dict[str, Tensor]]  # images (B, C, H, W) float32 and targets by task name, on the device


@dataclass(frozen=True)
class Draws:
    """An epoch's random choices for N samples, in the order of training.

    Attributes:
        order: (N,) sample indices.
        top, left: (N,) corner of the crop in the padded image, from 0 to 2·padding; the middle when nothing is drawn.
        flip: (N,) bool.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor

    def to(self, device: torch.device) -> Draws:
        return Draws(*(t.to(device, non_blocking=True) for t in (self.order, self.top, self.left, self.flip)))


def draw(size: int, seed: int, epoch: int, padding: int, flip: bool) -> Draws:
    """The draws of one epoch: a function of (seed, epoch), with one named stream for each choice."""
    crops = torch.randint(0, 2 * padding + 1, (2, size), generator=stream(seed, "crop", epoch))
    flips = torch.rand(size, generator=stream(seed, "flip", epoch)) < 0.5
    return Draws(
        order=torch.randperm(size, generator=stream(seed, "order", epoch)),
        top=crops[0],
        left=crops[1],
        flip=flips if flip else torch.zeros(size, dtype=torch.bool),
    )


def pad(images: Tensor, padding: int) -> Tensor:
    """(N, H, W, C) with `padding` zero pixels on all four sides, as RandomCrop pads: black, before normalisation."""
    return F.pad(images, (0, 0, padding, padding, padding, padding)) if padding else images


def crop_and_flip(padded: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """RandomCrop and RandomHorizontalFlip of a whole batch as one gather.

    Args:
        padded: (N, H + 2·padding, W + 2·padding, C).
        index, top, left, flip: (B,) the samples and their draws.
        padding: as given to `pad`.

    Returns:
        (B, H, W, C), of the dtype of `padded`.
    """
    height, width = padded.shape[1] - 2 * padding, padded.shape[2] - 2 * padding
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


class Normalise:
    """uint8 (B, H, W, C) → float32 (B, C, H, W), as ToTensor and Normalize: (x / 255 − mean) / std.

    The result is a view in channels_last order, which is what the fast convolutions want.
    """

    def __init__(self, mean, std, device: torch.device):
        self.mean = torch.tensor([*map(float, mean)], dtype=torch.float32, device=device)
        self.std = torch.tensor([*map(float, std)], dtype=torch.float32, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)


class TrainingBatches:
    """An epoch's augmented batches; `epoch(k)` is a function of (seed, k) alone.

    Args:
        split: the training samples.
        benchmark: gives batch size, augmentation and normalisation.
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
            t.name for t in benchmark.tasks if t.name in split.all_targets and t.count(split.labels(t.name)) < self.size
        )
        self.normalise = Normalise(benchmark.mean, benchmark.std, device)
        self.padding = benchmark.crop_padding
        self.resident = _resident(split, benchmark, device, self.padding)
        self.split = split
        if self.resident:
            self.split = move(_padded(split, self.padding), device)
        full, rest = divmod(self.size, benchmark.batch_size)
        self.steps = full + (rest >= smallest)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch `epoch`, counted from 0."""
        draws = draw(self.size, self.seed, epoch, self.padding, self.benchmark.flip)
        size, on_device = self.benchmark.batch_size, draws.to(self.device)
        batches = self._gathered(on_device.order) if self.resident else self._streamed(draws.order)
        choices = zip(on_device.top.split(size), on_device.left.split(size), on_device.flip.split(size), strict=True)
        for (padded, index, targets), (top, left, flip) in zip(islice(batches, self.steps), choices, strict=False):
            yield self.normalise(crop_and_flip(padded, index, top, left, flip, self.padding)), targets

    def _gathered(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        for index in order.split(self.benchmark.batch_size):
            rows = self.split.positions(index)
            yield self.split.all_images, rows, {name: t[rows] for name, t in self.split.all_targets.items()}

    def _streamed(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        chunks = order.split(self.benchmark.batch_size)[: self.steps]
        for images, targets in _stream(self.split, chunks, self.benchmark.workers, self.device):
            yield pad(images, self.padding), torch.arange(len(images), device=self.device), targets


class EvaluationBatches:
    """All samples in order, not augmented.

    Args: as `TrainingBatches`; the batches are larger because no gradient is kept.
    """

    batch_size = 500

    def __init__(self, split: Split, benchmark: Benchmark, device: torch.device):
        self.benchmark, self.device, self.size = benchmark, device, len(split)
        self.normalise = Normalise(benchmark.mean, benchmark.std, device)
        self.resident = _resident(split, benchmark, device)
        self.split = move(split, device) if self.resident else split

    def __iter__(self) -> Iterator[Batch]:
        if self.resident:
            samples = (
                (part.images, dict(part.targets))
                for start in range(0, self.size, self.batch_size)
                for part in [self.split.take(slice(start, start + self.batch_size))]
            )
        else:
            chunks = torch.arange(self.size).split(self.batch_size)
            samples = _stream(self.split, chunks, self.benchmark.workers, self.device)
        for images, targets in samples:
            yield self.normalise(images), targets


def _resident(split: Split, benchmark: Benchmark, device: torch.device, padding: int = 0) -> bool:
    if benchmark.residency != "auto":
        return benchmark.residency == "device"
    size = resident_bytes(split, padding)
    if device.type == "cuda":
        return size < torch.cuda.mem_get_info(device)[0] // 2
    return size < 4 * 2**30  # the host's own memory: beyond this, memory-mapped images are read as they are needed


def resident_bytes(split: Split, padding: int) -> int:
    """Bytes of the split's samples on a device: images with `padding` pixels on all four sides, and all labels."""
    height, width, channels = split.all_images.shape[1:]
    image = (height + 2 * padding) * (width + 2 * padding) * channels
    labels = sum(t.shape[1:].numel() * t.element_size() for t in split.all_targets.values())
    return len(split) * (image + labels)


def _padded(split: Split, padding: int) -> Split:
    """The split with padded images; its rows are gathered where padding copies anyway."""
    return Split(pad(split.images, padding), dict(split.targets)) if padding else split


def move(split: Split, device: torch.device) -> Split:
    """The selected images and labels on `device`; nothing is copied when the columns are there already."""
    columns = [split.all_images, *split.all_targets.values(), *([] if split.rows is None else [split.rows])]
    if all(column.device == device for column in columns):
        return split
    return Split(split.images.to(device), {name: t.to(device) for name, t in split.targets.items()})


class _Chunks(Dataset):
    """One item is one batch: DataLoader workers gather whole batches, not single images."""

    def __init__(self, split: Split, chunks):
        self.split, self.chunks = split, list(chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> Batch:
        part = self.split.take(self.chunks[i])
        return part.images, part.targets


def _stream(split: Split, chunks, workers: int, device: torch.device) -> Iterator[Batch]:
    loader = DataLoader(_Chunks(split, chunks), batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
    for images, targets in loader:
        yield (
            images.to(device, non_blocking=True),
            {name: t.to(device, non_blocking=True) for name, t in targets.items()},
        )
