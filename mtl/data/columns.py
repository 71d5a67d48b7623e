"""A split of a data set: named columns, and the rows of them that belong to the split."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Ragged:
    """A column whose samples have different numbers of rows, such as the atoms of molecules or the boxes of images.

    It is indexed like a tensor: `column[2:5]` and `column[torch.tensor([4, 0])]` are ragged columns of these samples,
    and `column[3]` is the tensor of sample 3.

    Example: `Ragged.of([torch.zeros(5, 3), torch.zeros(2, 3)])` holds two molecules, of 5 and of 2 atoms.

    Args:
        values: (M, …) the rows of all samples, one sample after another.
        lengths: (N,) int64, the number of rows of each sample; 0 for a sample that is labelled and empty (an image
            without boxes), −1 for a sample that is not labelled.
        known: the lengths on the host, if `lengths` are on a GPU. They say how many rows a batch has, so that the host
            need not wait for the GPU. `to` sets them.
    """

    values: Tensor
    lengths: Tensor
    known: Tensor | None = field(default=None, repr=False)

    @staticmethod
    def of(samples: Sequence[Tensor | None]) -> Ragged:
        """A column from the rows (L, …) of each sample; None for a sample that is not labelled.

        Raises:
            ValueError: all samples are None.
        """
        labelled = [sample for sample in samples if sample is not None]
        if not labelled:
            raise ValueError("Ragged.of: no sample has rows, so the shape of a row is unknown")
        lengths = torch.tensor([-1 if sample is None else len(sample) for sample in samples])
        return Ragged(torch.cat(labelled), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | slice | Tensor) -> Ragged | Tensor:
        """The samples at `index`. Only an index on a GPU makes the host wait."""
        if isinstance(index, Tensor):
            return self.take(index.cpu())
        if not isinstance(index, slice):
            if not -len(self) <= (position := operator.index(index)) < len(self):
                raise IndexError(f"sample {position} of {len(self)}")
            position %= len(self)
            return self[position : position + 1].values
        start, stop, step = index.indices(len(self))
        if step != 1:
            return self.take(torch.arange(start, stop, step))
        if (start, stop) == (0, len(self)):
            return self
        # Neighbouring samples are neighbours in `values`, too. So a slice is a view.
        stop = max(start, stop)
        first, last = (int(self._ends[i - 1]) if i else 0 for i in (start, stop))
        known = None if self.known is None else self.known[start:stop]
        return Ragged(self.values[first:last], self.lengths[start:stop], known)

    def take(self, index: Tensor, moved: Tensor | None = None) -> Ragged:
        """The samples at `index`, copied. The host does not wait for the device.

        Args:
            index: (B,) int64, or a mask (N,); on the host.
            moved: the same positions on the device of the values, if they are there already.
        """
        if index.dtype == torch.bool:
            index = torch.arange(len(self))[index]
        if moved is None:
            moved = index.to(self.device, non_blocking=True)
        on_host = self._on_host[index]
        total = int(on_host.clamp(min=0).sum())
        lengths = self.lengths[moved]
        sizes = lengths.clamp(min=0)
        owner = torch.repeat_interleave(sizes, output_size=total)  # without output_size the host would have to wait
        # Row i of the result is row i − (start of its sample here) + (start of its sample there).
        shift = self._starts[moved] - (sizes.cumsum(0) - sizes)
        values = self.values[torch.arange(total, device=self.device) + shift[owner]]
        return Ragged(values, lengths, None if self.known is None else on_host)

    def owner(self) -> Tensor:
        """(M,) the sample to which each row belongs. (torch_geometric calls it `batch`.)"""
        return torch.repeat_interleave(self.lengths.clamp(min=0), output_size=len(self.values))

    def starts(self) -> Tensor:
        """(N,) the first row of each sample."""
        return self._starts

    def within(self) -> Tensor:
        """(M,) the position of each row in its sample: 0, 1, … anew for each sample."""
        return torch.arange(len(self.values), device=self.device) - self._starts[self.owner()]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All ordered pairs of two different rows of one sample: the numbers (P,) of the first and of the second row.

        Of a sample with L rows there are L (L − 1). The host does not wait for the device.
        """
        sizes = self._on_host.clamp(min=0)
        total = int((sizes * (sizes - 1)).sum())
        owner = self.owner()
        size = self.lengths[owner]  # of each row's sample
        others = size - 1
        first = torch.repeat_interleave(others, output_size=total)
        # The partners of a sample's row i are the rows i + 1, i + 2, … of the sample, from its end on to its start.
        step = torch.arange(total, device=self.device) - (others.cumsum(0) - others)[first] + 1
        start = self._starts[owner]
        second = start[first] + (first - start[first] + step) % size[first]
        return first, second

    def padded(self, most: int | None = None, fill: float = 0) -> Tensor:
        """(N, most, …) the rows of each sample, followed by rows of `fill`.

        Args:
            most: None for the rows of the longest sample.
            fill: of the missing rows.

        Raises:
            ValueError: a sample has more rows than `most`.
        """
        longest = int(self._on_host.max().clamp(min=0)) if len(self) else 0
        most = longest if most is None else most
        if longest > most:
            raise ValueError(f"a sample has {longest} rows, more than {most}")
        out = self.values.new_full((len(self), most, *self.values.shape[1:]), fill)
        out[self.owner(), self.within()] = self.values
        return out

    def with_values(self, values: Tensor) -> Ragged:
        """The same samples with other values (M, …), row for row."""
        return replace(self, values=values)

    def to(self, device: torch.device, non_blocking: bool = False) -> Ragged:
        """The column on `device`; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        values, lengths = (t.to(device, non_blocking=non_blocking) for t in (self.values, self.lengths))
        return Ragged(values, lengths, None if lengths.device.type == "cpu" else self._on_host)

    def pin_memory(self) -> Ragged:
        """The column in pinned memory, from which a GPU copies in the background. DataLoader calls it."""
        return Ragged(self.values.pin_memory(), self.lengths.pin_memory())

    def contiguous(self) -> Ragged:
        """The column with contiguous values."""
        return self.with_values(self.values.contiguous())

    def clone(self) -> Ragged:
        """A copy."""
        return replace(self, values=self.values.clone(), lengths=self.lengths.clone())

    @property
    def device(self) -> torch.device:
        """Of the values and the lengths."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    def is_floating_point(self) -> bool:
        """Whether the values are floats."""
        return self.values.is_floating_point()

    @cached_property
    def _on_host(self) -> Tensor:
        return self.lengths.cpu() if self.known is None else self.known

    @cached_property
    def _ends(self) -> Tensor:
        """(N,) on the host: the number of rows up to and with each sample."""
        return self._on_host.clamp(min=0).cumsum(0)

    @cached_property
    def _starts(self) -> Tensor:
        sizes = self.lengths.clamp(min=0)
        return sizes.cumsum(0) - sizes


