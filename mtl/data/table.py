"""Your own table: a CSV file with labels, and image files or numbers for the network. From YAML alone, without code.

Example::

    python train.py data=table data.file=birds/labels.csv data.image=photo data.height=64 data.width=64 \\
        "data.labels={species: class, weight: number}"

A row is a sample. An empty cell is a missing label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from mtl.data import sheet
from mtl.data.base import Benchmark, Split
from mtl.data.inputs import IMAGENET, Image, Input, Numbers
from mtl.data.pictures import from_files, size_of
from mtl.data.sheet import Sheet
from mtl.errors import ConfigError, SetupError, suggest
from mtl.random import stream
from mtl.tasks import Classification, Regression, Task
from mtl.views import Augment, Crop, Flip

KINDS = ("class", "number")
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}


@dataclass
class DataTable(Benchmark):
    """A table of samples, from a .csv, .tsv or .npz file.

    The network reads the column "image", the column "row" with the numbers of a sample, or both. Numbers and labels of
    kind number are standardised by the training rows. The classes are those of the training rows, in sorted order.

    Args:
        file: the table; an .npz file has an array for each column.
        labels: for each label column its kind: "class", "number", or a list of all classes in the order you want. In
            an .npz file, -100 or NaN is a missing label.
        image: the column with the names of the image files (in an .npz file: the images, uint8 (N, H, W, C)); None
            where there are no images.
        root: the images' folder; None for the folder of `file`.
        height, width: to which images are resized; None where all have one size already.
        channels: 3 for RGB, 1 for grey.
        mean, std: by which images are normalised, of values from 0 to 1; None for ImageNet's.
        crop: training images are padded by this many pixels, and cropped back at random.
        flip: whether training images are mirrored at random.
        features: the columns of numbers; None for all other columns, or for no column where there are images.
        split: the column that says train, val or test; None where there is none.
        test_file: another table with the test rows.
        test_fraction: share of the rows for testing, without `split` and `test_file`. All seeds have the same test
            rows.
        cache: folder for the decoded images; None for mtl-cache/ beside `file`.
    """

    file: str = field(kw_only=True)
    labels: dict[str, Literal["class", "number"] | list[str | int]] = field(kw_only=True)
    image: str | None = None
    root: str | None = None
    height: Annotated[int, Ge(1)] | None = None
    width: Annotated[int, Ge(1)] | None = None
    channels: Literal[1, 3] = 3
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop: Annotated[int, Ge(0)] = 0
    flip: bool = False
    features: Sequence[str] | None = None
    split: str | None = None
    test_file: str | None = None
    test_fraction: Annotated[float, Gt(0), Lt(1)] = 0.2
    cache: str | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("labels: names no column; write data.labels={COLUMN: class, COLUMN: number}")
        for name, kind in self.labels.items():
            if isinstance(kind, str) and kind not in KINDS:
                raise ValueError(f"labels: {name} is {kind!r}; class, number, or a list of classes is needed")
            if not isinstance(kind, str) and len({str(one) for one in kind}) < max(2, len(kind)):
                raise ValueError(f"labels: {name} has the classes {list(kind)}; two or more, each once, are needed")
        if self.split is not None and self.test_file is not None:
            raise ValueError("split: test_file has the test rows; give one of the two")
        if (self.height is None) != (self.width is None):
            raise ValueError("height: height and width must both be given, or neither")
        self._known: Mapping[str, Any] | None = None

    # -- what the network reads and predicts

    @cached_property
    def tasks(self) -> Sequence[Task]:
        found: list[Task] = []
        for name, known in self._learnt["labels"].items():
            # A name in a table may hold spaces, and a task's name becomes a key in files.
            task = "".join(c if c.isalnum() or c in "_-" else "_" for c in name).lstrip("-") or "label"
            if isinstance(known, Mapping):
                found.append(Regression(task, target=_label(name), **known))
            else:
                found.append(Classification(task, len(known), target=_label(name), classes=tuple(known)))
        return tuple(found)

    @cached_property
    def inputs(self) -> Mapping[str, Input]:
        learnt, found = self._learnt, {}
        if self.image is not None:
            mean, std = (
                value
                if value is not None
                else IMAGENET[key]
                if self.channels == 3
                else (float(np.mean(IMAGENET[key])),)
                for key, value in (("mean", self.mean), ("std", self.std))
            )
            found["image"] = Image((self.channels, *learnt["size"]), mean, std)
        if learnt["features"]:
            mean, std = zip(*learnt["features"].values(), strict=True)
            found["row"] = Numbers((len(mean),), mean, std)
        return found

    @property
    def augment(self) -> Sequence[Augment]:
        return tuple(([Crop(padding=self.crop)] if self.crop else []) + ([Flip()] if self.flip else []))

    def facts(self) -> dict[str, Any]:
        return self._learnt

    def recall(self, facts: Mapping[str, Any]) -> None:
        self._known = facts

    @cached_property
    def _learnt(self) -> dict[str, Any]:
        """What the training rows say: classes, means and standard deviations, the size of the images."""
        if self._known is not None:
            return dict(self._known)
        table, training = self._tables["train"], self._rows["train"]
        labels: dict[str, Any] = {}
        for name, kind in self.labels.items():
            if kind == "number":
                labels[name] = _statistics(table, name, sheet.numbers(table, name)[training].double().numpy())
            elif isinstance(kind, str):
                labels[name] = list(sheet.class_names(table, name, training.tolist()))
                if len(labels[name]) < 2:
                    raise SetupError(f"{table.file}: {name} has only the class {labels[name][0]!r}; two are needed")
            else:
                labels[name] = [str(one) for one in kind]
        features = {}
        for i, name in enumerate(table.names):
            found = _statistics(table, name, table.numbers[training.numpy(), i])
            features[name] = (found["mean"], found["std"])
        size = None if self.image is None else self._size()
        return {"labels": labels, "columns": list(table.columns), "features": features, "size": size}

    # -- the files

    @cached_property
    def _tables(self) -> dict[str, Sheet]:
        """The table of the training rows; and of the test rows, if these are in another file."""
        texts = [*self.labels, *filter(None, (self.image, self.split))]
        numbers = self.features if self.features is not None or self.image is None else ()
        if twice := [name for name in numbers or () if name in texts]:
            raise ConfigError(f"data.features: {twice[0]!r} is a label, image or split already; leave it out")
        if self._known is not None:
            numbers = self._known["columns"]
        tables = {"train": sheet.read(Path(self.file).expanduser(), texts, numbers)}
        if not tables["train"].names and self.image is None:
            raise SetupError(f"{self.file}: no column is left for the network to read; set data.image or data.features")
        if self.test_file is not None:
            tables["test"] = sheet.read(Path(self.test_file).expanduser(), texts, tables["train"].columns)
        return tables

    @cached_property
    def _rows(self) -> dict[str, Tensor]:
        """The samples of each split. A test file has samples of its own."""
        table = self._tables["train"]
        if self.test_file is not None:
            return {"train": torch.arange(len(table)), "test": torch.arange(len(self._tables["test"]))}
        if self.split is not None:
            return _divided(table, self.split)
        if len(table) < 2:
            raise SetupError(f"{table.file}: one row cannot be divided into training and test rows")
        # Seed 0, whatever the run's seed is: all runs have the same test rows.
        order = torch.randperm(len(table), generator=stream(0, "table_split"))
        held_out = min(max(1, round(len(table) * self.test_fraction)), len(table) - 1)
        return {"train": order[held_out:].sort().values, "test": order[:held_out].sort().values}

    def _size(self) -> tuple[int, int]:
        """(height, width) of the images; where the config does not say it, of the first one."""
        if self.height is not None:
            return self.height, self.width
        table = self._tables["train"]
        stored = table.texts[self.image]
        return stored.shape[1:3] if stored.ndim > 1 else size_of(self._files(table)[0])

    def _files(self, table: Sheet) -> list[Path]:
        folder = Path(self.root).expanduser() if self.root is not None else table.file.parent
        names = table.texts[self.image].tolist()
        for i, name in enumerate(names):
            if not name:
                raise SetupError(f"{table.at(i)}: {self.image} is empty; the name of an image file is needed")
            if not (file := folder / str(name)).is_file():
                beside = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
                left = sum(not (folder / str(other)).is_file() for other in names[i:])
                more = f" ({left} images are missing)" if left > 1 else ""
                hint = suggest(file.name, beside) or "; data.root is the folder of the images"
                raise SetupError(f"{table.at(i)}: there is no image {file}{more}{hint}")
        return [folder / str(name) for name in names]

    def load(self) -> dict[str, Split]:
        whole = {name: Split(self._columns(table)) for name, table in self._tables.items()}
        return {name: whole.get(name, whole["train"]).select(rows) for name, rows in self._rows.items()}

    def open_table(self, file: Path) -> tuple[list[str], dict[str, Tensor]]:
        table = sheet.read(file, [self.image] if self.image is not None else [], self._learnt["columns"])
        return [f"{file}:{row}" for row in table.rows], self._read_inputs(table)

    def _columns(self, table: Sheet) -> dict[str, Tensor]:
        columns = self._read_inputs(table)
        for name, known in self._learnt["labels"].items():
            number = isinstance(known, Mapping)
            columns[_label(name)] = sheet.numbers(table, name) if number else sheet.classes(table, name, known)
        return columns

    def _read_inputs(self, table: Sheet) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = {}
        if self.image is not None:
            columns["image"] = self._images(table)
        if self._learnt["features"]:
            columns["row"] = torch.from_numpy(table.numbers).float()
        return columns

    def _images(self, table: Sheet) -> Tensor:
        height, width = self._learnt["size"]
        stored = table.texts[self.image]
        if stored.ndim == 1:
            cache = Path(self.cache).expanduser() if self.cache is not None else table.file.parent / "mtl-cache"
            resize = self.height is not None
            return from_files(self._files(table), height, width, self.channels, cache, resize)
        stored = stored[..., None] if stored.ndim == 3 else stored
        if stored.shape[1:] != (height, width, self.channels) or stored.dtype != np.uint8:
            needed = f"uint8 of shape (N, {height}, {width}, {self.channels})"
            raise SetupError(
                f"{table.file}: {self.image} is {stored.dtype} of shape {stored.shape}; {needed} is needed"
            )
        return torch.from_numpy(stored)


def _label(name: str) -> str:
    """The column of a label; "image" and "row" are the network's."""
    return f"label {name}" if name in ("image", "row") else name


def _statistics(table: Sheet, name: str, values: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of numbers; 1 where they do not vary, because numbers are divided by it."""
    known = values[~np.isnan(values)]
    if not known.size:
        raise SetupError(f"{table.file}: no training row has a number in the column {name!r}")
    mean, std = float(known.mean()), float(known.std())
    if 0 < std < 1e-6 * abs(mean):
        raise SetupError(
            f"{table.file}: {name} varies by {std:.3g} around {mean:.6g}, more finely than float32; subtract {mean:.6g}"
        )
    return {"mean": mean, "std": std or 1.0}


def _divided(table: Sheet, column: str) -> dict[str, Tensor]:
    """The samples of each split, from the column that says so.

    Raises:
        SetupError: a row says something else than train, val or test, or no row is for training or testing.
    """
    found: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for i, cell in enumerate(table.texts[column].tolist()):
        if (split := SPLITS.get(str(cell).lower())) is None:
            raise SetupError(f"{table.at(i)}: {column} is {str(cell)[:40]!r}; train, val or test is needed")
        found[split].append(i)
    for name in ("train", "test"):
        if not found[name]:
            raise SetupError(f"{table.file}: no row has the {column} {name!r}")
    return {name: torch.tensor(rows) for name, rows in found.items() if rows}
