"""Moves: how a column of a data set follows the views of its samples.

For example, a depth map is cropped and flipped with its image, and a class stays as it is. Every move gathers the
wanted pixels directly from the whole column, which may be memory-mapped and is never copied. The host never waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl.views.view import View


class Moves(ABC):
    """The base class: how the rows of one column follow the views of their samples.

    Attributes:
        dense: whether the column is a map, with a label for each pixel. The network then predicts a map, too.
    """

    dense: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        """Select rows of a column, and apply each sample's view to its row.

        Args:
            column: (M, …) all rows.
            rows: (B,) the rows to select, on the column's device; None for all, without a copy.
            view: the views of these B samples, on the column's device; None without augmentation.

        Returns:
            (B, …) the rows, as the views show them.

        Raises:
            ValueError: the column's shape does not suit this move.
        """

    def fits(self, shape: tuple[int, ...], picture: tuple[int, int]) -> str:
        """Check that a row of this shape can follow the views of a picture (height, width).

        Returns:
            what is wrong, for a message; an empty string if nothing is.
        """
        return "" if shape[:2] == picture else f"a map of {picture[0]}x{picture[1]} pixels, as the image has, is needed"


@dataclass(frozen=True)
class Fixed(Moves):
    """A label of the whole sample, such as a class. It is the same in every view."""

    dense: ClassVar[bool] = False

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        return column if rows is None else column[rows]

    def fits(self, shape: tuple[int, ...], picture: tuple[int, int]) -> str:
        # A label shaped like the picture is probably a map, and it would stay uncropped beside a cropped image.
        if shape[:2] != picture:
            return ""
        return "a map of the image, which this task would not crop and flip with it; set its moves, as in mtl.views"


@dataclass(frozen=True)
class Picture(Moves):
    """Images (M, H, W, C). Pixels beyond the image are black.

    If a view scales the image, pixels are interpolated and become floats. A crop or flip alone keeps uint8.
    """

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W, C)", column.dim() == 4)
        return see(column, rows, view, 0) if view is None or view.whole else blend(column, rows, view, 0)


@dataclass(frozen=True)
class Pixels(Moves):
    """Maps of classes (M, H, W), of any integer type: the nearest pixel's class, as int64.

    Attributes:
        fill: class beyond the image; −100 counts as no label.
    """

    fill: int = -100

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W)", column.dim() == 3)
        return see(column, rows, view, self.fill, torch.int64)  # in uint8, −100 would be 156


@dataclass(frozen=True)
class Metres(Moves):
    """Depth maps (M, H, W), at least float32: the nearest pixel's depth.

    A picture that is shown s times larger looks s times nearer, so depths are divided by s.

    Attributes:
        fill: depth beyond the image; NaN counts as no label.
        inverse: whether the map is disparity, which grows where things come nearer. It is multiplied by s.
    """

    fill: float = nan
    inverse: bool = False

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W)", column.dim() == 3)
        depth = see(column, rows, view, self.fill, _floating(column))
        if view is None or view.whole:
            return depth
        # `a` is 1/s along both axes; its sign only says whether the picture is mirrored.
        nearer = view.a.abs().mean(1)[:, None, None]
        return depth / nearer if self.inverse else depth * nearer


@dataclass(frozen=True)
class Directions(Moves):
    """Unit normals (M, H, W, 3), at least float32: x along the columns, y along the rows, z.

    A horizontal flip changes the sign of x, a vertical flip the sign of y. Scaling does not change normals, as in MTAN.
    The nearest pixel's normal is taken, not a mean: at an edge, the mean of two surfaces' normals belongs to neither.
    So lengths stay 1, and a pixel without a label (zeros or NaN) stays without one.

    Attributes:
        fill: components of a normal beyond the image; NaN counts as no label.
    """

    fill: float = nan

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W, 3)", column.dim() == 4 and column.shape[3] == 3)
        normals = see(column, rows, view, self.fill, _floating(column))
        if view is not None:
            normals[..., :2] *= view.a.sign().flip(1)[:, None, None]  # a is of (rows, columns), a normal of (x, y)
        return normals


@dataclass(frozen=True)
class Boxes(Moves):
    """Boxes of objects, a ragged column with rows (x1, y1, x2, y2, class), in pixels from the picture's corner.

    A box is clipped at the picture's edge. Where less than a pixel of its width or height is left, its class becomes
    −1, which counts as no box. The row itself stays, so that the host need not wait to learn how many are left.
    """

    dense: ClassVar[bool] = False

    def __call__(self, column: Any, rows: Tensor | None, view: View | None) -> Any:
        column = column if rows is None else column[rows]
        if view is None:
            return column
        if view.picture is None:
            raise ValueError("boxes are clipped at the picture's edge, and this view has no size; set View.picture")
        values, owner = column.values, column.owner()
        # A view maps (row, column) of the result to the source; boxes are (x, y), and go the other way.
        a, b = (numbers.flip(1)[owner].repeat(1, 2).to(values.dtype) for numbers in (view.a, view.b))
        moved = (values[:, :4] - b) / a
        first, second = moved[:, :2], moved[:, 2:]  # a mirrored box has its corners exchanged
        height, width = view.picture
        low, high = torch.minimum(first, second).clamp(min=0), torch.maximum(first, second)
        high = torch.stack([high[:, 0].clamp(max=width), high[:, 1].clamp(max=height)], 1)
        gone = ((high - low) < 1).any(1)
        return column.with_values(torch.cat([low, high, values[:, 4:].masked_fill(gone[:, None], -1)], 1))

    def fits(self, shape: tuple[int, ...], picture: tuple[int, int]) -> str:
        return "" if shape == (5,) else "boxes have the rows (x1, y1, x2, y2, class)"


def see(
    column: Tensor, rows: Tensor | None, view: View | None, fill: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The pixels that each view shows. A pixel of the result is the source pixel that contains its centre.

    Args:
        column: (M, H, W, …).
        rows: (B,) the samples' rows of the column; None for all.
        view: the views of these B samples; None for the whole pictures.
        fill: value of a pixel whose centre lies beyond the picture.
        dtype: dtype of the result; None for the column's own.

    Returns:
        (B, H, W, …); the column itself if nothing is selected or moved.
    """
    if view is None:
        return (column if rows is None else column[rows]).to(dtype).contiguous()
    (down, above), (across, beside) = (_nearest(*axis) for axis in _centres(column, view))
    return _fill(_gather(column, rows, down, across).to(dtype), above, beside, fill)


