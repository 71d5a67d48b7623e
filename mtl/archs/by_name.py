"""What the networks of torchvision and timm have in common as backbones: they may be frozen, and may make maps.

Their ResNets have stages, so that sharing schemes can join the tasks at each layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.archs import pyramid
from mtl.archs.pyramid import Pyramid
from mtl.archs.stages import BackboneStage, block_stages, keeping
from mtl.tasks import Task

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
STEMS = [["conv1", "bn1", "relu", "maxpool"], ["conv1", "bn1", "act1", "maxpool"]]  # of torchvision and of timm


class BackboneByName(nn.Module, ABC):
    """Base of a backbone that is a network of a library.

    Attributes:
        name: of the network, as the library spells it.
        network: the library's network, without its classifier.
        frozen: whether the network keeps its weights and its batch norm averages.
        pyramid: makes one map of the network's maps, for tasks with labels of pixels; None for features (N, F).
        out_features: channels of the map, or F.
        widths: of a ResNet, channels of its four layers; otherwise not read.
    """

    name: str
    network: nn.Module
    frozen: bool
    pyramid: Pyramid | None
    out_features: int
    widths: Sequence[int]

    def train(self, mode: bool = True) -> BackboneByName:
        """Training mode, except for a frozen network."""
        super().train(mode)
        self.network.train(mode and not self.frozen)
        return self

    def seen(self, images: Tensor) -> Any:
        """What the network makes of the images (N, C, H, W).

        Raises:
            ValueError: they are too small for the network, or it takes one size only.
        """
        return seen(self.network, images, self.name, pyramid.STRIDE if self.pyramid else 1)

    def decoder(self, task: Task) -> nn.Module:
        """Of a map `mtl.archs.pyramid.decoder`; of features (N, F) a linear layer."""
        return pyramid.decoder(task) if self.pyramid else nn.Linear(self.out_features, task.outputs)

    def stages(self) -> list[BackboneStage]:
        """The four layers of a ResNet; other networks have no stages. A pyramid needs the images and all maps."""
        if not is_resnet(self.network) or len(self.widths) != len(LAYERS):
            return []
        parts = dict(self.network.named_children())
        stem = nn.Sequential(*list(parts.values())[: len(STEMS[0])])
        layers = [parts[name] for name in LAYERS]
        found = block_stages([stem], stem, parts["bn1"].num_features, layers, self.widths)
        return found if self.pyramid is None else [keeping(stage) for stage in found]

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        """The features, of the last layer's map. The pyramid also sees the maps that were kept."""
        return self.pooled(x) if self.pyramid is None else self.pyramid([*kept[1:], x], kept[0])

    @abstractmethod
    def pooled(self, x: Tensor) -> Tensor:
        """The last layer's map of a ResNet to features (N, F)."""


def is_resnet(network: nn.Module) -> bool:
    """Whether the network begins with a ResNet's stem and four layers, as torchvision or timm names them."""
    names = [name for name, _ in network.named_children()][: len(STEMS[0]) + len(LAYERS)]
    return names in [[*stem, *LAYERS] for stem in STEMS]


def seen(network: nn.Module, images: Tensor, name: str, multiple: int = 1) -> Any:
    """What a library's network makes of images (N, C, H, W).

    Args:
        name: of the network.
        multiple: of which their height and width must be anyway.

    Raises:
        ValueError: the images are too small for the network, or it takes one size only. Libraries raise errors of any
            kind then, about a layer deep inside.
    """
    try:
        return network(images)
    except Exception as error:
        height, width = images.shape[2:]
        if _takes(network, images, height, width) or not (needed := _needed(network, images, multiple)):
            raise  # something else is wrong
        raise ValueError(f"{name} needs images of {needed}, not {height}x{width}") from error


def _needed(network: nn.Module, images: Tensor, multiple: int) -> str:
    """The square images that the network needs: of one size, or of a least one. Empty if these are not too small."""
    fails = 0
    for side in (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512):
        if _takes(network, images, side, side):
            break
        fails = side
    else:
        return ""
    if not _takes(network, images, 2 * side, 2 * side):
        return f"{side}x{side}"
    while side - fails > 1:
        middle = (side + fails) // 2
        fails, side = (fails, middle) if _takes(network, images, middle, middle) else (middle, side)
    least = -(-side // multiple) * multiple
    return f"at least {least}x{least}" if min(images.shape[2:]) < side else ""


@torch.no_grad()
def _takes(network: nn.Module, images: Tensor, height: int, width: int) -> bool:
    """Whether the network takes images of this size. On the device "meta" nothing is computed but shapes."""
    several = max(2, len(images))  # batch norm in training refuses a single place of a single image
    state = {k: torch.empty_like(v, device="meta") for k, v in (*network.named_parameters(), *network.named_buffers())}
    try:
        torch.func.functional_call(
            network, state, torch.empty(several, images.shape[1], height, width, dtype=images.dtype, device="meta")
        )
    except Exception:
        return False
    return True
