"""Rendered rooms with exact classes, depth and surface normals, to try and test dense tasks without a download.

A camera looks into a room with boxes and balls on its floor and windows in its walls. Each pixel casts one ray, so all
label maps come from the geometry. The camera's coordinates: x to the right along the columns, y down along the rows, z
into the picture. Depth is z, as a depth camera measures it. No paper reports results on these images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan, tau
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from mtl.data import Benchmark, Flip, Image, ScaleCrop, Split
from mtl.metrics.dense import Reduction
from mtl.random import stream
from mtl.tasks import Depth, Normals, Segmentation, Task

CLASSES = ("floor", "ceiling", "wall", "window", "box", "ball")
FLOOR, CEILING, WALL, WINDOW, BOX, BALL = range(len(CLASSES))
BOXES, BALLS, WINDOWS = 3, 2, 3
MISSING = 0.03  # share of the pixels without a class, and of those without depth and normal
FOCAL = 0.7  # times the longer side: 71° of view along it
CHUNK = 32  # rooms that are drawn and rendered together


@dataclass
class Rooms(Benchmark):
    """Segmentation, depth and normals of rendered rooms. 3 % of the pixels lack a class, 3 % lack depth and normal.

    Args:
        train_size, test_size: number of images. A larger data set starts with the images of a smaller one.
        height, width: of the images, in pixels.
        reduction: how the metrics of depth and normals combine batches: pooled over all pixels, or the mean of each
            batch's value (batch_mean).
    """

    batch_size: Annotated[int, Ge(1)] = 16
    train_size: Annotated[int, Ge(2)] = 1000
    test_size: Annotated[int, Ge(1)] = 200
    height: Annotated[int, Ge(1)] = 48
    width: Annotated[int, Ge(1)] = 64
    reduction: Reduction = "pooled"

    augment = (ScaleCrop((1.0, 1.2, 1.5)), Flip())

    @cached_property
    def tasks(self) -> Sequence[Task]:
        by, classes = self.reduction, len(CLASSES)
        return Segmentation("segmentation", classes), Depth("depth", reduction=by), Normals("normals", reduction=by)

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.height, self.width), mean=(0.5,), std=(0.25,))}

    def load(self) -> dict[str, Split]:
        sizes = {"train": self.train_size, "test": self.test_size}
        return {name: _sample(name, size, self.height, self.width) for name, size in sizes.items()}


def _sample(name: str, size: int, height: int, width: int) -> Split:
    split = Split({
        "image": torch.empty(size, height, width, 3, dtype=torch.uint8),
        "segmentation": torch.empty(size, height, width, dtype=torch.int8),
        "depth": torch.empty(size, height, width),
        "normals": torch.empty(size, height, width, 3),
    })  # fmt: skip
    for number, rows in enumerate(torch.arange(size).split(CHUNK)):
        # One stream for each full chunk, so that a larger data set starts with the smaller one.
        draws = stream(0, "rooms", name, number)
        maps = render(draw_rooms(CHUNK, draws), height, width)
        damage(maps, draws)
        for key, column in split.columns.items():
            column[rows] = maps[key][: len(rows)]
    return split


def damage(maps: dict[str, Tensor], draws: torch.Generator) -> None:
    """Remove some labels and add noise, in place. Real depth cameras have holes, and annotators leave pixels out."""
    shape = maps["depth"].shape
    maps["segmentation"][torch.rand(shape, generator=draws) < MISSING] = -100
    holes = torch.rand(shape, generator=draws) < MISSING
    maps["depth"][holes], maps["normals"][holes] = nan, nan
    noise = 6 * torch.randn(maps["image"].shape, generator=draws)
    maps["image"] = (maps["image"] + noise).round().clamp(0, 255).to(torch.uint8)


def draw_rooms(size: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Random rooms, in metres and radians. y points down, so heights are negative; the floor is at y = 0.

    Returns:
        {name: (size, …)}: the room's `low` and `high` corner, camera, boxes, balls, windows, lamp, colours.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=draws)

    half, depth, ceiling = uniform(1.5, 3.0), uniform(4.0, 7.0), uniform(2.3, 3.2)
    zero = torch.zeros(size)
    across, along = uniform(-0.9, 0.9, BOXES + BALLS), uniform(0.0, 1.0, BOXES + BALLS)
    # Objects stand between 2 m from the camera and the far wall. The farther away, the farther to the side they may be,
    # because the camera sees more there.
    z = 2.0 + along * (depth[:, None] - 2.5)
    x = across * torch.minimum(half[:, None] - 0.4, 0.6 * z)
    there = uniform(0, 1, BOXES + BALLS) < 0.75
    where = torch.stack([x, z], -1).masked_fill(~there[..., None], 1e4)  # a missing object is put far behind the walls
    sides, radius = uniform(0.15, 0.5, BOXES, 3), uniform(0.15, 0.45, BALLS)
    return {
        "low": torch.stack([-half, -ceiling, zero - 0.5], 1),
        "high": torch.stack([half, zero, depth], 1),
        "camera": torch.stack([uniform(-0.5, 0.5), -uniform(1.1, 1.8), zero], 1),
        "yaw": uniform(-0.5, 0.5),
        "pitch": uniform(0.0, 0.3),
        "box_centre": torch.stack([where[:, :BOXES, 0], -sides[..., 1], where[:, :BOXES, 1]], -1),
        "box_sides": sides,  # halves of them
        "box_yaw": uniform(0, tau / 4, BOXES),
        "ball_centre": torch.stack([where[:, BOXES:, 0], -radius, where[:, BOXES:, 1]], -1),
        "ball_radius": radius,
        # On the left, far and right wall: the middle along the wall from −1 to 1, and half the breadth.
        "window": torch.stack([uniform(-0.6, 0.6, WINDOWS), uniform(0.3, 0.8, WINDOWS)], -1),
        "lamp": torch.stack([uniform(-1, 1), 0.3 - ceiling, uniform(0.5, 3)], 1),
        "colours": uniform(0.15, 0.95, 3 + BOXES + BALLS, 3),  # floor, ceiling, wall, boxes, balls
        "tiles": uniform(0.3, 0.8),
    }


def render(rooms: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """Render the camera's image of each room, with its label maps.

    Returns:
        {"image": (N, H, W, 3) from 0 to 255, "segmentation": (N, H, W) int8, "depth": (N, H, W) metres,
        "normals": (N, H, W, 3) unit vectors towards the camera}. Every pixel has all labels.
    """
    rotation = _rotation(rooms["yaw"], rooms["pitch"])
    focal = FOCAL * max(height, width)
    x, y = ((torch.arange(n) + 0.5 - n / 2) / focal for n in (width, height))
    rays = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.ones(height, width)], -1)
    # A ray is (x, y, 1) in the camera's coordinates. So the factor t at which it hits a surface is the depth z itself.
    rays = torch.einsum("nij,hwj->nhwi", rotation, rays)
    depth, normal, kind, colour = _walls(rooms, rays)
    for k, (t, n, of) in enumerate(_objects(rooms, rays)):
        nearer = t < depth  # the object hides whatever was drawn before it
        depth, normal = torch.where(nearer, t, depth), torch.where(nearer[..., None], n, normal)
        kind = kind.masked_fill(nearer, of)
        colour = torch.where(nearer[..., None], _wide(rooms["colours"][:, 3 + k]), colour)
    places = _wide(rooms["camera"]) + depth[..., None] * rays
    image = 255 * (colour * _light(rooms, places, normal)[..., None]).masked_fill((kind == WINDOW)[..., None], 1.0)
    normal = torch.einsum("nji,nhwj->nhwi", rotation, normal)
    return {"image": image.clamp(0, 255), "segmentation": kind.to(torch.int8), "depth": depth, "normals": normal}


def _rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """(N, 3, 3) from the camera's coordinates to the room's: nods down by `pitch`, then turns right by `yaw`."""
    one, zero = torch.ones_like(yaw), torch.zeros_like(yaw)
    c, s = pitch.cos(), pitch.sin()
    nod = torch.stack([one, zero, zero, zero, c, s, zero, -s, c], 1).view(-1, 3, 3)
    return _turn(yaw) @ nod


def _turn(yaw: Tensor) -> Tensor:
    """(N, 3, 3) rotations about the vertical axis, from z towards x."""
    one, zero, c, s = torch.ones_like(yaw), torch.zeros_like(yaw), yaw.cos(), yaw.sin()
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], 1).view(-1, 3, 3)


def _wide(values: Tensor) -> Tensor:
    """(N, …) as (N, 1, 1, …), beside pixels."""
    return values[:, None, None]


def _walls(rooms: dict[str, Tensor], rays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depth, normal, class and colour of the empty room (floor, ceiling, walls), where each ray ends."""
    # Along each axis, the ray leaves the room at one of two planes. The nearest of the three planes is the one hit.
    ends = torch.where(rays > 0, _wide(rooms["high"]), _wide(rooms["low"])) - _wide(rooms["camera"])
    t = torch.where(rays == 0, torch.inf, ends / rays)
    depth, axis = t.min(-1)
    normal = -F.one_hot(axis, 3) * rays.sign()
    places = _wide(rooms["camera"]) + depth[..., None] * rays
    kind = torch.where(axis == 1, torch.where(rays[..., 1] > 0, FLOOR, CEILING), WALL)
    colour = rooms["colours"][torch.arange(len(kind))[:, None, None], kind]
    # A chequered floor. The small offset keeps rounding from deciding the tile of the floor's own plane.
    tiles = (places / _wide(rooms["tiles"])[..., None] + 1e-3).floor().sum(-1) % 2
    colour = torch.where(((kind == FLOOR) & (tiles == 1))[..., None], 0.6 * colour, colour)
    return depth, normal, kind.masked_fill(_in_window(rooms, places, axis, rays), WINDOW), colour


