"""COCO in text files: boxes of 80 classes, and segmentation of the 133 panoptic categories.

Lin et al., "Microsoft COCO", ECCV 2014; Kirillov et al., "Panoptic Segmentation", CVPR 2019. Nothing is downloaded.

    images/train2017/ID.jpg     images/val2017/ID.jpg         val2017 is the test split
    boxes/train2017/ID.txt      "class x y width height" a line: the centre and sides, as shares of the image (YOLO)
    semantic/train2017/ID.png   8-bit category ids, 0 for no label
    classes.json                {"boxes": [80 names], "panoptic": [{"id": 1, "name": …}, …]}

An empty file of boxes says that there is no object. Without a file an image is not labelled for that task. Images are
resized to one size, whatever their shape, with their boxes and maps; `python -m mtl.predict` does the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark
from mtl.data.columns import Ragged, Split
from mtl.data.folders import candidates, not_found
from mtl.data.inputs import IMAGENET, Image
from mtl.data.pictures import from_files, maps_from_files
from mtl.errors import SetupError, one_line
from mtl.tasks import Detection, Segmentation
from mtl.views import Flip, ScaleCrop

SUBFOLDERS = ("coco128", "coco")
SPLITS = {"train": "train2017", "test": "val2017"}


@dataclass
class COCO(Benchmark):
    """Detection of 80 classes, and segmentation into 133.

    Args:
        root: folder that holds images/, boxes/ and semantic/, or coco128/ or coco/ with them.
        height, width: to which the images are resized, in pixels.
        cache: folder for the decoded images and maps; None for mtl-cache/ beside the data.
    """

    batch_size: Annotated[int, Ge(1)] = 8
    eval_batch_size: Annotated[int, Ge(1)] = 32
    root: str = "data"
    height: Annotated[int, Ge(16)] = 256
    width: Annotated[int, Ge(16)] = 256
    cache: str | None = None

    tasks = (Detection("boxes", 80), Segmentation("segmentation", 133))
    augment = (ScaleCrop((1.0, 1.2, 1.5)), Flip())

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.height, self.width), **IMAGENET)}

    def load(self) -> dict[str, Split]:
        folders, wanted = candidates(self.root, SUBFOLDERS), f"images/{SPLITS['train']}/"
        folder = next((f for f in folders if (f / wanted).is_dir()), None)
        if folder is None:
            raise not_found("COCO", self.root, wanted, folders)
        classes = _panoptic(folder / "classes.json")
        return {split: self._split(folder, name, classes) for split, name in SPLITS.items()}

    def _split(self, folder: Path, name: str, classes: Sequence[int]) -> Split:
        images = sorted((folder / "images" / name).glob("*.jpg"))
        if not images:
            raise SetupError(f"{folder / 'images' / name}: holds no .jpg image")
        cache = Path(self.cache).expanduser() if self.cache else folder / "mtl-cache"
        texts = [folder / "boxes" / name / f"{image.stem}.txt" for image in images]
        maps = [folder / "semantic" / name / f"{image.stem}.png" for image in images]
        boxes = [read_boxes(text, self.height, self.width) if text.is_file() else None for text in texts]
        if all(one is None for one in boxes):
            raise SetupError(f"{folder / 'boxes' / name}: holds no .txt file for any image")
        return Split({
            "image": from_files(images, self.height, self.width, 3, cache),
            "boxes": Ragged.of(boxes),
            "segmentation": maps_from_files(
                [one if one.is_file() else None for one in maps], self.height, self.width, classes, cache
            ),
        })  # fmt: skip


def read_boxes(file: Path, height: int, width: int) -> Tensor:
    """(L, 5) rows (x1, y1, x2, y2, class) in pixels of an image of this size, from a text file as YOLO writes it.

    Raises:
        SetupError: a line is something else than five numbers, or a box has no area in the image.
    """
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            kind, x, y, w, h = map(float, line.split())
        except ValueError as error:
            raise SetupError(f'{file}, line {number}: "class x y width height" is needed, not {line!r:.60}') from error
        rows.append([(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height, kind])
    boxes = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    # Rounded shares may lie a little beyond the image.
    boxes[:, 0:4:2] = boxes[:, 0:4:2].clamp(0, width)
    boxes[:, 1:4:2] = boxes[:, 1:4:2].clamp(0, height)
    if (flat := (boxes[:, 2:4] <= boxes[:, :2]).any(1)).any():
        raise SetupError(f"{file}, line {int(flat.nonzero()[0]) + 1}: the box has no area in the image")
    return boxes


def _panoptic(file: Path) -> list[int]:
    """The class from 0 to 132 of each category id, −100 for an id that is none.

    Raises:
        SetupError: the file is missing, or holds no 133 categories.
    """
    try:
        content: Any = json.loads(file.read_text())
        ids = [int(category["id"]) for category in content["panoptic"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(
            f'{file}: a list of categories under the key "panoptic" is needed ({one_line(error)})'
        ) from error
    if len(ids) != 133 or not all(0 < one < 256 for one in ids):
        raise SetupError(f"{file}: {len(ids)} panoptic categories; 133 with ids from 1 to 255 are needed")
    table = [-100] * 256
    for number, one in enumerate(ids):
        table[one] = number
    return table
