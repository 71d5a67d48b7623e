"""Views: which part of its picture each sample shows, drawn on the CPU once an epoch.

A view is an axis-aligned map, so crop, flip and scale are four numbers a sample. Two views compose into one. Thus any
chain of augmentations costs one gather, and images, label maps, depth and normals all follow the same four numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Streams = Callable[[str], torch.Generator]  # the generator on the CPU of a named choice, in this epoch


@dataclass(frozen=True)
class View:
    """Where each of N samples looks: `source = a · output + b` along each axis, in pixels, counted from the edge.

    Pixel j reaches from j to j + 1, so its centre is j + 0.5. Example: the mirror image of W columns has a = −1, b = W.
    A view has no border of its own. What lies outside of the whole picture is filled, whatever views were composed.

    Attributes:
        a: (N, 2) float32, for rows and columns; negative where the picture is mirrored, 1/s where it is shown s times
            larger.
        b: (N, 2) float32.
        whole: every a is 1 or −1 and every b a whole number, so each pixel shown is one pixel of the source. The host
            knows it without a look at the numbers.
    """

    a: Tensor
    b: Tensor
    whole: bool = False

    @staticmethod
    def identity(size: int) -> View:
        """The whole picture, as it is, for `size` samples."""
        return View(torch.ones(size, 2), torch.zeros(size, 2), whole=True)

    def then(self, later: View) -> View:
        """This view of the source, and `later` as a view of what this one shows."""
        return View(self.a * later.a, self.a * later.b + self.b, self.whole and later.whole)

    def take(self, index: Tensor | slice) -> View:
        """The views of the samples at `index`."""
        return replace(self, a=self.a[index], b=self.b[index])

    def to(self, device: torch.device) -> View:
        """The same view on `device`; the host does not wait for the copy."""
        return replace(self, a=self.a.to(device, non_blocking=True), b=self.b.to(device, non_blocking=True))


class Augment(ABC):
    """A random choice of views; a chain of them applies the first one first."""

    @abstractmethod
    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        """One view for each of `size` samples.

        Args:
            size: number of samples N.
            shape: (height, width) of the pictures.
            stream: gives the generator of a named choice; the same name gives the same draws.
        """


@dataclass(frozen=True)
class Crop(Augment):
    """RandomCrop of the picture's own size, from a picture with `padding` black pixels on all four sides.

    Raises:
        ValueError: padding is negative or no whole number.
    """

    padding: int

    def __post_init__(self):
        if not isinstance(self.padding, int) or self.padding < 0:
            raise ValueError(f"padding: {self.padding!r}; a whole number of pixels is needed, 0 for no crop")

    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        corners = torch.randint(0, 2 * self.padding + 1, (2, size), generator=stream("crop"))
        return View(torch.ones(size, 2), (corners.T - self.padding).float(), whole=True)


@dataclass(frozen=True)
class Flip(Augment):
    """RandomHorizontalFlip: left and right are exchanged with probability 1/2."""

    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        flip = torch.rand(size, generator=stream("flip")) < 0.5
        a, b = torch.ones(size, 2), torch.zeros(size, 2)
        a[flip, 1], b[flip, 1] = -1, shape[1]
        return View(a, b, whole=True)


@dataclass(frozen=True)
class ScaleCrop(Augment):
    """MTAN's RandomScaleCrop: a crop of (height/s, width/s), for one of the scales s, is shown at full size.

    The crop's corner is a pixel's corner, and no crop reaches outside of the picture. MTAN rounds height/s and width/s
    down; here they may be fractions, so that the picture grows by the same s along both axes.

    Attributes:
        scales: the scales, each as likely as the others.

    Raises:
        ValueError: there is no scale, or one is less than 1.
    """

    scales: tuple[float, ...] = (1.0, 1.2, 1.5)

    def __post_init__(self):
        if not self.scales or not all(1 <= scale < float("inf") for scale in self.scales):
            raise ValueError(f"scales: {self.scales!r}; at least one is needed, and each must be a number from 1")

    def draw(self, size: int, shape: tuple[int, int], stream: Streams) -> View:
        # float64: 288 · (1 − 1/1.2) is 48, and in float32 it might be a little less.
        scales = torch.tensor(self.scales, dtype=torch.float64)
        scales = scales[torch.randint(0, len(scales), (size,), generator=stream("scale"))][:, None]
        room = (torch.tensor(shape) * (1 - 1 / scales) + 1e-6).floor()  # (N, 2) the last corner that is possible
        corners = torch.rand(size, 2, dtype=torch.float64, generator=stream("scale_corner")) * (room + 1)
        return View((1 / scales).float().expand(size, 2).contiguous(), corners.floor().float())
