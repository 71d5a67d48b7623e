"""Moves: how a column of a data set follows the views of its samples.

All of them gather straight from the whole column, which may be memory-mapped and is never copied. No host waits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from mtl.views.view import View


class Moves(ABC):
    """How the rows of one column follow the views of their samples."""

    @abstractmethod
    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        """The rows of a column as their samples see them.

        Args:
            column: (M, …) all rows.
            rows: (B,) the rows wanted, on the column's device; None for all, without a copy.
            view: of these B samples, on the column's device; None where nothing is augmented.

        Returns:
            (B, …).

        Raises:
            ValueError: the column's shape is none that moves like this.
        """

    def fits(self, shape: tuple[int, ...], picture: tuple[int, int]) -> str:
        """Why a sample's row of this shape cannot follow the views of a picture (height, width); empty if it can."""
        return "" if shape[:2] == picture else f"a map of {picture[0]}x{picture[1]} pixels, as the image has, is needed"


@dataclass(frozen=True)
class Fixed(Moves):
    """A class or a number of the whole sample: every view of it has the same one."""

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        return column if rows is None else column[rows]

    def fits(self, shape: tuple[int, ...], picture: tuple[int, int]) -> str:
        if shape[:2] != picture:
            return ""
        return "a map of the image, which this task would not crop and flip with it; set its moves, as in mtl.views"


@dataclass(frozen=True)
class Picture(Moves):
    """Images (M, H, W, C): black outside; bilinear, and then floating, where a view is not whole (see `View`)."""

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W, C)", column.dim() == 4)
        return see(column, rows, view, 0) if view is None or view.whole else blend(column, rows, view, 0)


@dataclass(frozen=True)
class Pixels(Moves):
    """Label maps (M, H, W) of any integer type: the nearest pixel's class, as int64; `fill` outside."""

    fill: int = -100

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W)", column.dim() == 3)
        return see(column, rows, view, self.fill, torch.int64)  # −100 as uint8 would be class 156


@dataclass(frozen=True)
class Metres(Moves):
    """Depth maps (M, H, W), float32 at least: the nearest pixel's depth; `fill` outside.

    A picture shown s times larger is s times nearer, so depths are divided by s.

    Attributes:
        inverse: the map is disparity, which grows where things come nearer; it is multiplied by s.
    """

    fill: float = nan
    inverse: bool = False

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W)", column.dim() == 3)
        depth = see(column, rows, view, self.fill, _floating(column))
        if view is None or view.whole:
            return depth
        nearer = view.a.abs().mean(1)[:, None, None]  # 1/s
        return depth / nearer if self.inverse else depth * nearer


@dataclass(frozen=True)
class Directions(Moves):
    """Unit normals (M, H, W, 3), float32 at least, as (x along the columns, y along the rows, z); `fill` outside.

    x changes its sign where left and right are exchanged, y where top and bottom are. A pixel shows its nearest normal,
    not a mean: at an edge between two surfaces, the mean belongs to neither. So lengths stay 1, and a pixel without a
    label (zeros or NaN) stays without one. Scaling leaves normals as they are, as in MTAN.
    """

    fill: float = nan

    def __call__(self, column: Tensor, rows: Tensor | None, view: View | None) -> Tensor:
        _check(column, "(M, H, W, 3)", column.dim() == 4 and column.shape[3] == 3)
        normals = see(column, rows, view, self.fill, _floating(column))
        if view is not None:
            normals[..., :2] *= view.a.sign().flip(1)[:, None, None]  # a is of (rows, columns), a normal of (x, y)
        return normals


def see(
    column: Tensor, rows: Tensor | None, view: View | None, fill: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The pixels that each view shows: of each pixel's centre, the nearest pixel of the source.

    Args:
        column: (M, H, W, …).
        rows: (B,) the samples' rows of the column; None for all.
        view: of these B samples; None for the whole pictures.
        fill: of a pixel whose centre lies outside of the picture.
        dtype: of the result; None for the column's own.

    Returns:
        (B, H, W, …); the column itself where nothing is selected or moved.
    """
    if view is None:
        return (column if rows is None else column[rows]).to(dtype).contiguous()
    (down, above), (across, beside) = (_nearest(*axis) for axis in _centres(column, view))
    return _fill(_gather(column, rows, down, across).to(dtype), above, beside, fill)


def blend(column: Tensor, rows: Tensor | None, view: View, fill: float) -> Tensor:
    """As `see`, of images (M, H, W, C), but bilinear between the four nearest pixels, and float32 at least.

    The neighbours beyond a crop's edge are the picture's own pixels; beyond the picture's edge, its edge goes on.
    """
    vertical, horizontal = _centres(column, view)
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
    """For rows and for columns: (B, n) where the centres of the pixels shown lie in the source, and n.

    A whole view gives halves, which float32 holds exactly up to 2²² pixels.
    """
    a, b = view.a[:, :, None], view.b[:, :, None]
    middles = [torch.arange(0.5, n, dtype=a.dtype, device=a.device) for n in column.shape[1:3]]
    return [(a[:, axis] * middle + b[:, axis], len(middle)) for axis, middle in enumerate(middles)]


def _nearest(centres: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The pixels (B, n) that hold the centres, moved to the edge if outside, and whether they were outside."""
    pixels = centres.floor().long()
    inside = pixels.clamp(0, n - 1)
    return inside, inside != pixels


def _around(centres: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels (B, n) around each centre, moved to the edge if outside, and the second one's weight."""
    position = centres - 0.5
    first = position.floor()
    return first.long().clamp(0, n - 1), (first.long() + 1).clamp(0, n - 1), position - first


def _gather(column: Tensor, rows: Tensor | None, down: Tensor, across: Tensor) -> Tensor:
    """(B, H, W, …) the pixels at `down` (B, H) and `across` (B, W) of the rows."""
    if rows is None:
        rows = torch.arange(len(column), device=column.device)
    if not column.is_contiguous():  # its pixels cannot be listed without a copy
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
