"""Any PyTorch Dataset, DataLoader or Hugging Face data set as a `Split`: every sample is read once, into tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from mtl.data.columns import Split
from mtl.errors import SetupError, suggest

NONE = -100  # a class that is missing; a number that is missing is NaN
Key = int | str | Callable[[Any], Any]


def from_dataset(
    source: Any, columns: Sequence[str | None] | Mapping[str, Key] | None = None, limit: int | None = None
) -> Split:
    """The samples of a data set as columns, in the data set's own order.

    Example: ``from_dataset(CIFAR10("data"), ("image", "label"))``.

    A picture of Pillow becomes uint8 (H, W, C). None is a missing label: -100, or NaN if the others have a fraction.

    Args:
        source: a data set with items, or without a length and with a `limit`; or a DataLoader, whose order, shuffled or
            not, plays no role.
        columns: what an item holds. A sequence of names, by position in a tuple (None leaves one out) or by key in a
            dict. Or {column: position, key or function of the item}. None for all keys of dicts.
        limit: the first samples only.

    Raises:
        SetupError: an item holds something else than another one, or something that is no tensor, such as text.
    """
    if limit is not None and limit < 1:
        raise SetupError(f"from_dataset: limit={limit}; a number of samples from 1 is needed")
    batched = isinstance(source, DataLoader) and source.batch_sampler is not None
    size = _size(source, limit)
    items = _batches(source) if isinstance(source, DataLoader) else _items(source, size)
    gathered: dict[str, _Column] = {}
    count, keys = 0, None
    for item in items:
        keys = _keys(item, columns) if keys is None else keys
        for name, key in keys.items():
            column = gathered.setdefault(name, _Column(name, None if batched else size))
            value = _value(name, item, key, count)
            column.extend(value, count) if batched else column.append(value, count)
        count = gathered[next(iter(keys))].count
        if limit is not None and count >= limit:
            break
    if not count:
        raise SetupError(f"from_dataset: the {type(source).__name__} has no items")
    return Split({name: column.tensor()[:limit] for name, column in gathered.items()})


# -- items ------------------------------------------------------------------------------------------------------------


def _size(source: Any, limit: int | None) -> int:
    """Number of samples that are read.

    Raises:
        SetupError: the data set has no length, and there is no limit.
    """
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        if limit is None:
            name = type(dataset).__name__
            raise SetupError(f"from_dataset: {name} has no length, so that it may be endless; give limit=SAMPLES")
        return limit
    return len(dataset) if limit is None else min(limit, len(dataset))


def _items(source: Any, size: int) -> Iterator[Any]:
    # Not `iter`: by Python's old protocol, a data set that never raises IndexError would be endless.
    if hasattr(source, "__getitem__") and not isinstance(source, IterableDataset):
        return (source[i] for i in range(size))
    if not isinstance(source, Iterable):
        raise SetupError(f"from_dataset: a {type(source).__name__} has neither items nor an iterator")
    return itertools.islice(source, size)


def _batches(loader: DataLoader) -> Iterator[Any]:
    """All batches of a loader; where it shuffles or drops the last batch, in the order of its data set instead."""
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and loader.batch_size is not None
    if plain and not getattr(loader.sampler, "replacement", False):
        return iter(DataLoader(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn,
                               num_workers=loader.num_workers))  # fmt: skip
    return iter(loader)


def _keys(item: Any, columns: Sequence[str | None] | Mapping[str, Key] | None) -> dict[str, Key]:
    """{column: where an item has it}."""
    if isinstance(columns, Mapping):
        return dict(columns)
    if columns is not None and (isinstance(columns, str) or not all(isinstance(c, str | None) for c in columns)):
        raise SetupError(f"from_dataset: columns={columns!r:.60}; a tuple of names is needed, or {{name: key}}")
    if isinstance(item, Mapping):
        return {str(name): name for name in (item if columns is None else columns) if name is not None}
    if isinstance(item, tuple | list):
        if columns is None or len(columns) != len(item):
            given = "" if columns is None else f", and {len(columns)} names are given"
            raise SetupError(
                f"from_dataset: an item is a {type(item).__name__} of {len(item)}{given}; name each, as in "
                f"columns=('image', 'label'), or None to leave it out"
            )
        return {name: i for i, name in enumerate(columns) if name is not None}
    if columns is not None and len(columns) == 1:
        return {str(columns[0]): lambda whole: whole}
    raise SetupError(f"from_dataset: an item is a {type(item).__name__}; a tuple or a dict is needed")


def _value(name: str, item: Any, key: Key, sample: int) -> Any:
    if callable(key):
        return key(item)
    try:
        return item[key]
    except (KeyError, IndexError, TypeError) as error:
        if isinstance(item, Mapping):
            held = f"only {', '.join(map(repr, item))}{suggest(str(key), map(str, item))}"
        else:
            held = f"it is a {type(item).__name__}" + (f" of {len(item)}" if hasattr(item, "__len__") else "")
        raise SetupError(f"from_dataset: item {sample} has no {key!r} for the column {name!r}, {held}") from error


# -- columns ----------------------------------------------------------------------------------------------------------


class _Column:
    """A column that grows. Its memory is taken at once where the number of samples is known."""

    def __init__(self, name: str, size: int | None):
        self.name, self.size, self.count = name, size, 0
        self.parts: list[Tensor] = []
        self.missing: list[int] = []
        self.whole: Tensor | None = None

    def append(self, value: Any, sample: int) -> None:
        """Add one sample."""
        self.count += 1
        if value is None:
            self.missing.append(sample)
            return
        one = self._tensor(value, sample)
        if self.whole is None:
            self.whole = torch.zeros((self.size, *one.shape), dtype=one.dtype)
        self._compare(one.shape, self.whole.shape[1:], sample)
        if one.dtype != self.whole.dtype:  # 3, and later 2.5
            self.whole = self.whole.to(torch.promote_types(one.dtype, self.whole.dtype))
        self.whole[sample] = one

    def extend(self, values: Any, sample: int) -> None:
        """Add a batch."""
        part = self._tensor(values, sample)
        if not part.ndim:
            raise SetupError(
                f"from_dataset: {self.name} is one number for a whole batch; one for each sample is needed"
            )
        if self.parts:
            self._compare(part.shape[1:], self.parts[0].shape[1:], sample)
        self.parts.append(part)
        self.count += len(part)

    def tensor(self) -> Tensor:
        """(N, …) all samples."""
        if self.parts:
            return torch.cat(self.parts)
        if self.whole is None:
            raise SetupError(f"from_dataset: {self.name} is None in all items")
        if self.missing:
            if self.whole.dtype == torch.uint8:
                self.whole = self.whole.long()
            self.whole[self.missing] = torch.nan if self.whole.is_floating_point() else NONE
        return self.whole[: self.count]

    def _tensor(self, value: Any, sample: int) -> Tensor:
        where = f"from_dataset: item {sample}: {self.name}"
        if type(value).__module__.startswith("PIL."):
            value = np.array(value)
            value = value[..., None] if value.ndim == 2 else value
        if isinstance(value, str | bytes):
            raise SetupError(f"{where} is text ({value[:30]!r}); turn it into numbers first, as a tokenizer does")
        if not isinstance(value, Tensor | np.ndarray | np.generic | Number | list | tuple):
            kind = type(value).__name__
            raise SetupError(f"{where} is a {kind}; a number, a tensor, an array or a picture is needed")
        try:
            found = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SetupError(f"{where} is a {type(value).__name__} that is no tensor: {error}") from error
        return found.long() if found.dtype == torch.bool else found

    def _compare(self, shape: torch.Size, first: torch.Size, sample: int) -> None:
        if shape != first:
            raise SetupError(
                f"from_dataset: item {sample}: {self.name} has the shape {tuple(shape)}, and the items before "
                f"{tuple(first)}; pad, cut or resize all to one shape"
            )
