"""RetinaNet on any convolutional network of torchvision, for detection and, beside it, tasks of pixels and of images.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; its feature pyramid: Lin et al., "Feature Pyramid
Networks for Object Detection", CVPR 2017. Different from RetinaNet: group norm in the heads, as in torchvision's second
version, and by default fewer channels, fewer layers in the heads, and levels for small images.

The maps of all levels are one tensor (N, width, places), the shared features. So methods on the gradients of features
work, and see all levels. Tasks of pixels add the maps up at the size of the largest one; tasks of the whole image take
the mean of each map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from mtl.archs.by_name import seen
from mtl.archs.maps import labels_pixels, layer
from mtl.archs.torchvision import layers, load_weights, up_to_maps, without_classifier
from mtl.metrics.boxes import Detections
from mtl.tasks import Detection, Task

SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)  # height by width
PRIOR = 0.01  # of an object, before training: otherwise the background would be the whole of the first losses

Sizes = Sequence[tuple[int, int]]


class Retina(nn.Module):
    """A network of torchvision with a feature pyramid: images (N, C, H, W) to features (N, width, places).

    Args:
        in_channels: image channels.
        in_shapes: shape of the images (C, H, W), as {"image": …}.
        name, weights, frozen: as in `mtl.archs.torchvision.TorchvisionBackbone`.
        width: channels of the pyramid and the heads; 256 in the paper.
        levels: of the pyramid, one after another. A place of level 3 covers 8 x 8 pixels; 3 to 7 in the paper. Levels
            beyond the network's last map are made by convolutions with stride 2.
        head_layers: convolutions in a head before the last one; 4 in the paper.
        anchor: side of the smallest square anchor, in places of its level; 4 in the paper.

    Raises:
        ValueError: there is no such network, no such weights, or it lacks a level; the message begins with the
            argument's name.
    """

    def __init__(
        self,
        in_channels: int,
        in_shapes: Mapping[str, Sequence[int]],
        name: str = "resnet18",
        weights: str | None = None,
        frozen: bool = False,
        width: Annotated[int, Ge(1)] = 64,
        levels: Sequence[int] = (3, 4, 5, 6),
        head_layers: Annotated[int, Ge(0)] = 2,
        anchor: Annotated[float, Gt(0)] = 4.0,
    ):
        super().__init__()
        levels = list(levels)
        if not levels or levels != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError(f"levels: {levels}; whole numbers one after another are needed, such as [3, 4, 5]")
        self.name, self.frozen, self.width, self.head_layers = name, frozen, width, head_layers
        network, _ = without_classifier(name, in_channels, weights)
        self.network, known = up_to_maps(network, in_channels, name, levels)
        missing = [level for level in levels if level not in known and level < max(known)]
        if missing:
            raise ValueError(f"levels: {name} has no map of level {missing[0]}, only {', '.join(map(str, known))}")
        load_weights(self.network, name, weights)
        self.network.requires_grad_(not frozen)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in known.values())
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in known)
        beyond = len(levels) - len(known)
        self.further = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(beyond))
        self.layer_groups = layers(self.network) | {"pyramid": ["lateral", "smooth", "further"]}
        self.image = tuple(next(iter(in_shapes.values()))[1:])
        self.sizes = _sizes(self, in_channels)
        self.anchors = _anchors(levels, self.sizes, anchor)

    def train(self, mode: bool = True) -> Retina:
        """Training mode, except for a frozen network."""
        super().train(mode)
        self.network.train(mode and not self.frozen)
        return self

    def decoder(self, task: Task) -> nn.Module:
        """Two heads with anchors for boxes, a map for labels of pixels, else a linear layer."""
        if isinstance(task, Detection):
            return BoxHeads(self.width, task.outputs, self.head_layers, self.sizes, self.anchors)
        if labels_pixels(task):
            return MapHead(self.width, task.outputs, self.sizes, self.image)
        return MeanHead(self.width, task.outputs, self.sizes)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([one.flatten(2) for one in self._maps(images)], 2)

    def _maps(self, images: Tensor) -> list[Tensor]:
        found = list(seen(self.network, images, self.name).values())
        total, maps = None, []
        for i in reversed(range(len(found))):  # from the smallest map up
            own = self.lateral[i](found[i])
            total = own if total is None else own + F.interpolate(total, own.shape[2:], mode="nearest")
            maps.insert(0, self.smooth[i](total))
        for further in self.further:
            maps.append(further(F.relu(maps[-1])))
        return maps


class BoxHeads(nn.Module):
    """The heads of RetinaNet: features (N, width, places) to `Detections`, with nine anchors for each place.

    Args:
        width: channels.
        classes: number of classes.
        depth: convolutions in each head before the last one.
        sizes: (height, width) of each level's map.
        anchors: (A, 4) all anchors.
    """

    def __init__(self, width: int, classes: int, depth: int, sizes: Sizes, anchors: Tensor):
        super().__init__()
        self.sizes, each = sizes, len(SCALES) * len(RATIOS)
        self.classes = _tower(width, depth, each * classes)
        self.offsets = _tower(width, depth, each * 4)
        nn.init.constant_(self.classes[-1].bias, -math.log((1 - PRIOR) / PRIOR))
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, features: Tensor) -> Detections:
        maps = _split(features, self.sizes)
        each = len(SCALES) * len(RATIOS)
        logits, offsets = (
            # (N, 9 · k, h, w) to (N, h · w · 9, k)
            torch.cat([tower(one).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, k)) for one in maps], 1)
            for tower, k in ((self.classes, self.classes[-1].out_channels // each), (self.offsets, 4))
        )
        return Detections(logits, offsets, self.anchors.expand(len(features), -1, -1))


class MapHead(nn.Module):
    """A map (N, outputs, H, W): the sum of all levels at the size of the largest one, two convolutions, enlargement.

    Args:
        width, sizes: as in `BoxHeads`.
        outputs: channels of the result.
        image: (H, W).
    """

    def __init__(self, width: int, outputs: int, sizes: Sizes, image: tuple[int, int]):
        super().__init__()
        self.sizes, self.image = sizes, image
        self.layers = nn.Sequential(*layer(width, width), nn.Conv2d(width, outputs, 1))

    def forward(self, features: Tensor) -> Tensor:
        first, *others = _split(features, self.sizes)
        for one in others:
            first = first + _enlarged(one, self.sizes[0])
        return _enlarged(self.layers(first), self.image)


class MeanHead(nn.Module):
    """One prediction (N, outputs) for the whole image: the mean of each level's map, and a linear layer.

    Args:
        width, outputs, sizes: as in `MapHead`.
    """

    def __init__(self, width: int, outputs: int, sizes: Sizes):
        super().__init__()
        self.sizes, self.linear = sizes, nn.Linear(width * len(sizes), outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(torch.cat([one.mean((2, 3)) for one in _split(features, self.sizes)], 1))


def _split(features: Tensor, sizes: Sizes) -> list[Tensor]:
    """The map (N, width, h, w) of each level."""
    parts = features.split([height * width for height, width in sizes], 2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def _enlarged(one: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(one, size, mode="bilinear", align_corners=False)


def _tower(width: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(math.gcd(width, 8), width), nn.ReLU(inplace=True)]
    last = nn.Conv2d(width, outputs, 3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


@torch.no_grad()
def _sizes(backbone: Retina, in_channels: int) -> list[tuple[int, int]]:
    """(height, width) of each level's map. Networks round in different ways, so they are tried out."""
    tried = copy.deepcopy(backbone).to("meta").eval()  # on this device nothing is computed but shapes
    maps = tried._maps(torch.zeros(1, in_channels, *backbone.image, device="meta"))
    return [(one.shape[2], one.shape[3]) for one in maps]


def _anchors(levels: Sequence[int], sizes: Sizes, anchor: float) -> Tensor:
    """(A, 4) boxes in pixels: by level, then row, column, and shape, in the order of the heads' outputs."""
    sides = torch.tensor([(s / r**0.5, s * r**0.5) for r in RATIOS for s in SCALES])  # (9, 2) widths and heights
    found = []
    for level, (height, width) in zip(levels, sizes, strict=True):
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centre = torch.stack([x, y], -1).view(-1, 1, 2)
        found.append(torch.cat([centre - anchor * sides / 2, centre + anchor * sides / 2], -1).flatten(0, 1) * 2**level)
    return torch.cat(found)