def blend(column: Tensor, rows: Tensor | None, view: View, fill: float) -> Tensor:
    """Like `see`, but with bilinear interpolation between the four nearest pixels; at least float32.

    At a crop's edge, the neighbours are the picture's own pixels. At the picture's edge, the edge pixel is repeated.
    """
    vertical, horizontal = _centres(column, view)
    # Interpolate along each line first, then between the two lines. Only the needed pixels are converted to floats.
    (top, bottom, lower), (left, right, further) = _around(*vertical), _around(*horizontal)
    dtype = _floating(column)
    lower, further = lower[:, :, None, None].to(dtype), further[:, None, :, None].to(dtype)
    lines = [
        torch.lerp(_gather(column, rows, line, left).to(dtype), _gather(column, rows, line, right).to(dtype), further)
        for line in (top, bottom)
    ]
    _, above = _nearest(*vertical)
    _, beside = _nearest(*horizontal)
    return _fill(torch.lerp(*lines, lower), above, beside, fill)


def _centres(column: Tensor, view: View) -> list[tuple[Tensor, int]]:
    """The source positions of the shown pixels' centres, (B, n), with the number n: first for rows, then for columns.

    Without scaling, positions are 0.5, 1.5, …. float32 holds these exactly up to 2²² pixels.
    """
    a, b = view.a[:, :, None], view.b[:, :, None]
    middles = [torch.arange(0.5, n, dtype=a.dtype, device=a.device) for n in column.shape[1:3]]
    return [(a[:, axis] * middle + b[:, axis], len(middle)) for axis, middle in enumerate(middles)]


def _nearest(centres: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The numbers (B, n) of the pixels that contain the centres, and whether they lie outside the picture.

    A pixel outside is replaced by the nearest edge pixel, so that the gather below stays in range.
    """
    pixels = centres.floor().long()
    inside = pixels.clamp(0, n - 1)
    return inside, inside != pixels


def _around(centres: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels (B, n) around each centre, moved to the edge if outside, and the weight of the second one."""
    position = centres - 0.5
    first = position.floor()
    return first.long().clamp(0, n - 1), (first.long() + 1).clamp(0, n - 1), position - first


def _gather(column: Tensor, rows: Tensor | None, down: Tensor, across: Tensor) -> Tensor:
    """(B, H, W, …) the pixels of the given rows, at line `down` (B, H) and position `across` (B, W)."""
    if rows is None:
        rows = torch.arange(len(column), device=column.device)
    if not column.is_contiguous():  # the fast way below needs one long list of pixels
        return column[rows[:, None, None], down[:, :, None], across[:, None, :]].contiguous()
    height, width = column.shape[1:3]
    pixels = (rows[:, None] * height + down)[:, :, None] * width + across[:, None, :]
    seen = column.view(-1, *column.shape[3:]).index_select(0, pixels.view(-1))  # twice as fast as indexing
    return seen.view(*pixels.shape, *column.shape[3:])


def _fill(seen: Tensor, above: Tensor, beside: Tensor, fill: float) -> Tensor:
    outside = above[:, :, None] | beside[:, None, :]
    return seen.masked_fill_(outside.view(*outside.shape, *[1] * (seen.dim() - 3)), fill)


def _floating(column: Tensor) -> torch.dtype:
    return torch.promote_types(column.dtype, torch.float32)


def _check(column: Tensor, wanted: str, right: bool) -> None:
    if not right:
        raise ValueError(f"a column of the shape {tuple(column.shape)}; {wanted} is needed")
