"""Inputs of a network: how a column of the data set is checked, and prepared on the device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtl.data.columns import Column, Ragged
from mtl.views import Fixed, Moves, Picture

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of each channel, as `Image` takes them


class Input(ABC):
    """A column that the network reads.

    Args:
        shape: of one sample as the network gets it, channels first.

    Attributes:
        moves: how the column follows a sample's view (crop, flip). A table's row, for example, stays as it is.
        column: the kind of column: a tensor, or `Ragged`.
    """

    moves: ClassVar[Moves] = Fixed()
    column: ClassVar[type] = Tensor

    def __init__(self, shape: Sequence[int]):
        if not (_is_sequence(shape) and len(shape) and all(isinstance(n, Integral) and n > 0 for n in shape)):
            raise ValueError(f"shape: {shape!r}; whole numbers from 1 are needed")
        self.shape = tuple(int(n) for n in shape)

    @abstractmethod
    def check(self, column: Any) -> None:
        """Check the dtype and shape of a column, before training.

        Raises:
            ValueError: the column has another dtype or shape than this input needs.
        """

    def ready(self, gathered: Any) -> Any:
        """Prepare rows (B, …) of the column, on the device, for the network: (B, *shape)."""
        return gathered

    def read(self, value: Any) -> Column:
        """The column in the samples that a user gives to a trained model: tensors, or what becomes one.

        Raises:
            TypeError, ValueError, RuntimeError: it can be no column.
        """
        return torch.as_tensor(value)

    def draw(self, rows: Tensor) -> Tensor | None:
        """Pictures (N, H, W, 3) uint8 of raw rows of the column; None if the column is no picture."""
        return None

    def open(self, path: Path) -> tuple[Tensor, str]:
        """One sample's row of the column from a file, and what had to be changed for that; empty for nothing.

        Raises:
            ValueError: this input is no picture, or the file holds none.
        """
        raise ValueError("the model reads no images; give its columns as an .npy or .npz file")

    def row(self, array: Tensor) -> Tensor | None:
        """One sample's row of the column from an array of that sample alone; None if it holds a row for each sample.

        Raises:
            ValueError: it is neither.
        """
        return None

    def example(self, size: int, generator: torch.Generator) -> Column:
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

    def row(self, array: Tensor) -> Tensor | None:
        """(H, W, C) uint8 of one image (H, W, C), of uint8 or of floats from 0 to 1. It is never resized."""
        channels, height, width = self.shape
        if array.ndim > 3:
            return None
        if array.shape != (height, width, channels) or array.is_complex():
            found = f"{str(array.dtype).removeprefix('torch.')} of shape {tuple(array.shape)}"
            needed = f"an image ({height}, {width}, {channels}) of floats from 0 to 1 or of uint8"
            raise ValueError(f"{found}; {needed} is needed, or several as uint8 (N, {height}, {width}, {channels})")
        return torch.from_numpy(eight_bits(array.numpy()))

    def ready(self, gathered: Tensor) -> Tensor:
        """Normalise. The result is a view in channels_last order, in which convolutions are fast."""
        mean, std = _constants(self.mean, gathered.device), _constants(self.std, gathered.device)
        # float() makes one copy; the rest is in place. After bilinear augmentation the rows already are floats, so no
        # copy is made.
        return gathered.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def example(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(size, *self.shape, generator=generator).contiguous(memory_format=torch.channels_last)


class Numbers(Input):
    """Numbers, such as a table's row or a time series: a column (M, *shape) of any float dtype. Passed on as float32.

    Args:
        shape: of one sample.
        mean, std: of each number along the last axis, or one for all; the network gets (x − mean) / std. By default it
            gets x.

    Raises:
        ValueError: the message begins with the name of the argument.
    """

    def __init__(self, shape: Sequence[int], mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)):
        super().__init__(shape)
        self.mean, self.std = (_numbers(n, v, self.shape[-1], "numbers") for n, v in (("mean", mean), ("std", std)))
        if min(self.std) <= 0:
            raise ValueError(f"std: {std!r:.80}; numbers are divided by it, so it must be greater than 0")
        self.scaled = any(self.mean) or any(value != 1 for value in self.std)

    def check(self, column: Tensor) -> None:
        shape, dtype = tuple(column.shape), str(column.dtype).removeprefix("torch.")
        if not column.is_floating_point() or shape[1:] != self.shape:
            needed = f"floats of shape (N, {', '.join(map(str, self.shape))}) are needed"
            raise ValueError(f"{dtype} of shape {shape}; {needed}")

    def ready(self, gathered: Tensor) -> Tensor:
        if not self.scaled:
            return gathered.float()
        mean, std = _constants(self.mean, gathered.device), _constants(self.std, gathered.device)
        return ((gathered - mean) / std).float()


class Tokens(Input):
    """Text as numbers of tokens: a column (M, length) of integers from 0 to vocabulary − 1. Passed on as int64.

    Args:
        length: tokens of a sample; shorter texts are padded.
        vocabulary: number of different tokens.

    Raises:
        ValueError: the message begins with the name of the argument.
    """

    def __init__(self, length: int, vocabulary: int):
        super().__init__((length,))
        if not isinstance(vocabulary, Integral) or vocabulary < 1:
            raise ValueError(f"vocabulary: {vocabulary!r}; a whole number from 1 is needed")
        self.vocabulary = int(vocabulary)

    def check(self, column: Tensor) -> None:
        shape, dtype = tuple(column.shape), str(column.dtype).removeprefix("torch.")
        if column.is_floating_point() or shape[1:] != self.shape:
            raise ValueError(f"{dtype} of shape {shape}; integers of shape (N, {self.shape[0]}) are needed")
        if len(column) and not (column.min() >= 0 and column.max() < self.vocabulary):
            found = f"{column.min().item()} to {column.max().item()}"
            raise ValueError(f"tokens from {found}; 0 to {self.vocabulary - 1} are allowed")

    def ready(self, gathered: Tensor) -> Tensor:
        return gathered.long()

    def example(self, size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.vocabulary, (size, *self.shape), generator=generator)


class Rows(Input):
    """Rows of numbers, differently many for each sample, such as a molecule's atoms: a `Ragged` column.

    Example: `Rows((3,))` for positions in space, `Rows(below=10)` for atomic numbers, `Rows((2,), below=30)` for bonds.

    Args:
        shape: of one row; () for a single number.
        below: None for floats, which are passed on as float32. Else the rows hold integers from 0 to below − 1, which
            are passed on as int64.
    """

    column = Ragged

    def __init__(self, shape: Sequence[int] = (), below: int | None = None):
        super().__init__(shape if shape != () else (1,))
        if below is not None and not (isinstance(below, Integral) and below > 0):
            raise ValueError(f"below: {below!r}; a whole number from 1, or None for floats, is needed")
        self.row, self.below = tuple(shape), below

    def check(self, column: Ragged) -> None:
        check_ragged(column)
        values, lengths = column.values, column.lengths
        shape, dtype = tuple(values.shape[1:]), str(values.dtype).removeprefix("torch.")
        kind = "floats" if self.below is None else "integers"
        integers = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        if shape != self.row or not (values.is_floating_point() if self.below is None else integers):
            needed = f"{kind} of shape {('M', *self.row)}".replace("'", "")
            raise ValueError(f"values are {dtype} of shape {tuple(values.shape)}; {needed} are needed")
        if len(lengths) and int(lengths.min()) < 0:
            where = int(lengths.argmin())
            raise ValueError(f"sample {where} has the length {int(lengths[where])}; an input has 0 rows or more")
        if self.below is None and not values.isfinite().all():
            wrong = int((~values.reshape(len(values), -1).isfinite().all(1)).nonzero()[0])
            sample = int((lengths.cumsum(0) <= wrong).sum())
            raise ValueError(f"sample {sample} has the row {values[wrong].tolist()}; finite numbers are needed")
        if self.below is not None and len(values):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.below:
                wrong = low if low < 0 else high
                raise ValueError(f"a row holds {wrong}; integers from 0 to {self.below - 1} are needed")

    def ready(self, gathered: Ragged) -> Ragged:
        values = gathered.values
        return gathered.with_values(values.float() if self.below is None else values.long())

    def read(self, value: Any) -> Ragged:
        """A `Ragged` as it is, or made of a list with the rows (L, …) of each sample."""
        if isinstance(value, Ragged):
            return value
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"a {type(value).__name__}; a Ragged, or a list with the rows of each sample, is needed")
        return Ragged.of([torch.as_tensor(one) for one in value])

    def example(self, size: int, generator: torch.Generator) -> Ragged:
        """Samples of 3, 2, 4, 3, 2, 4, … rows: the same for every ragged input, so that numbers fit positions."""
        lengths = torch.tensor([3, 2, 4]).repeat(size // 3 + 1)[:size]
        many = int(lengths.sum()), *self.row
        if self.below is None:
            return Ragged(torch.randn(many, generator=generator), lengths)
        # 0 and 1 only: integers may be the numbers of another column's rows (a bond's atoms), and every sample has two.
        return Ragged(torch.randint(min(2, self.below), many, generator=generator), lengths)


def eight_bits(array: np.ndarray) -> np.ndarray:
    """An image of numbers from 0 to 1, or of uint8, as uint8. Those made from 8-bit images come back exactly.

    Raises:
        ValueError: it holds other numbers.
    """
    if array.dtype == np.uint8:
        return array
    if not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):  # not so of NaN
        raise ValueError(f"an image of {array.min():.4g} to {array.max():.4g}; numbers from 0 to 1 are needed")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def check_ragged(column: Ragged) -> None:
    """Check that the lengths of a ragged column fit its values.

    Raises:
        ValueError: they do not, or have another dtype or shape than they need.
    """
    values, lengths = column.values, column.lengths
    if not (isinstance(values, Tensor) and isinstance(lengths, Tensor)):
        raise ValueError("values and lengths of a Ragged must be tensors (torch.from_numpy makes a tensor of an array)")
    if lengths.dtype != torch.int64 or lengths.ndim != 1:
        raise ValueError(f"lengths are {lengths.dtype} of shape {tuple(lengths.shape)}; int64 of shape (N,) is needed")
    if values.ndim == 0:
        raise ValueError("values are a single number; a tensor (M, …) is needed")
    if len(lengths) and int(lengths.min()) < -1:
        raise ValueError(f"a sample has the length {int(lengths.min())}; −1 (not labelled), or 0 and more, is needed")
    if (total := int(lengths.clamp(min=0).sum())) != len(values):
        raise ValueError(f"the lengths add up to {total}, but there are {len(values)} rows of values")


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because a copy from the host in every step would make the host wait for a GPU.
    return torch.tensor(values, dtype=torch.float32, device=device)


def _numbers(name: str, values: Sequence[float], channels: int, what: str = "channels") -> tuple[float, ...]:
    """One finite number for each channel. A single number is used for all channels."""
    try:
        found = tuple(float(v) for v in ([values] if isinstance(values, Real) else values))
    except (TypeError, ValueError):
        found = ()
    found = found * channels if len(found) == 1 else found
    if len(found) != channels or not all(map(math.isfinite, found)):
        raise ValueError(f"{name}: {values!r}; one finite number for each of the {channels} {what} is needed")
    return found


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