@dataclass(frozen=True, eq=False)
class Joined:
    """A column whose rows lie in several tensors, in any order. They are copied when they are selected, not before.

    So the columns of several data sets become one, although they are memory-mapped. A row without a label is the same
    row for all samples.

    Example: `join([(maps, rows), (one_empty_map, torch.zeros(5, dtype=torch.int64))])` adds five samples without a map.

    Args:
        parts: tensors (M_k, …) on the host, with rows of one shape.
        source: (N,) int64, the tensor in which each row lies.
        position: (N,) int64, its row number there.
    """

    parts: tuple[Tensor, ...]
    source: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """The rows at `index`, copied."""
        source, position = self.source[index], self.position[index]
        if source.ndim == 0:
            return self.parts[int(source)][position].to(self.dtype)
        found = torch.empty(len(source), *self.shape[1:], dtype=self.dtype)
        for k, part in enumerate(self.parts):
            where = (source == k).nonzero().flatten()
            if len(where):
                found[where] = part[position[where]].to(self.dtype)
        return found

    def take(self, index: Tensor, moved: Tensor | None = None) -> Tensor:
        """The rows at `index`, copied. `moved` is for columns on a device; this one is on the host."""
        return self[index]

    def pick(self, index: slice | Tensor) -> Joined:
        """The rows at `index`; no row is copied."""
        return Joined(self.parts, self.source[index], self.position[index])

    def to(self, device: torch.device, non_blocking: bool = False) -> Joined | Tensor:
        """On the host the column itself, on another device a tensor of all rows."""
        return self if torch.device(device).type == "cpu" else self[:].to(device, non_blocking=non_blocking)

    @property
    def shape(self) -> torch.Size:
        """(N, …)."""
        return torch.Size([len(self), *self.parts[0].shape[1:]])

    @property
    def ndim(self) -> int:
        """Number of dimensions, with the first one."""
        return self.parts[0].ndim

    @cached_property
    def dtype(self) -> torch.dtype:
        """A type that can hold the numbers of all parts."""
        kinds = list(dict.fromkeys(part.dtype for part in self.parts))
        if len(kinds) == 1 or any(kind.is_floating_point or kind.is_complex for kind in kinds):
            return reduce(torch.promote_types, kinds)
        return torch.int64

    @property
    def device(self) -> torch.device:
        """Of the parts."""
        return self.parts[0].device

    @property
    def layout(self) -> torch.layout:
        """Of the parts."""
        return self.parts[0].layout

    def is_floating_point(self) -> bool:
        """Whether the rows are floats."""
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        """Whether the rows are complex numbers."""
        return self.dtype.is_complex

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize


