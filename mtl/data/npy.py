"""MTAN's layout: train/ and val/, in each a folder for each kind of map, and in these 0.npy, 1.npy, …

Thousands of small files are read slowly. So each kind is written once into one array: see `mtl.data.cache`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mtl.data.cache import cached, digest
from mtl.data.columns import Split
from mtl.data.folders import candidates, not_found
from mtl.data.inputs import eight_bits
from mtl.errors import SetupError, one_line

SPLITS = {"train": "train", "test": "val"}  # the tables' test images are in val/
VERSION = 1  # of the arrays' content; another one makes them anew


@dataclass(frozen=True)
class MapKind:
    """One kind of map, and how a file of it becomes a row of a column.

    Args:
        folders: names that the kind's folder may have; the first one found is read.
        convert: from a file's array to a row; a ValueError says what is wrong.
    """

    folders: Sequence[str]
    convert: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Layout:
    """A data set in MTAN's layout.

    Args:
        name: of the data set.
        subfolders: where it may lie in `root`, besides `root` itself.
        kinds: by column.
        sizes: number of files in the published data, by split; others are reported.
        source: where the field gets the data, for a message.
    """

    name: str
    subfolders: Sequence[str]
    kinds: Mapping[str, MapKind]
    sizes: Mapping[str, int]
    source: str

    def find(self, root: str) -> Path:
        """The folder that holds train/ and val/.

        Raises:
            SetupError: there is none in `root`.
        """
        folders = candidates(root, self.subfolders)
        for folder in folders:
            if any((folder / split / "image").is_dir() for split in SPLITS.values()):
                return folder
        kinds = ", ".join(f"{kind.folders[0]}/" for kind in self.kinds.values())
        wanted = f"train/ and val/, with {kinds} of 0.npy, 1.npy, …,"
        raise not_found(self.name, root, wanted, folders, self.source)

    def picture(self, root: str, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) of the images; only the header of one file is read.

        Args:
            height, width: what they must be; None allows any.

        Raises:
            SetupError: there is no such file, it is damaged, or the images have another size.
        """
        file = _files(self.find(root) / SPLITS["train"], self.kinds["image"])[0]
        shape = _read(file, mapped=True).shape
        if len(shape) != 3:
            raise SetupError(f"{file}: an image (H, W, 3) is needed, not an array of shape {shape}")
        for name, wanted, found in (("height", height, shape[0]), ("width", width, shape[1])):
            if wanted not in (None, found):
                raise SetupError(
                    f"data.{name}={wanted}: {file} is {shape[0]}x{shape[1]}; data.{name}=null takes any size"
                )
        return shape[:2]

    def load(self, root: str, cache: str | None) -> dict[str, Split]:
        """The columns of both splits, memory-mapped.

        Args:
            cache: folder for the arrays; None for one beside the data.

        Raises:
            SetupError: data is missing, damaged or uneven, or the arrays cannot be written.
        """
        folder = self.find(root)
        store = Path(cache).expanduser() if cache else folder / "mtl-cache"
        files = {
            split: {column: _files(folder / name, kind) for column, kind in self.kinds.items()}
            for split, name in SPLITS.items()
        }
        loaded = {}
        for split, columns in files.items():
            self._check_even(columns)
            if (found := len(columns["image"])) != self.sizes[split]:
                print(f"{self.name}: {found} {split} images in {folder}; the published data has {self.sizes[split]}")
            rows = {column: _column(store, self.kinds[column], found) for column, found in columns.items()}
            loaded[split] = Split(rows)
        return loaded

    def _check_even(self, columns: Mapping[str, Sequence[Path]]) -> None:
        """Raises:
        SetupError: one kind has fewer files than another.
        """
        most = max(columns.values(), key=len)
        for found in columns.values():
            if len(found) < len(most):
                missing = found[0].parent / most[len(found)].name
                raise SetupError(
                    f"{missing} is missing: {most[0].parent} has {len(most)} files, {found[0].parent} {len(found)}"
                )