def _in_window(rooms: dict[str, Tensor], places: Tensor, axis: Tensor, rays: Tensor) -> Tensor:
    middle, half = (rooms["low"] + rooms["high"]) / 2, (rooms["high"] - rooms["low"]) / 2
    places = (places - _wide(middle)) / _wide(half)  # from −1 to 1
    inside = torch.zeros_like(axis, dtype=torch.bool)
    walls = ((axis == 0) & (rays[..., 0] < 0), (axis == 2) & (rays[..., 2] > 0), (axis == 0) & (rays[..., 0] > 0))
    for k, wall in enumerate(walls):
        along = places[..., 0 if k == 1 else 2]
        centre, breadth = _wide(rooms["window"][:, k, 0]), _wide(rooms["window"][:, k, 1])
        inside |= wall & ((along - centre).abs() < 0.5 * breadth) & (places[..., 1] < 0.1) & (places[..., 1] > -0.7)
    return inside


def _objects(rooms: dict[str, Tensor], rays: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Depth, normal and class of each thing on the floor."""
    for k in range(BOXES):
        start = rooms["camera"] - rooms["box_centre"][:, k]
        yield *_box(start, rays, rooms["box_sides"][:, k], rooms["box_yaw"][:, k]), BOX
    for k in range(BALLS):
        yield *_ball(rooms["camera"] - rooms["ball_centre"][:, k], rays, rooms["ball_radius"][:, k]), BALL


def _box(start: Tensor, rays: Tensor, sides: Tensor, yaw: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and normal of a box that is turned about the vertical axis. Depth is infinite if a ray misses the box."""
    # The usual slab test, in the box's own coordinates: a ray hits if it enters all three slabs before it leaves one.
    turn = _turn(yaw)
    start, rays = torch.einsum("nji,nj->ni", turn, start), torch.einsum("nji,nhwj->nhwi", turn, rays)
    rays = torch.where(rays == 0, 1e-9, rays)
    first, second = (_wide(end * sides - start) / rays for end in (-1, 1))
    enter, axis = torch.minimum(first, second).max(-1)
    leave = torch.maximum(first, second).amin(-1)
    t = enter.masked_fill((enter >= leave) | (enter <= 0), torch.inf)
    normal = -F.one_hot(axis, 3) * rays.sign()
    return t, torch.einsum("nij,nhwj->nhwi", turn, normal)


def _ball(start: Tensor, rays: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Depth and normal of a ball. Depth is infinite if a ray misses it."""
    # The smaller root of |start + t · ray|² = radius², a quadratic equation in t.
    start, radius = _wide(start), _wide(radius)
    a, b = rays.square().sum(-1), (rays * start).sum(-1)
    root = b.square() - a * (start.square().sum(-1) - radius.square())
    t = (-b - root.clamp(min=0).sqrt()) / a
    t = t.masked_fill((root <= 0) | (t <= 0), torch.inf)
    normal = (start + t.nan_to_num(posinf=0.0)[..., None] * rays) / radius[..., None]
    return t, F.normalize(normal, dim=-1)


def _light(rooms: dict[str, Tensor], places: Tensor, normal: Tensor) -> Tensor:
    """(N, H, W) the brightness of a matt surface under the lamp. Objects cast no shadows."""
    way = _wide(rooms["lamp"]) - places
    distance = way.square().sum(-1).sqrt()
    return 0.35 + 1.1 * ((way * normal).sum(-1) / distance).clamp(min=0) / (1 + 0.1 * distance.square())
