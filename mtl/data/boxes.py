"""Coloured shapes with exact boxes, classes and segmentation, to try and test detection without a download.

Each image holds up to four rectangles, ellipses and triangles, which may hide each other. A box encloses the part of
its shape that can be seen. About a fifth of the images hold no shape: they are labelled, and empty. No paper reports
results on these images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark
from mtl.data.columns import Ragged, Split
from mtl.data.inputs import Image
from mtl.random import stream
from mtl.tasks import Detection, Segmentation
from mtl.views import Flip, ScaleCrop

CLASSES = ("rectangle", "ellipse", "triangle")
MOST = 4  # shapes in an image
SEEN = 0.3  # a shape of which less can be seen has no box
CHUNK = 32  # images that are drawn together


@dataclass
class Shapes(Benchmark):
    """Detection of three classes of shapes, and segmentation of these and the background.

    Args:
        train_size, test_size: number of images. A larger data set starts with the images of a smaller one.
        size: height and width of the images, in pixels.
    """

    batch_size: Annotated[int, Ge(1)] = 16
    train_size: Annotated[int, Ge(2)] = 1000
    test_size: Annotated[int, Ge(1)] = 200
    size: Annotated[int, Ge(16)] = 64

    tasks = (Detection("boxes", len(CLASSES), most=MOST), Segmentation("segmentation", 1 + len(CLASSES)))
    augment = (ScaleCrop((1.0, 1.2, 1.5)), Flip())

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.size, self.size), mean=(0.5,), std=(0.25,))}

    def load(self) -> dict[str, Split]:
        return {name: _sample(name, n, self.size) for name, n in (("train", self.train_size), ("test", self.test_size))}


def _sample(name: str, number: int, size: int) -> Split:
    images, maps, boxes = [], [], []
    for chunk, rows in enumerate(torch.arange(number).split(CHUNK)):
        # One stream for each full chunk, so that a larger data set starts with the smaller one.
        image, segmentation, objects = draw_shapes(CHUNK, size, stream(0, "boxes", name, chunk))
        images.append(image[: len(rows)])
        maps.append(segmentation[: len(rows)])
        boxes += [own[own[:, 4] >= 0] for own in objects[: len(rows)]]
    return Split({"image": torch.cat(images), "segmentation": torch.cat(maps), "boxes": Ragged.of(boxes)})


def draw_shapes(number: int, size: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random images with their labels.

    Returns:
        (N, H, W, 3) uint8 images; (N, H, W) int8, 0 for the background, then the classes from 1; (N, 4, 5) rows
        (x1, y1, x2, y2, class) with class −1 for none.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *shape, generator=draws)

    half = uniform(0.07, 0.25, MOST, 2)[..., None, None]  # of the sides x and y, as shares of the image
    centre = uniform(0.1, 0.9, MOST, 2)[..., None, None]
    kind = torch.randint(len(CLASSES), (number, MOST), generator=draws)
    there = torch.arange(MOST) < torch.randint(MOST + 1, (number, 1), generator=draws)
    place = (torch.arange(size) + 0.5) / size
    x, y = place[None, :], place[:, None]
    across, down = (x - centre[:, :, 0]) / half[:, :, 0], (y - centre[:, :, 1]) / half[:, :, 1]  # −1 to 1 inside
    inside = (across.abs() <= 1) & (down.abs() <= 1)
    kinds = kind[..., None, None]
    inside &= (kinds != 1) | (across**2 + down**2 <= 1)
    inside &= (kinds != 2) | (across.abs() <= (down + 1) / 2)  # its apex is at the top
    inside &= there[..., None, None]
    # A later shape hides the earlier ones.
    hidden = inside.flip(1).cumsum(1).flip(1) > inside
    seen = inside & ~hidden
    colours = torch.cat([uniform(0.0, 1.0, 1, 3), uniform(0.1, 1.0, MOST, 3)], 1)
    layer = ((torch.arange(MOST) + 1)[:, None, None] * seen).sum(1)  # (N, H, W) 0 for the background
    rows = torch.arange(number)[:, None, None]
    noise = 0.05 * torch.randn(number, size, size, 3, generator=draws)
    image = (255 * (colours[rows, layer] + noise)).round().clamp(0, 255).to(torch.uint8)
    classes = torch.cat([torch.zeros(number, 1, dtype=torch.int64), kind + 1], 1)
    objects = torch.cat([_enclosing(seen), kind[..., None]], 2).float()
    shown = seen.sum((2, 3)) >= SEEN * inside.sum((2, 3))
    objects[..., 4] = objects[..., 4].masked_fill(~(shown & seen.any(3).any(2)), -1)
    return image, classes[rows, layer].to(torch.int8), objects


def _enclosing(masks: Tensor) -> Tensor:
    """(…, 4) the box around the True pixels of masks (…, H, W), in pixel edges."""
    found = []
    for lines in (masks.any(-2), masks.any(-1)):  # columns for x, rows for y
        size = lines.shape[-1]
        found += [lines.long().argmax(-1), size - lines.flip(-1).long().argmax(-1)]
    return torch.stack([found[0], found[2], found[1], found[3]], -1)
