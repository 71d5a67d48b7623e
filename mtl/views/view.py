"""Views: the part of its picture that each sample shows. They are drawn on the CPU, once per epoch.

A view is an axis-aligned map: two numbers per axis describe crop, flip and scale. Two views can be composed into one.
So a chain of augmentations costs one gather, and images, label maps, depth and normals follow the same four numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Streams = Callable[[str], torch.Generator]  # gives the epoch's CPU generator for a name such as "crop"


@dataclass(frozen=True)
class View:
    """The views of N samples. A position in the result shows the source position `a · position + b`, along each axis.

    Positions are in pixels from the edge: pixel j reaches from j to j + 1, and its centre is j + 0.5. Example: a = −1
    and b = W mirror W columns. If views are composed, only positions beyond the whole picture are filled, and not
    positions beyond an earlier crop.

    Attributes:
        a: (N, 2) float32, for rows and columns: negative if the picture is mirrored, 1/s if it is shown s times larger.
        b: (N, 2) float32.
        whole: whether every a is 1 or −1 and every b is a whole number, so that no pixel is interpolated. It is stored,
            so that the host need not read the numbers from the device.
        picture: (height, width) of the pictures, in pixels; None if nobody has noted it.
    """

    a: Tensor
    b: Tensor
    whole: bool = False
    picture: tuple[int, int] | None = None

    @staticmethod
    def identity(size: int) -> View:
        """The view of the unchanged picture, for `size` samples."""
        return View(torch.ones(size, 2), torch.zeros(size, 2), whole=True)

    def then(self, later: View) -> View:
        """The composition: first this view, then `later` as a view of its result."""
        # Substitute: position ↦ a · (later.a · position + later.b) + b.
        return View(self.a * later.a, self.a * later.b + self.b, self.whole and later.whole, self.picture)

    def take(self, index: Tensor | slice) -> View:
        """The views of the samples at `index`."""
        return replace(self, a=self.a[index], b=self.b[index])

    def to(self, device: torch.device) -> View:
        """The same views on `device`. The host does not wait for the copy."""
        return replace(self, a=self.a.to(device, non_blocking=True), b=self.b.to(device, non_blocking=True))


class Augment(ABC):
    """The base class of augmentations: draws a random view for each sample."""

    @abstractmethod
    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        """One view for each of `size` samples.

        Args:
            size: number of samples N.
            shape: (height, width) of the pictures.
            stream: stream(name) is the generator for a name. Use a name of its own for each kind of draw, such as
                "crop": the same name gives the same numbers.
        """


@dataclass(frozen=True)
class Crop(Augment):
    """RandomCrop: adds `padding` black pixels on all four sides, and crops the original size at a random place.

    Raises:
        ValueError: padding is negative or not a whole number.
    """

    padding: int

    def __post_init__(self):
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"padding: {self.padding!r}; a whole number of pixels is needed, 0 for no crop")

    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        # A crop of the padded picture at (i, j) begins at (i − padding, j − padding) in the picture itself.
        corners = torch.randint(0, 2 * self.padding + 1, (2, size), generator=stream("crop"))
        return View(torch.ones(size, 2), (corners.T - self.padding).float(), whole=True)


@dataclass(frozen=True)
class Flip(Augment):
    """RandomHorizontalFlip: exchanges left and right with probability 1/2."""

    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        flip = torch.rand(size, generator=stream("flip")) < 0.5
        a, b = torch.ones(size, 2), torch.zeros(size, 2)
        a[flip, 1], b[flip, 1] = -1, shape[1]  # position x shows W − x
        return View(a, b, whole=True)


@dataclass(frozen=True)
class ScaleCrop(Augment):
    """MTAN's RandomScaleCrop: draws a scale s, crops (height/s, width/s), and enlarges the crop to full size.

    The crop begins at a pixel's corner and lies inside the picture. MTAN rounds height/s and width/s down. Here they
    may be fractions, so that the picture is enlarged by exactly s along both axes.

    Attributes:
        scales: the scales, drawn with equal probability.

    Raises:
        ValueError: there is no scale, or one is less than 1.
    """

    scales: tuple[float, ...] = (1.0, 1.2, 1.5)

    def __post_init__(self):
        if not self.scales or not all(1 <= scale < float("inf") for scale in self.scales):
            raise ValueError(f"scales: {self.scales!r}; at least one is needed, and each must be a number from 1")

    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        # In float64, because of the floor below: 288 · (1 − 1/1.2) is 48, but in float32 it might be 47.9999.
        scales = torch.tensor(self.scales, dtype=torch.float64)
        scales = scales[torch.randint(0, len(scales), (size,), generator=stream("scale"))][:, None]
        room = (torch.tensor(shape) * (1 - 1 / scales) + 1e-6).floor()  # (N, 2) the largest possible corner
        corners = torch.rand(size, 2, dtype=torch.float64, generator=stream("scale_corner")) * (room + 1)
        return View((1 / scales).float().expand(size, 2).contiguous(), corners.floor().float())
