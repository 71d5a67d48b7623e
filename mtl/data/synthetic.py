"""Procedural 32x32 images with 100 fine classes in 20 groups, for speed tests and smoke runs without a download.

Every group has a smooth random pattern. Every class adds a weaker pattern of its own. Every image scales the sum and
adds noise. This is easy to learn: it shows that a run works and how fast it is, but not which method is better.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from mtl.data import Benchmark, Crop, Image, Split
from mtl.random import stream
from mtl.tasks import Classification


@dataclass
class Synthetic(Benchmark):
    """Fine and coarse classification of procedural images.

    Args:
        train_size, test_size: number of images. A larger data set starts with the images of a smaller one.
    """

    train_size: Annotated[int, Ge(2)] = 5000
    test_size: Annotated[int, Ge(1)] = 1000

    tasks = (Classification("fine", 100), Classification("coarse", 20))
    inputs = {"image": Image((3, 32, 32), mean=(0.5,), std=(0.25,))}
    augment = (Crop(padding=4),)

    def load(self) -> dict[str, Split]:
        patterns = stream(0, "synthetic", "patterns")
        groups, classes = _smooth(20, patterns), _smooth(100, patterns)
        prototypes = groups.repeat_interleave(5, 0) + 0.7 * classes
        sizes = {"train": self.train_size, "test": self.test_size}
        return {name: _sample(prototypes, size, name) for name, size in sizes.items()}


def _smooth(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 32, 32) smooth random images: 4x4 random numbers per channel, interpolated."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size=32, mode="bicubic", align_corners=False)


def _sample(prototypes: Tensor, size: int, name: str) -> Split:
    images = torch.empty(size, 32, 32, 3, dtype=torch.uint8)
    fine = torch.empty(size, dtype=torch.int64)
    for number, chunk in enumerate(torch.arange(size).split(4096)):
        # One stream for each full chunk, so that a larger data set starts with the smaller one.
        generator, full = stream(0, "synthetic", name, number), 4096
        labels = torch.randint(0, 100, (full,), generator=generator)[: len(chunk)]
        gain = (0.6 + 0.8 * torch.rand(full, 1, 1, 1, generator=generator))[: len(chunk)]
        noise = torch.randn(len(chunk), 3, 32, 32, generator=generator)
        x = 0.5 + 0.18 * (gain * prototypes[labels] + 0.8 * noise)
        images[chunk] = x.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        fine[chunk] = labels
    return Split({"image": images, "fine": fine, "coarse": fine // 5})
