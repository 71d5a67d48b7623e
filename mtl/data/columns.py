"""What a part of a data set holds: named columns, and which of their rows belong to the part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]  # rows of the columns by name, for B samples


@dataclass(frozen=True)
class Split:
    """Named columns of equal length; a selection of rows copies no column.

    Example: ``Split({"image": images, "fine": fine, "coarse": coarse})``.

    Args:
        columns: by name, (M, …): images (M, H, W, C) uint8, and labels. They may be memory-mapped.
        rows: (N,) int64 positions in the columns, in the order of the samples; None for all M rows.
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
        """(N, …) the samples' rows of one column; a copy when rows are selected."""
        return self.columns[name] if self.rows is None else self.columns[name][self.rows]

    def only(self, names: Iterable[str]) -> Split:
        """The same samples with these columns."""
        return Split({name: self.columns[name] for name in names}, self.rows)

    def positions(self, index: Tensor) -> Tensor:
        """Where the samples at `index` lie in the columns."""
        return index if self.rows is None else self.rows[index]

    def select(self, index: Tensor | slice) -> Split:
        """The samples at `index`, an int64 or bool tensor or a slice; no column is copied."""
        if self.rows is None and isinstance(index, slice):
            return Split(self.batch(index))  # views
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        return Split(self.columns, rows[index])

    def batch(self, index: Tensor | slice) -> Batch:
        """The samples' rows at `index`, gathered; a slice of whole columns gives views."""
        rows = index if self.rows is None else self.rows[index]
        return {name: column[rows] for name, column in self.columns.items()}

    def to(self, device: torch.device) -> Split:
        """The samples on `device`; nothing is copied when the columns are there already."""
        tensors = [*self.columns.values(), *([] if self.rows is None else [self.rows])]
        if all(t.device == device for t in tensors):
            return self
        return Split({name: self.column(name).to(device) for name in self.columns})

    @property
    def bytes(self) -> int:
        """Of the samples' rows of all columns."""
        return len(self) * sum(c.shape[1:].numel() * c.element_size() for c in self.columns.values())
