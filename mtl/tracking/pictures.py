"""Pictures of a run: one PNG per epoch, RUN/pictures/epoch_0008.png, with a row per test sample.

Its columns are the image, then truth and prediction of each task. A text in the PNG says what the columns are, so that
a reader can take the picture apart again. This module needs no torch: the report reads pictures too.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER, KEY = "pictures", "mtl"
GAP = 2  # white rows and columns between two tiles
KINDS = ("image", "truth", "prediction")
LARGEST, AREA = 64 * 10**6, 50 * 10**6  # bytes, and height times width; a run writes far less


@dataclass(frozen=True)
class PictureGrid:
    """The pictures of one epoch.

    Attributes:
        columns: (task, kind) of each column, with a kind of `KINDS`. The column of the images has the task "".
        tiles: (columns, samples, height, width, 3) uint8.
    """

    columns: tuple[tuple[str, str], ...]
    tiles: NDArray

    @property
    def page(self) -> NDArray:
        """(rows, columns, 3) uint8: all tiles in one picture, white between them."""
        columns, samples, height, width, _ = self.tiles.shape
        page = np.full((samples * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
        for c, column in enumerate(self.tiles):
            for s, tile in enumerate(column):
                y, x = s * (height + GAP), c * (width + GAP)
                page[y : y + height, x : x + width] = tile
        return page

    @property
    def caption(self) -> str:
        """The columns in words."""
        names = ", ".join(f"{task} {kind}".strip() for task, kind in self.columns)
        return f"A row per test sample. Columns: {names}."

    def column(self, task: str, kind: str) -> NDArray | None:
        """(samples, height, width, 3) uint8; None if the sheet has no such column."""
        return self.tiles[self.columns.index((task, kind))] if (task, kind) in self.columns else None


def path_of(directory: Path, epoch: int) -> Path:
    """The file with the pictures of an epoch."""
    return directory / FOLDER / f"epoch_{epoch:04d}.png"


def epochs(directory: Path) -> list[int]:
    """The epochs of which a run's folder has pictures, in order. Empty if the folder cannot be read."""
    try:
        names = os.listdir(directory / FOLDER)
    except OSError:
        return []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"epoch_(\d{4,9})\.png", name)))


def encode(sheet: PictureGrid) -> bytes:
    """The sheet as the bytes of a PNG file."""
    from PIL import Image, PngImagePlugin  # here and below: a run without pictures does not need it

    text = PngImagePlugin.PngInfo()
    _, samples, height, width, _ = sheet.tiles.shape
    text.add_text(KEY, json.dumps({"columns": sheet.columns, "samples": samples, "height": height, "width": width}))
    file = io.BytesIO()
    Image.fromarray(sheet.page).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def read(file: Path) -> PictureGrid:
    """The sheet in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or no picture of a run.
    """
    from PIL import Image

    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
        raise ValueError("no picture of a run")
    data = file.read_bytes()
    # The size is checked before anything is decoded: a small file can hold a huge picture.
    if len(data) < 24 or int(np.prod(struct.unpack(">II", data[16:24]), dtype=float)) > AREA:
        raise ValueError("no picture of a run, or damaged")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            page = np.array(opened.convert("RGB"))
            layout = json.loads(opened.info[KEY])
    except Exception as error:  # Pillow has errors of its own for each kind of damage
        raise ValueError(f"damaged ({type(error).__name__})") from error
    return _cut(page, layout)


def of(directory: Path, epoch: int) -> PictureGrid | None:
    """The pictures of a run's epoch; None if there are none that can be read."""
    try:
        return read(path_of(directory, epoch))
    except (OSError, ValueError):
        return None


def _cut(page: NDArray, layout: Any) -> PictureGrid:
    """Take a page apart. Raises ValueError if the layout is not this page's."""
    try:
        columns = tuple((str(task), str(kind)) for task, kind in layout["columns"])
        samples, height, width = (int(layout[key]) for key in ("samples", "height", "width"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("damaged: its columns are not described") from error
    wanted = (samples * (height + GAP) - GAP, len(columns) * (width + GAP) - GAP, 3)
    if min(len(columns), samples, height, width) < 1 or page.shape != wanted or {k for _, k in columns} - set(KINDS):
        raise ValueError("damaged: its size is not what its text says")
    tiles = np.empty((len(columns), samples, height, width, 3), np.uint8)
    for c, column in enumerate(tiles):
        for s, tile in enumerate(column):
            y, x = s * (height + GAP), c * (width + GAP)
            tile[:] = page[y : y + height, x : x + width]
    return PictureGrid(columns, tiles)
