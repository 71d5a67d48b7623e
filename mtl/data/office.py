"""Office: the same classes of objects in several domains, with images of its own in each. Every domain is a task.

Saenko et al. (ECCV 2010) for Office-31, Gong et al. (CVPR 2012) for Office-Caltech-10, Venkateswara et al. (CVPR 2017)
for Office-Home. Each domain is a folder with a folder of images for each class. Nothing is downloaded.

As in LibMTL, every step has equally many images of each domain, and an epoch is as long as the largest domain. Images
are resized to a square, whatever their shape, and not augmented. Different from LibMTL: see `mtl.data.union`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark
from mtl.data.columns import Split
from mtl.data.folders import candidates, not_found
from mtl.data.inputs import IMAGENET, Image
from mtl.data.pictures import from_files
from mtl.data.union import Parts
from mtl.errors import SetupError, one_line
from mtl.random import stream
from mtl.tasks import Classification

SUBFOLDERS = ("office_caltech10", "office31", "office-31", "office_home", "OfficeHome")
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")
SPLITS = ("train", "val", "test")
SHARES = (0.6, 0.2)  # of train and val, in each class of each domain; the rest is test, as in LibMTL


@dataclass
class Domain(Benchmark):
    """One domain of Office. Its only task has the domain's name.

    Args:
        root: folder that holds the domains.
        name: of the domain and its folder.
        classes: number of classes.
        size: height and width of the images, in pixels.
        cache: folder for the decoded images.
    """

    root: Path = Path()
    name: str = ""
    classes: int = 10
    size: int = 112
    cache: Path = Path()

    @cached_property
    def tasks(self) -> Sequence[Classification]:
        return (Classification(self.name, self.classes),)

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.size, self.size), **IMAGENET)}

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """{class: its files, as domain/class/file}."""
        folder = self.root / self.name
        kinds = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        return {
            kind: sorted(
                f"{self.name}/{kind}/{f.name}" for f in os.scandir(folder / kind) if f.name.lower().endswith(ENDINGS)
            )
            for kind in kinds
        }

    def load(self) -> dict[str, Split]:
        files = [file for own in self.files.values() for file in own]
        if not files:
            raise SetupError(f"{self.root / self.name}: holds no images")
        images = from_files([self.root / file for file in files], self.size, self.size, 3, self.cache)
        label = torch.arange(len(self.files)).repeat_interleave(torch.tensor([len(v) for v in self.files.values()]))
        row = {file: i for i, file in enumerate(files)}
        chosen = {split: self._listed(split, row) for split in SPLITS} if listed(self.root) else self._drawn(row)
        columns = {"image": images, self.name: label}
        return {split: Split(columns, self._mixed(rows, split)) for split, rows in chosen.items()}

    def _mixed(self, rows: Sequence[int], split: str) -> Tensor:
        """The rows in a fixed random order. So the first ones, which limit_train keeps, are of all classes."""
        order = torch.randperm(len(rows), generator=stream(0, "office_order", self.name, split))
        return torch.tensor(rows, dtype=torch.int64)[order]

    def _listed(self, split: str, row: Mapping[str, int]) -> list[int]:
        """The rows that train.txt, val.txt or test.txt lists."""
        file, rows = self.root / f"{split}.txt", []
        folders = {entry.name for entry in os.scandir(self.root) if entry.is_dir()}
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            name = line.strip()
            domain = name.partition("/")[0]
            if not name or (domain != self.name and domain in folders):  # another task's image
                continue
            if name not in row:
                raise SetupError(f"{file}, line {number}: there is no image {name} in {self.root}")
            rows.append(row[name])
        return rows

    def _drawn(self, row: Mapping[str, int]) -> dict[str, list[int]]:
        """60, 20 and 20 % of each class, the same for every seed."""
        chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
        for kind, files in self.files.items():
            order = torch.randperm(len(files), generator=stream(0, "office_split", self.name, kind)).tolist()
            train, val = (round(len(files) * share) for share in SHARES)
            bounds = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
            for split, own in bounds.items():
                chosen[split] += sorted(row[files[i]] for i in own)
        return chosen


@dataclass
class Office(Parts):
    """One classification task for each domain.

    Args:
        root: folder that holds the domains, or office_caltech10/ with them. With train.txt, val.txt and test.txt beside
            them, which list files as domain/class/file, these are the splits. Otherwise 60, 20 and 20 % are drawn.
        domains: folders; Office-31 has amazon, dslr and webcam.
        classes: number of classes; 10, 31 (Office-31) or 65 (Office-Home).
        size: height and width to which the images are resized, in pixels.
        cache: folder for the decoded images; None for one beside the domains.
    """

    root: str = "data"
    domains: Sequence[str] = ("amazon", "caltech10", "dslr", "webcam")
    classes: Annotated[int, Ge(2)] = 10
    size: Annotated[int, Ge(1)] = 112
    cache: str | None = None
    batch_size: Annotated[int, Ge(1)] | None = 256
    balanced: bool = True

    @cached_property
    def members(self) -> Mapping[str, Domain]:
        if not self.domains:
            raise ValueError("domains: at least one folder is needed")
        folder = self._folder
        cache = Path(self.cache).expanduser() if self.cache else folder / "mtl-cache"
        # The batch size is divided among the domains by the base class.
        return {d: Domain(1, root=folder, name=d, classes=self.classes, size=self.size, cache=cache)
                for d in self.domains}  # fmt: skip

    def load(self) -> dict[str, Split]:
        missing = [name for name in self.domains if not (self._folder / name).is_dir()]
        if missing:
            wanted = f"{missing[0]}/ with a folder of images for each class"
            raise not_found("Office", self.root, wanted, candidates(self.root, SUBFOLDERS))
        first, *others = self.members.values()
        if len(first.files) != self.classes:
            raise SetupError(f"data.classes={self.classes}: {first.root / first.name} has {len(first.files)} folders")
        for other in others:
            if differ := set(first.files) ^ set(other.files):
                raise SetupError(f"{first.root}: the class {min(differ)} is in only one of {first.name}, {other.name}")
        try:
            return super().load()
        except OSError as error:
            raise SetupError(f"{first.root}: {one_line(error)}") from error

    @cached_property
    def _folder(self) -> Path:
        """The folder of the domains; `root` itself if there is none."""
        folders = candidates(self.root, SUBFOLDERS)
        return next((f for f in folders if (f / self.domains[0]).is_dir()), folders[0])


def listed(root: Path) -> bool:
    """Whether train.txt, val.txt and test.txt list the images of each split.

    Raises:
        SetupError: one of them is missing.
    """
    missing = [f"{split}.txt" for split in SPLITS if not (root / f"{split}.txt").is_file()]
    if 0 < len(missing) < len(SPLITS):
        raise SetupError(f"{root / missing[0]} is missing; without all three lists, 60, 20 and 20 % are drawn")
    return not missing
