"""A split of a data set: named columns, and the rows of them that belong to the split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]  # rows of the columns by name, for B samples


@dataclass(frozen=True)
class Split:
    """Named columns of equal length. Selecting rows copies no column: train and validation share the same memory.

    Example: ``Split({"image": images, "fine": fine, "coarse": coarse})``.

    Args:
        columns: tensors (M, …) by name: images (M, H, W, C) uint8, and labels. They may be memory-mapped.
        rows: (N,) int64, the samples' row numbers, in the order of the samples; None for all M rows.
    """

    columns: Mapping[str, Tensor]
    rows: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.columns, Mapping):
            kind = type(self.columns).__name__
            raise TypeError(
                f'Split takes a dict of columns, as in Split({{"image": images, "size": sizes}}), not a {kind}'
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.rows is None else len(self.rows)

    def column(self, name: str) -> Tensor:
        """(N, …) one column of the samples. It is a copy if rows are selected."""
        return self.columns[name] if self.rows is None else self.columns[name][self.rows]

    def only(self, names: Iterable[str]) -> Split:
        """The same samples with only the named columns."""
        return Split({name: self.columns[name] for name in names}, self.rows)

    def positions(self, index: Tensor) -> Tensor:
        """The row numbers, in the columns, of the samples at `index`."""
        return index if self.rows is None else self.rows[index]

    def select(self, index: Tensor | slice) -> Split:
        """The samples at `index` (an int64 or bool tensor, or a slice). No column is copied."""
        if self.rows is None and isinstance(index, slice):
            return Split(self.batch(index))  # a slice of a tensor is a view, not a copy
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        return Split(self.columns, rows[index])

    def batch(self, index: Tensor | slice) -> Batch:
        """The columns of the samples at `index`, copied. Only a slice of an unselected split gives views."""
        rows = index if self.rows is None else self.rows[index]
        return {name: column[rows] for name, column in self.columns.items()}

    def to(self, device: torch.device) -> Split:
        """The samples on `device`. Nothing is copied if the columns are already there."""
        tensors = [*self.columns.values(), *([] if self.rows is None else [self.rows])]
        if all(t.device == device for t in tensors):
            return self
        return Split({name: self.column(name).to(device) for name in self.columns})

    @property
    def bytes(self) -> int:
        """Memory of the samples in all columns, in bytes."""
        return len(self) * sum(c.shape[1:].numel() * c.element_size() for c in self.columns.values())
