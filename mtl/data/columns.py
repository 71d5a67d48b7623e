"""What a part of a data set holds: images, and a label of each for every task."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor


class Split:
    """Labelled images on the host: whole columns, and which of their rows belong to this part.

    Args:
        images: (M, H, W, C) uint8; may be memory-mapped when larger than memory.
        targets: for each task by name, (M, …); −100 (classes) or NaN (numbers) where a sample carries no label.
        rows: (N,) int64 positions in the columns, in the order of the samples; None for all M rows.

    Attributes:
        all_images, all_targets, rows: the arguments as given; no row of them is left out.
    """

    def __init__(self, images: Tensor, targets: dict[str, Tensor], rows: Tensor | None = None):
        self.all_images, self.all_targets, self.rows = images, targets, rows

    def __len__(self) -> int:
        return len(self.all_images if self.rows is None else self.rows)

    @property
    def images(self) -> Tensor:
        """(N, H, W, C) the samples' images; a copy when rows are selected."""
        return self.all_images if self.rows is None else self.all_images[self.rows]

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """(N, …) labels by task name; copies, which nobody can replace, when rows are selected."""
        if self.rows is None:
            return self.all_targets
        return MappingProxyType({name: self.labels(name) for name in self.all_targets})

    def labels(self, task: str) -> Tensor:
        """(N, …) labels of one task; a copy when rows are selected."""
        return self.all_targets[task] if self.rows is None else self.all_targets[task][self.rows]

    def positions(self, index: Tensor) -> Tensor:
        """Where the samples at `index` lie in the columns."""
        return index if self.rows is None else self.rows[index]

    def select(self, index: Tensor | slice) -> Split:
        """The samples at `index`, an int64 or bool tensor or a slice; no column is copied."""
        if self.rows is None and isinstance(index, slice):
            return self.take(index)  # views
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        return Split(self.all_images, self.all_targets, rows[index])

    def take(self, index: Tensor | slice) -> Split:
        """The samples at `index`, gathered; a slice of whole columns gives views."""
        rows = index if self.rows is None else self.rows[index]
        return Split(self.all_images[rows], {name: t[rows] for name, t in self.all_targets.items()})
