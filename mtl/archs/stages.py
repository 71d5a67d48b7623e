"""Backbones in stages: the places where the tasks of a sharing scheme may meet.

A staged backbone has two methods. `stages()` returns its parts in order, each of which takes and returns one map.
`finish(x, kept)` turns the last map into the features. Run one after another, they give what `forward` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mtl.archs.model import ArchError

HAVE_THEM = "resnet20 to resnet110, resnet18, wide_resnet, vgg16_bn, segnet, unet, deeplabv3, deeplabv3plus, fcn, " \
            "and the ResNets of torchvision and timm"  # fmt: skip


class BackboneStage(NamedTuple):
    """A part of a backbone, in two halves.

    Attributes:
        modules: all modules whose parameters this stage uses. What `finish` uses belongs to the last stage.
        start: (map or images, kept) → map: everything except the last block. `kept` is a list, in which a backbone
            keeps what a later stage or `finish` needs, such as U-Net's maps from before a pooling.
            MTAN gives `finish` a task's masked map for each stage's map that was kept itself, not a copy of it.
        inner: channels of what `start` returns.
        end: map → map: the last block.
        channels: channels of what `end` returns.
    """

    modules: Sequence[nn.Module]
    start: Callable[[Tensor, list[Any]], Tensor]
    inner: int
    end: Callable[[Tensor], Tensor]
    channels: int

    def __call__(self, x: Tensor, kept: list[Any]) -> Tensor:
        return self.end(self.start(x, kept))


def stages_of(backbone: nn.Module, scheme: str) -> list[BackboneStage]:
    """The stages of a backbone that has some.

    Args:
        scheme: class of the sharing scheme that needs them, for the message.

    Raises:
        ArchError: it has none, or reads several columns.
    """
    stages = list(backbone.stages()) if hasattr(backbone, "stages") else []
    name = type(backbone).__name__
    if not stages or not hasattr(backbone, "finish"):
        raise ArchError(
            f"{scheme} needs a backbone in stages, and this {name} has none; these have: {HAVE_THEM}; a network of "
            "your own needs the methods stages() and finish(x, kept), see mtl/archs/stages.py"
        )
    if len(inputs := getattr(backbone, "inputs", ("image",))) != 1:
        raise ArchError(f"{scheme} needs a backbone with one input, and {name} reads {', '.join(inputs)}")
    return stages


def block_stages(
    stem: Sequence[nn.Module],
    run_stem: Callable[[Tensor], Tensor],
    first: int,
    layers: Sequence[nn.Sequential],
    channels: Sequence[int],
) -> list[BackboneStage]:
    """The stages of a residual network: one for each layer of blocks, and the stem in the first one.

    Args:
        stem: modules of the stem.
        run_stem: images → map.
        first: channels of that map.
        layers: blocks of each stage.
        channels: of each stage's map.
    """
    found = []
    for i, (blocks, width) in enumerate(zip(layers, channels, strict=True)):
        before = run_stem if i == 0 else None
        # With a single block, the first half does nothing, and its map is the stage's input.
        inner = width if len(blocks) > 1 else first if i == 0 else channels[i - 1]
        modules = [*stem, blocks] if i == 0 else [blocks]
        found.append(BackboneStage(modules, _start(before, blocks[:-1]), inner, blocks[-1], width))
    return found


def _start(before: Callable[[Tensor], Tensor] | None, blocks: nn.Module) -> Callable[[Tensor, list[Any]], Tensor]:
    return lambda x, kept: blocks(x if before is None else before(x))


def keeping(stage: BackboneStage) -> BackboneStage:
    """The stage as one that also keeps the map it is given, for `finish`."""
    return stage._replace(start=partial(_keep, stage))


def _keep(stage: BackboneStage, x: Tensor, kept: list[Any]) -> Tensor:
    kept.append(x)
    return stage.start(x, kept)


def own_of_stages(backbone: nn.Module, stages: Sequence[BackboneStage]) -> list[list[nn.Parameter]]:
    """The parameters of each stage. The last stage gets whatever the others do not use, such as those of `finish`."""
    earlier = [[p for module in stage.modules for p in module.parameters()] for stage in stages[:-1]]
    known = {id(p) for stage in earlier for p in stage}
    return [*earlier, [p for p in backbone.parameters() if id(p) not in known]]


def resize(x: Tensor, like: Tensor) -> Tensor:
    """A map (N, C, H, W) in the size of another: max-pooled where it is larger, otherwise enlarged bilinearly."""
    size = like.shape[2:]
    kernel = [max(1, round(a / b)) for a, b in zip(x.shape[2:], size, strict=True)]
    if kernel != [1, 1]:
        # Networks round up or down where a size is odd.
        up = any(b * k > a for a, b, k in zip(x.shape[2:], size, kernel, strict=True))
        x = F.max_pool2d(x, kernel, kernel, ceil_mode=up)
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)
