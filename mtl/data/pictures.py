"""Image files of any format and size as one column of uint8 images, decoded once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from mtl.data.cache import cached, digest
from mtl.data.inputs import Image
from mtl.errors import SetupError, one_line, suggest

VERSION = 1  # of the arrays' content; another one makes them anew
TOGETHER = 256  # images that are decoded at a time, by all cores


def from_files(
    files: Sequence[str | Path],
    height: int,
    width: int,
    channels: int = 3,
    cache: str | Path = "mtl-cache",
    resize: bool = True,
) -> Tensor:
    """A column of images, (N, height, width, channels) uint8, memory-mapped.

    The files are decoded once, into an array in the folder `cache`. The array is made anew where a file has changed.

    Args:
        files: of any format that Pillow reads.
        height, width: of the column.
        channels: 1 for grey, 3 for RGB, 4 for RGBA.
        cache: folder for the array.
        resize: whether images of another size are resized; otherwise they are refused.

    Raises:
        SetupError: a file is missing, damaged or of another size, or the array cannot be written.
    """
    paths = [Path(file) for file in files]
    if missing := [path for path in paths if not path.is_file()]:
        beside = [f.name for f in os.scandir(missing[0].parent)] if missing[0].parent.is_dir() else []
        many = f"; {len(missing)} of {len(paths)} images are missing" if len(missing) > 1 else ""
        raise SetupError(f"{missing[0]}: no such file{many}{suggest(missing[0].name, beside)}")
    one, beside = Image((channels, height, width)), paths[0].parent
    folders = [os.path.relpath(path.parent, beside) for path in paths]
    name = f"images-{height}x{width}x{channels}-{digest(paths, VERSION, resize, folders)}.npy"
    rows = partial(_rows, one, paths, resize)
    return cached(Path(cache) / name, len(paths), rows, f"{len(paths):,} images of {beside}")


def size_of(file: Path) -> tuple[int, int]:
    """(height, width) of an image file, read from its header.

    Raises:
        SetupError: it is missing or damaged.
    """
    try:
        with Pillow.open(file) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112, 1) >= 5  # photographed with the camera on its side
    except FileNotFoundError as error:
        raise SetupError(f"{file}: no such file") from error
    except Exception as error:  # every format of Pillow has errors of its own for damaged files
        raise SetupError(f"{file}: is damaged, or no image ({one_line(error)[:80]})") from error
    return (width, height) if turned else (height, width)


def _rows(one: Image, paths: Sequence[Path], resize: bool) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), TOGETHER):
            yield from pool.map(partial(_row, one, resize), paths[start : start + TOGETHER])


def _row(one: Image, resize: bool, path: Path) -> np.ndarray:
    try:
        row, changed = one.open(path)
    except ValueError as error:
        raise SetupError(f"{path}: {error}; fetch it again, or leave it out") from error
    if changed and not resize:
        height, width = size_of(path)
        what = f"is {height} high and {width} wide, and the first image {one.shape[1]} and {one.shape[2]}"
        raise SetupError(f"{path}: {what}; set data.height and data.width, to which all are resized")
    return row.numpy()


def maps_from_files(
    files: Sequence[Path | None], height: int, width: int, classes: Sequence[int], cache: str | Path = "mtl-cache"
) -> Tensor:
    """A column of maps of classes, (N, height, width) int16, memory-mapped. Pixels are picked, never mixed.

    Args:
        files: 8-bit pictures, grey or with a palette; None for an image without a map, which gets −100 everywhere.
        height, width: of the column.
        classes: the class of each value from 0 to 255; −100 for no label. Values beyond the list have no label.
        cache: folder for the array.

    Raises:
        SetupError: a file is damaged or has more than 8 bits, or the array cannot be written.
    """
    table = np.full(256, -100, dtype=np.int16)
    table[: len(classes)] = classes
    present = [file for file in files if file is not None]
    if not present:
        return torch.full((len(files), height, width), -100, dtype=torch.int16)
    marks = [file is not None for file in files]
    name = f"maps-{height}x{width}-{digest(present, VERSION, marks, table.tolist())}.npy"
    rows = partial(_map_rows, files, height, width, table)
    return cached(Path(cache) / name, len(files), rows, f"{len(present):,} maps of {present[0].parent}")


def _map_rows(files: Sequence[Path | None], height: int, width: int, table: np.ndarray) -> Iterator[np.ndarray]:
    for file in files:
        if file is None:
            yield np.full((height, width), -100, dtype=np.int16)
            continue
        try:
            with Pillow.open(file) as opened:
                mode, picked = opened.mode, np.asarray(opened.resize((width, height), Pillow.Resampling.NEAREST))
        except Exception as error:
            raise SetupError(f"{file}: is damaged, or no image ({one_line(error)[:80]})") from error
        if mode not in ("L", "P"):
            raise SetupError(f"{file}: a picture of mode {mode}; a map of classes has one channel of 8 bits")
        yield table[picked]
