"""Inputs of a network: how a column of the data set is checked, and prepared on the device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mtl.views import Fixed, Moves, Picture


class Input(ABC):
    """A column that the network reads.

    Args:
        shape: of one sample as the network gets it, channels first.

    Attributes:
        moves: how the column follows a sample's view (crop, flip). A table's row, for example, stays as it is.
    """

    moves: ClassVar[Moves] = Fixed()

    def __init__(self, shape: Sequence[int]):
        if not (_is_sequence(shape) and len(shape) and all(isinstance(n, Integral) and n > 0 for n in shape)):
            raise ValueError(f"shape: {shape!r}; whole numbers from 1 are needed")
        self.shape = tuple(int(n) for n in shape)

    @abstractmethod
    def check(self, column: Tensor) -> None:
        """Check the dtype and shape of a column, before training.

        Raises:
            ValueError: the column has another dtype or shape than this input needs.
        """

    def ready(self, gathered: Tensor) -> Tensor:
        """Prepare rows (B, …) of the column, on the device, for the network: (B, *shape)."""
        return gathered

    def draw(self, rows: Tensor) -> Tensor | None:
        """Pictures (N, H, W, 3) uint8 of raw rows of the column; None if the column is no picture."""
        return None

    def open(self, path: Path) -> tuple[Tensor, str]:
        """One sample's row of the column from a file, and what had to be changed for that; empty for nothing.

        Raises:
            ValueError: this input is no picture, or the file holds none.
        """
        raise ValueError("the model reads no images; give its columns as an .npy or .npz file")

    def example(self, size: int, generator: torch.Generator) -> Tensor:
        """(size, *shape) random numbers, to try a network out before the data is loaded."""
        return torch.randn(size, *self.shape, generator=generator)


class Image(Input):
    """Images: a column (M, H, W, C) uint8. The network gets float32 (B, C, H, W), normalised: (x / 255 − mean) / std.

    Args:
        shape: (channels, height, width).
        mean, std: mean and standard deviation of each channel, for images scaled to [0, 1].

    Raises:
        ValueError: the message begins with the name of the argument.
    """

    moves = Picture()

    def __init__(self, shape: tuple[int, int, int], mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)):
        if not (_is_sequence(shape) and len(shape) == 3 and all(isinstance(n, Integral) and n > 0 for n in shape)):
            raise ValueError(f"shape: {shape!r}; three whole numbers are needed: (channels, height, width)")
        super().__init__(shape)
        self.mean, self.std = (_numbers(n, v, shape[0]) for n, v in (("mean", mean), ("std", std)))
        if min(self.std) <= 0:
            raise ValueError(f"std: {std!r}; images are divided by it, so it must be greater than 0")

    def check(self, column: Tensor) -> None:
        channels, height, width = self.shape
        shape, dtype = tuple(column.shape), str(column.dtype).removeprefix("torch.")
        hints = []
        if column.dtype != torch.uint8:
            hints.append(".mul(255).round().to(torch.uint8) converts floats in [0, 1]")
        if shape[1:] == (channels, height, width) != (height, width, channels):
            hints.append(".permute(0, 2, 3, 1) moves the channels to the end")
        if hints or shape[1:] != (height, width, channels):
            needed = f"uint8 images of shape (N, {height}, {width}, {channels}) are needed"
            raise ValueError(f"{dtype} of shape {shape}; {'; '.join([needed, *hints])}")

    def draw(self, rows: Tensor) -> Tensor:
        """The stored images. Where they have neither three nor four channels, the first one is shown in grey."""
        return rows[..., :3] if rows.shape[-1] in (3, 4) else rows[..., :1].expand(*rows.shape[:-1], 3)

    def open(self, path: Path) -> tuple[Tensor, str]:
        """(H, W, C) uint8 of an image file: turned upright, as grey, RGB or RGBA, and resized where it is larger or
        smaller."""
        from PIL import Image as Picture  # late: few runs read image files
        from PIL import ImageOps

        channels, height, width = self.shape
        if (mode := {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)) is None:
            raise ValueError(f"the model reads images of {channels} channels; give them as an .npy file")
        try:
            with Picture.open(path) as opened:
                picture = ImageOps.exif_transpose(opened)
                picture.load()
        except Picture.DecompressionBombError as error:
            raise ValueError("has too many pixels; make it smaller first") from error
        except Exception as error:  # every format of PIL has errors of its own for damaged files
            reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
            raise ValueError(f"is damaged, or no image{reason}") from error
        if picture.mode[0] in "IF":  # PIL would cut off what is above 255
            raise ValueError(f"has more than 8 bits a channel (mode {picture.mode}); convert it to 8 bits")
        size = picture.size
        picture = picture.convert(mode).resize((width, height), Picture.Resampling.BILINEAR)
        row = torch.from_numpy(np.array(picture)).view(height, width, channels)
        return row, "" if size == (width, height) else f"resized to {width}x{height}"

    def ready(self, gathered: Tensor) -> Tensor:
        """Normalise. The result is a view in channels_last order, in which convolutions are fast."""
        mean, std = _constants(self.mean, gathered.device), _constants(self.std, gathered.device)
        # float() makes one copy; the rest is in place. After bilinear augmentation the rows already are floats, so no
        # copy is made.
        return gathered.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def example(self, size: int, generator: torch.Generator) -> Tensor:
        return super().example(size, generator).contiguous(memory_format=torch.channels_last)


class Numbers(Input):
    """Numbers, such as a table's row or a time series: a column (M, *shape) of any float dtype. Passed on as float32.

    Args:
        shape: of one sample.
    """

    def check(self, column: Tensor) -> None:
        shape, dtype = tuple(column.shape), str(column.dtype).removeprefix("torch.")
        if not column.is_floating_point() or shape[1:] != self.shape:
            needed = f"floats of shape (N, {', '.join(map(str, self.shape))}) are needed"
            raise ValueError(f"{dtype} of shape {shape}; {needed}")

    def ready(self, gathered: Tensor) -> Tensor:
        return gathered.float()


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because a copy from the host in every step would make the host wait for a GPU.
    return torch.tensor(values, dtype=torch.float32, device=device)


def _numbers(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One finite number for each channel. A single number is used for all channels."""
    try:
        found = tuple(float(v) for v in ([values] if isinstance(values, Real) else values))
    except (TypeError, ValueError):
        found = ()
    found = found * channels if len(found) == 1 else found
    if len(found) != channels or not all(map(math.isfinite, found)):
        raise ValueError(f"{name}: {values!r}; one finite number for each of the {channels} channels is needed")
    return found


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