def _files(folder: Path, kind: MapKind) -> list[Path]:
    """0.npy, 1.npy, … of a kind in the folder of a split.

    Raises:
        SetupError: there is no such folder, or a number is missing.
    """
    found = next((folder / name for name in kind.folders if (folder / name).is_dir()), None)
    if found is None:
        raise SetupError(f"{folder / kind.folders[0]} is missing: a folder with 0.npy, 1.npy, … is needed")
    numbers = {int(m[1]) for f in os.scandir(found) if (m := re.fullmatch(r"(\d+)\.npy", f.name))}
    if missing := sorted(set(range(max(numbers, default=0) + 1)) - numbers):
        raise SetupError(f"{found / f'{missing[0]}.npy'} is missing; the files are numbered from 0 without a gap")
    return [found / f"{i}.npy" for i in range(len(numbers))]


def _column(store: Path, kind: MapKind, files: Sequence[Path]) -> Tensor:
    """All rows of one kind, as `cached` keeps them."""
    target = store / f"{files[0].parents[1].name}-{files[0].parent.name}-{digest(files, VERSION)}.npy"
    return cached(target, len(files), lambda: _rows(kind, files), f"{len(files):,} files of {files[0].parent}")


def _rows(kind: MapKind, files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Raises:
    SetupError: a file is damaged, holds something else, or is of another size than the first one.
    """
    first = None
    for file in files:
        array = _read(file)
        try:
            row = kind.convert(array)
        except ValueError as error:
            raise SetupError(f"{file}: {one_line(error)}") from error
        first = row if first is None else first
        if row.shape != first.shape:
            raise SetupError(f"{file}: the shape {row.shape}, but {files[0].name} has {first.shape}")
        yield row


def _read(file: Path, mapped: bool = False) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SetupError(f"{file} is damaged or unreadable ({one_line(error)}); fetch it again") from error
    if not isinstance(array, np.ndarray):
        raise SetupError(f"{file} is damaged or unreadable (it holds an .npz archive); one array is needed")
    if not array.size:
        raise SetupError(f"{file} is damaged or unreadable (it holds no numbers: shape {array.shape}); fetch it again")
    return array


# ------------------------------------------------------------------------------------------- from a file to a row


def image(array: np.ndarray) -> np.ndarray:
    """(H, W, 3) of 0 to 1, or uint8, to uint8. Files made from 8-bit images come back exactly."""
    _check(array, array.ndim == 3 and array.shape[2] == 3, "an image (H, W, 3)")
    return eight_bits(array)


def classes(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """(H, W) of any type, −1 for no label, to int8, −100 for no label."""

    def convert(array: np.ndarray) -> np.ndarray:
        array = array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array
        _check(array, array.ndim == 2, "a map (H, W) of classes")
        wrong = ~((array >= -1) & (array < count) & (array == np.round(array)))  # so of NaN
        if wrong.any():
            raise ValueError(f"the label {array[wrong][0]:g}; -1, or a class from 0 to {count - 1}, is needed")
        return np.where(array < 0, -100, array).astype(np.int8)

    return convert


def depth(array: np.ndarray) -> np.ndarray:
    """(H, W, 1) or (H, W), 0 for no label, to (H, W) float32."""
    array = array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array
    _check(array, array.ndim == 2, "a map (H, W, 1) of depths")
    wrong = (array < 0) | np.isinf(array)
    if wrong.any():
        raise ValueError(f"the depth {array[wrong][0]:g}; numbers from 0 are needed, 0 where there is no label")
    return array.astype(np.float32)


def normals(array: np.ndarray) -> np.ndarray:
    """(H, W, 3), zeros for no label, to float32."""
    _check(array, array.ndim == 3 and array.shape[2] == 3, "a map (H, W, 3) of normals")
    if np.isinf(array).any():
        raise ValueError("an infinite normal; unit vectors are needed, zeros where there is no label")
    if (most := np.nanmax(np.abs(array.astype(np.float32)), initial=0.0)) > 1.01:  # rounding
        raise ValueError(f"a normal with a component of size {most:.4g}; unit vectors are needed")
    return array.astype(np.float32)


def _check(array: np.ndarray, right: bool, needed: str) -> None:
    if not right or array.dtype.kind not in "fiub":
        raise ValueError(f"{needed} is needed, not {array.dtype} of shape {array.shape}")
