"""CelebA: 40 attributes of faces, as 40 tasks. Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015.

162,770 training, 19,867 validation and 19,962 test images, in the official partition: nobody is in two parts. The files
are as torchvision lays them out; nothing is downloaded. A folder with fewer images works, and its size is reported.

Images are resized to a square, which distorts them, and scaled to [0, 1]. There is no augmentation. Both are as in the
code of FAMO and FairGrad. Each image is decoded once, into one array, which is memory-mapped from then on.

F1 of an attribute that no test image has is undefined. It has no value in the results, and no part in the mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark, Split
from mtl.data.inputs import Image
from mtl.data.pictures import from_files
from mtl.errors import SetupError, one_line
from mtl.tasks import alike
from mtl.tasks.binary import Binary

ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
FOLDER, LABELS, PARTITION = "img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"
SPLITS = ("train", "val", "test")  # 0, 1 and 2 in the partition
WHOLE = 202_599  # published images


@dataclass
class CelebA(Benchmark):
    """40 binary attributes of faces.

    Args:
        root: the folder that holds celeba/, or celeba/ itself.
        cache: folder for the decoded array, 12 KB an image at 64x64; None for mtl-cache/ beside the images.
        size: height and width of the images for the network, in pixels.
    """

    batch_size: Annotated[int, Ge(1)] = 256
    root: str = "data"
    cache: str | None = None
    size: Annotated[int, Ge(8)] = 64

    tasks = alike(Binary, ATTRIBUTES, target="attributes")
    select: ClassVar[Literal["first", "mean"]] = "mean"

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.size, self.size))}

    def load(self) -> dict[str, Split]:
        folder = _find(self.root)
        names = sorted(entry.name for entry in os.scandir(folder / FOLDER) if entry.name.endswith(".jpg"))
        if not names:
            raise SetupError(f"{folder / FOLDER}: there is no .jpg in it")
        if len(names) < WHOLE:
            print(f"CelebA: {len(names):,} of the {WHOLE:,} images are in {folder / FOLDER}")
        attributes = _attributes(folder / LABELS, names)
        parts = torch.from_numpy(np.array(_rows(folder / PARTITION, names, 1, 0), dtype=np.int64))[:, 0]
        if len(wrong := ((parts < 0) | (parts > 2)).nonzero()):
            i = int(wrong[0])
            raise SetupError(f"{folder / PARTITION}: {names[i]} has the part {int(parts[i])}; 0, 1 or 2 is needed")
        columns = {"image": self._images(folder / FOLDER, names), "attributes": attributes}
        splits = {name: Split(columns, (parts == i).nonzero().flatten()) for i, name in enumerate(SPLITS)}
        if empty := [name for name, split in splits.items() if not len(split)]:
            shown = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
            raise SetupError(f"{folder / FOLDER}: the partition gives {shown} images; there is no {empty[0]} image")
        return splits

    def _images(self, folder: Path, names: Sequence[str]) -> Tensor:
        """(N, size, size, 3) uint8, memory-mapped."""
        store = Path(self.cache).expanduser() if self.cache else folder.parent / "mtl-cache"
        return from_files([folder / name for name in names], self.size, self.size, cache=store)


def _find(root: str) -> Path:
    """The folder with the images' folder and both tables.

    Raises:
        SetupError: there is none, or a table is missing.
    """
    given = Path(root).expanduser()
    folders = [given / "celeba", given]
    for folder in folders:
        if (folder / FOLDER).is_dir():
            if missing := [name for name in (LABELS, PARTITION) if not (folder / name).is_file()]:
                raise SetupError(f"{folder / missing[0]} is missing; it is one of CelebA's official files")
            return folder
    looked = " and ".join(str((folder / FOLDER).resolve()) for folder in folders)
    raise SetupError(
        f"CelebA is not in data.root={root}: looked for {looked}. Fetch {FOLDER}/, {LABELS} and {PARTITION} from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, and set data.root (or the environment variable MTL_DATA) "
        "to the folder that holds celeba/"
    )


def _attributes(file: Path, names: Sequence[str]) -> Tensor:
    """(N, 40) int8, 0 or 1.

    Raises:
        SetupError: the table has another header, lacks an image, or holds something else than −1 and 1.
    """
    with _reading(file), file.open() as lines:
        count, header = lines.readline().split(), lines.readline().split()
    if header != list(ATTRIBUTES) or len(count) != 1:
        found = next((i for i, (a, b) in enumerate(zip(header, ATTRIBUTES, strict=False)) if a != b), len(header))
        what = f"name {found + 1} is {header[found]!r}" if found < len(header) else f"{len(header)} names"
        raise SetupError(f"{file}: line 2 must name the {len(ATTRIBUTES)} attributes, {ATTRIBUTES[0]} first; {what}")
    values = np.array(_rows(file, names, len(ATTRIBUTES), 2), dtype=np.int8)
    if (wrong := np.abs(values) != 1).any():
        i, k = np.argwhere(wrong)[0]
        raise SetupError(f"{file}: {names[i]} has {values[i, k]} for {ATTRIBUTES[k]}; -1 or 1 is needed")
    return torch.from_numpy((values + 1) // 2)


def _rows(file: Path, names: Sequence[str], width: int, skip: int) -> list[list[int]]:
    """The numbers of each image in a table: a line "000001.jpg 1 -1 …" for each image.

    Raises:
        SetupError: an image has no line, or its line is not a name and `width` numbers.
    """
    with _reading(file):
        lines = file.read_text().splitlines()[skip:]
    found = {line.partition(" ")[0]: line for line in lines}
    rows = []
    for name in names:
        if name not in found:
            raise SetupError(f"{file}: there is no line for the image {name}, which is in {FOLDER}/")
        try:
            row = [int(word) for word in found[name].split()[1:]]
        except ValueError:
            row = []
        if len(row) != width:
            raise SetupError(f"{file}: {found[name][:60]!r}; a name and {width} whole numbers are needed")
        rows.append(row)
    return rows


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises:
    SetupError: the table cannot be read inside this block.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{file} is damaged or unreadable ({one_line(error)})") from error
