"""Oxford-IIIT Pet: breed, trimap, and the box of the head where there is one (Parkhi et al., CVPR 2012).

The files as torchvision's OxfordIIITPet unpacks them, in oxford-iiit-pet/; nothing is downloaded. The official lists
are the splits. Most training images have a head box, and no test image has one: `data.val_fraction=0.2` holds training
images out, on which it is measured.

Images are resized to one size, whatever their shape, with their boxes and maps; `python -m mtl.predict` does the same.
"""

from __future__ import annotations

import xml.etree.ElementTree as XML
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark
from mtl.data.columns import Ragged, Split
from mtl.data.folders import candidates, not_found
from mtl.data.inputs import IMAGENET, Image
from mtl.data.pictures import from_files, maps_from_files, size_of
from mtl.errors import SetupError, one_line
from mtl.random import stream
from mtl.tasks import Classification, Detection, Segmentation
from mtl.views import Flip, ScaleCrop

SUBFOLDERS = ("oxford-iiit-pet", "pets/oxford-iiit-pet")
SPLITS = {"train": "trainval", "test": "test"}
SPECIES = ("cat", "dog")
TRIMAP = (-100, 0, 1, 2)  # 1 pet, 2 background, 3 border


@dataclass
class Pets(Benchmark):
    """37 breeds, a map of pet, background and border, and detection of the heads of cats and dogs.

    Args:
        root: folder that holds images/ and annotations/, or oxford-iiit-pet/ with them.
        height, width: to which the images are resized, in pixels.
        cache: folder for the decoded images and maps; None for mtl-cache/ beside the data.
    """

    batch_size: Annotated[int, Ge(1)] = 16
    eval_batch_size: Annotated[int, Ge(1)] = 64
    root: str = "data"
    height: Annotated[int, Ge(16)] = 192
    width: Annotated[int, Ge(16)] = 192
    cache: str | None = None

    tasks = (Classification("breed", 37), Segmentation("trimap", len(TRIMAP) - 1), Detection("head", len(SPECIES)))
    augment = (ScaleCrop((1.0, 1.2, 1.5)), Flip())

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.height, self.width), **IMAGENET)}

    def load(self) -> dict[str, Split]:
        folders, wanted = candidates(self.root, SUBFOLDERS), "annotations/trainval.txt"
        folder = next((f for f in folders if (f / wanted).is_file()), None)
        if folder is None:
            raise not_found("Oxford-IIIT Pet", self.root, wanted, folders)
        return {split: self._split(folder, name) for split, name in SPLITS.items()}

    def _split(self, folder: Path, name: str) -> Split:
        names, breeds = _listed(folder / "annotations" / f"{name}.txt")
        # In a fixed random order, so that the first ones, which limit_train keeps, are of all breeds.
        order = torch.randperm(len(names), generator=stream(0, "pets_order", name)).tolist()
        names, breeds = [names[i] for i in order], [breeds[i] for i in order]
        cache = Path(self.cache).expanduser() if self.cache else folder / "mtl-cache"
        images = [folder / "images" / f"{one}.jpg" for one in names]
        maps = [folder / "annotations" / "trimaps" / f"{one}.png" for one in names]
        heads = [folder / "annotations" / "xmls" / f"{one}.xml" for one in names]
        column = from_files(images, self.height, self.width, 3, cache)  # first: it says which images are missing
        known = [
            self._heads(head, image) if head.is_file() else None for head, image in zip(heads, images, strict=True)
        ]
        none = Ragged(torch.zeros(0, 5), torch.full((len(names),), -1))
        return Split({
            "image": column,
            "breed": torch.tensor(breeds),
            "trimap": maps_from_files(
                [one if one.is_file() else None for one in maps], self.height, self.width, TRIMAP, cache
            ),
            "head": none if all(one is None for one in known) else Ragged.of(known),
        })  # fmt: skip

    def _heads(self, file: Path, image: Path) -> Tensor:
        """(L, 5) the boxes of one image, in pixels of the resized one."""
        height, width = size_of(image)
        scale = torch.tensor([self.width / width, self.height / height] * 2 + [1.0])
        return read_voc(file) * scale


def read_voc(file: Path) -> Tensor:
    """(L, 5) rows (x1, y1, x2, y2, class) of a PASCAL VOC file, whose pixels are counted from 1.

    Raises:
        SetupError: it is damaged, or an object is neither cat nor dog.
    """
    rows = []
    try:
        for one in XML.parse(file).getroot().iter("object"):
            box = one.find("bndbox")
            x1, y1, x2, y2 = (float(box.find(name).text) for name in ("xmin", "ymin", "xmax", "ymax"))
            rows.append([x1 - 1, y1 - 1, x2, y2, SPECIES.index(one.find("name").text)])
    except (XML.ParseError, AttributeError, TypeError, ValueError) as error:
        raise SetupError(f"{file}: is damaged, or no VOC file with cats and dogs ({one_line(error)})") from error
    return torch.tensor(rows, dtype=torch.float32).view(-1, 5)


def _listed(file: Path) -> tuple[list[str], list[int]]:
    """Names and breeds from 0 of the images that a list names, a line each: "Abyssinian_1 1 1 1"."""
    names, breeds = [], []
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise SetupError(f"{file}: {one_line(error)}") from error
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            continue
        name, *numbers = line.split()
        if not numbers or not numbers[0].isdigit() or not 1 <= int(numbers[0]) <= 37:
            raise SetupError(f"{file}, line {number}: an image and its breed from 1 to 37 are needed, not {line!r:.60}")
        names.append(name)
        breeds.append(int(numbers[0]) - 1)
    return names, breeds
