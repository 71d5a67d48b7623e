"""SegNet and SegNet-MTAN, the networks of most published NYUv2 and Cityscapes tables.

SegNet: Badrinarayanan et al., "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
TPAMI 2017, in the form of the MTAN repository: VGG-16's widths, and all tasks share everything except the last two
convolutions ("split"). With NYUv2's three tasks it has 25,055,185 parameters.

SegNet-MTAN: Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019. Each task attends to the shared
maps with masks of its own. It has 44,229,073 parameters on NYUv2, and 41,206,984 on Cityscapes with 7 classes, as in
the repositories of CAGrad, Nash-MTL, FAMO and FairGrad.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from mtl.archs.maps import check_least, labels_pixels, layer, pooled
from mtl.archs.model import Model, Outputs
from mtl.archs.stages import BackboneStage
from mtl.data.columns import Batch
from mtl.tasks import Task

LEVELS = 5
Width = Annotated[int, Ge(1)]


class Maps(NamedTuple):
    """The shared maps of each of the five levels, from the images' size downwards.

    Attributes:
        first, last: what the encoder's first and last convolution of a level gave.
        raised: the map of the level below, at this level's size.
        decoded: outputs of the decoder's last convolution of each level. The output of level 0 are the features.
    """

    first: list[Tensor]
    last: list[Tensor]
    raised: list[Tensor]
    decoded: list[Tensor]


class SegNet(nn.Module):
    """Five poolings and five unpoolings to the places of the maxima; features are maps (N, width, H, W).

    Args:
        in_channels: image channels; images of at least 32x32.
        width: channels of the first convolution. The levels have 1, 2, 4, 8 and 8 times as many.
    """

    def __init__(self, in_channels: int, width: Width = 64):
        super().__init__()
        self.out_features = width
        widths, above = _widths(width)
        below = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(_Level(below[i], widths[i], i) for i in range(LEVELS))
        self.decoder_levels = nn.ModuleList(_Level(widths[i], above[i], i) for i in range(LEVELS))
        self.layer_groups = {
            **{f"encoder{i + 1}": [f"encoder.{i}"] for i in range(LEVELS)},
            **{f"decoder{i + 1}": [f"decoder_levels.{i}"] for i in reversed(range(LEVELS))},
        }
        initialise(self)

    def decoder(self, task: Task) -> nn.Module:
        """Of a task with maps a 3x3 and a 1x1 convolution, with nothing in between, as in the MTAN repository."""
        return head(self.out_features, task)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).decoded[0]

    def stages(self) -> list[BackboneStage]:
        """The levels of the encoder, then those of the decoder. A level ends before its pooling."""
        down, up = list(self.encoder), list(reversed(self.decoder_levels))
        starts = [partial(_down, level, i > 0) for i, level in enumerate(down)]
        starts += [partial(_up, level, i == 0) for i, level in enumerate(up)]
        widths = [level.rest[-1][0].out_channels for level in (*down, *up)]
        inner = [level.first[0].out_channels for level in (*down, *up)]
        return [
            BackboneStage([level], start, first, level.rest, last)
            for level, start, first, last in zip((*down, *up), starts, inner, widths, strict=True)
        ]

    def finish(self, x: Tensor, kept: list[Any]) -> Tensor:
        return x

    def maps(self, x: Tensor) -> Maps:
        """Images (N, C, H, W) to the maps of all levels.

        Raises:
            ValueError: height or width is less than 32.
        """
        check_least(x, 2**LEVELS, "SegNet")
        first, last, places = [], [], []
        for level in self.encoder:
            first.append(level.first(x))
            last.append(level.rest(first[-1]))
            x, indices = F.max_pool2d(last[-1], 2, 2, return_indices=True)
            places.append(indices)
        raised, decoded = [x] * LEVELS, [x] * LEVELS
        for i in reversed(range(LEVELS)):
            raised[i] = unpool(x, places[i], last[i].shape[2:])
            x = decoded[i] = self.decoder_levels[i](raised[i])
        return Maps(first, last, raised, decoded)


class SegNetMTAN(Model):
    """SegNet with attention per task: a mask in [0, 1] on each level's shared map, in the encoder and in the decoder.

    Repositories disagree about whose the parameters are. Shared here are SegNet's convolutions, and the convolutions
    that follow the masks (`down`, `up`), which serve all tasks in turn. A task's own are its masks and its prediction
    layers. CAGrad's code says the same. Nash-MTL's, FAMO's and FairGrad's code counts everything except the
    prediction layers as shared, masks included. There the other tasks' gradients are zero, so that a mask only adds to
    the length of its task's gradient, and is trained with its task's weight. Here it is trained with weight 1 by a
    gradient method; `step.heads=weighted` gives it the task's weight.

    There is no tensor at which sharing ends. So methods on the gradients of features are refused.

    Args:
        in_channels: image channels; images of at least 32x32.
        tasks: each one gets its masks.
        width: as of `SegNet`.
    """

    def __init__(self, in_channels: int, tasks: Sequence[Task], width: Width = 64):
        super().__init__()
        self.out_features = width
        widths, above = _widths(width)
        self.segnet = SegNet(in_channels, width)
        self.down = nn.ModuleList(
            layer(c, n, bias=True) for c, n in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.up = nn.ModuleList(layer(c, n, bias=True) for c, n in zip(widths, above, strict=True))
        self.layer_groups = {name: [f"segnet.{p}" for p in parts] for name, parts in self.segnet.layer_groups.items()}
        self.masks, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for task in tasks:
            # Past ModuleDict's own check, which refuses a task that is called "type" or "values".
            self.masks._modules[task.name] = _Masks(widths, above)
            self.heads._modules[task.name] = head(width, task)
        for part in (self.down, self.up, self.masks):
            initialise(part)

    def forward(self, batch: Batch) -> Outputs:
        maps = self.segnet.maps(batch["image"])
        return Outputs([self.heads[name](self._attend(maps, masks)) for name, masks in self.masks.items()])

    def _attend(self, maps: Maps, masks: _Masks) -> Tensor:
        """The map (N, width, H, W) that one task sees."""
        seen = None
        for i, mask in enumerate(masks.encoder):
            shown = maps.first[i] if seen is None else torch.cat((maps.first[i], seen), 1)
            seen = F.max_pool2d(self.down[i](mask(shown) * maps.last[i]), 2, 2)
        for i in reversed(range(LEVELS)):
            larger = F.interpolate(seen, maps.raised[i].shape[2:], mode="bilinear", align_corners=True)
            mask = masks.decoder[i](torch.cat((maps.raised[i], self.up[i](larger)), 1))
            seen = mask * maps.decoded[i]
        return seen

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return [p for part in (self.segnet, self.down, self.up) for p in part.parameters()]

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        return [*self.masks[task].parameters(), *self.heads[task].parameters()]


class _Level(nn.Module):
    """One convolution that changes the width, then one more on the upper two levels and two on the others."""

    def __init__(self, inputs: int, outputs: int, level: int):
        super().__init__()
        self.first = layer(inputs, outputs, bias=True)
        self.rest = nn.Sequential(*(layer(outputs, outputs, bias=True) for _ in range(1 if level < 2 else 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


def _down(level: _Level, pools: bool, x: Tensor, kept: list[Any]) -> Tensor:
    if not pools:  # the images
        check_least(x, 2**LEVELS, "SegNet")
    return level.first(_pool(x, kept) if pools else x)


def _up(level: _Level, pools: bool, x: Tensor, kept: list[Any]) -> Tensor:
    x = _pool(x, kept) if pools else x
    return level.first(unpool(x, *kept.pop()))


def _pool(x: Tensor, kept: list[Any]) -> Tensor:
    """Half of the size; the places of the maxima are kept for the decoder."""
    smaller, places = F.max_pool2d(x, 2, 2, return_indices=True)
    kept.append((places, x.shape[2:]))
    return smaller


class _Masks(nn.Module):
    """What one task attends to, on each level of the encoder and of the decoder."""

    def __init__(self, widths: list[int], above: list[int]):
        super().__init__()
        inputs = [widths[0], *(2 * c for c in widths[1:])]
        self.encoder = nn.ModuleList(_mask(n, c) for n, c in zip(inputs, widths, strict=True))
        self.decoder = nn.ModuleList(_mask(c + n, n) for c, n in zip(widths, above, strict=True))


def _mask(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *layer(inputs, outputs, 1, bias=True), nn.Conv2d(outputs, outputs, 1), nn.BatchNorm2d(outputs), nn.Sigmoid()
    )


def _widths(width: int) -> tuple[list[int], list[int]]:
    """Channels of each level of the encoder, and of the decoder."""
    widths = [width * n for n in (1, 2, 4, 8, 8)]
    return widths, [width, *widths[:-1]]


def head(width: int, task: Task) -> nn.Module:
    """The layers of one task, on a map (N, width, H, W)."""
    if not labels_pixels(task):
        return pooled(width, task.outputs)
    made = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, task.outputs, 1))
    initialise(made)
    return made


def initialise(module: nn.Module) -> None:
    """Xavier's normal initialisation and zero biases, as in the MTAN repository."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_normal_(m.weight)
            nn.init.zeros_(m.bias)


def unpool(x: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """`F.max_unpool2d`, which PyTorch refuses in a deterministic run: maxima (N, C, h, w) back at their places.

    Args:
        indices: (N, C, h, w) their places in the map that was pooled, counted row by row.
        size: (H, W) of that map.
    """
    empty = x.new_zeros(*x.shape[:2], size[0] * size[1])
    return empty.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, tuple(size))