Column = Tensor | Ragged | Joined
Batch = dict[str, Column]  # rows of the columns by name, for B samples


def join(pieces: Sequence[tuple[Column, Tensor]]) -> Column:
    """Rows of several columns, one piece after another. Tensors are not copied; ragged columns are.

    Args:
        pieces: columns, and the row numbers (n,) int64 that are taken from each.

    Raises:
        ValueError: rows of one column have another shape than rows of another one.
    """
    shapes = {_shape(column) for column, _ in pieces}
    if len(shapes) > 1:
        raise ValueError(" and ".join(sorted(shapes)))
    if isinstance(pieces[0][0], Ragged):
        taken = [column.take(rows) for column, rows in pieces]
        return Ragged(torch.cat([one.values for one in taken]), torch.cat([one.lengths for one in taken]))
    parts, sources, positions = [], [], []
    for column, rows in pieces:
        if isinstance(column, Tensor):
            column = Joined((column,), torch.zeros(len(column), dtype=torch.int64), torch.arange(len(column)))
        sources.append(column.source[rows] + len(parts))
        positions.append(column.position[rows])
        parts += column.parts
    return Joined(tuple(parts), torch.cat(sources), torch.cat(positions))


def _shape(column: Column) -> str:
    if isinstance(column, Ragged):
        return f"ragged rows of shape {tuple(column.values.shape[1:])}"
    return f"rows of shape {tuple(column.shape[1:])}"


@dataclass(frozen=True)
class Split:
    """Named columns of equal length. Selecting rows copies no column: train and validation share the same memory.

    Example: ``Split({"image": images, "fine": fine, "coarse": coarse})``.

    Args:
        columns: tensors (M, …), `Ragged` or `Joined` columns by name: images (M, H, W, C) uint8, labels, atoms. They
            may be memory-mapped.
        rows: (N,) int64, the samples' row numbers, in the order of the samples; None for all M rows.
    """

    columns: Mapping[str, Column]
    rows: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.columns, Mapping):
            kind = type(self.columns).__name__
            raise TypeError(
                f'Split takes a dict of columns, as in Split({{"image": images, "size": sizes}}), not a {kind}'
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.rows is None else len(self.rows)

    def column(self, name: str) -> Column:
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
            # A slice of a column is a view, not a copy.
            return Split({k: c.pick(index) if isinstance(c, Joined) else c[index] for k, c in self.columns.items()})
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
        return sum(_bytes(column, self.rows) for column in self.columns.values())


def _bytes(column: Column, rows: Tensor | None) -> int:
    if isinstance(column, Ragged):
        lengths = column.lengths if rows is None else column.lengths[rows]
        values = column.values
        count = int(lengths.clamp(min=0).sum())
        return count * values.shape[1:].numel() * values.element_size() + _bytes(lengths, None)
    size = len(column) if rows is None else len(rows)
    return size * column.shape[1:].numel() * column.element_size()


def equal(a: Column, b: Column) -> bool:
    """Whether two columns hold the same numbers."""
    if isinstance(a, Ragged) and isinstance(b, Ragged):
        return torch.equal(a.lengths, b.lengths) and torch.equal(a.values, b.values)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
