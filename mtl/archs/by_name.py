"""What the networks of torchvision and timm have in common as backbones: they may be frozen, and may make maps."""

from __future__ import annotations

from torch import nn

from mtl.archs import pyramid
from mtl.archs.pyramid import Pyramid
from mtl.tasks import Task


class BackboneByName(nn.Module):
    """Base of a backbone that is a network of a library.

    Attributes:
        network: the library's network, without its classifier.
        frozen: whether the network keeps its weights and its batch norm averages.
        pyramid: makes one map of the network's maps, for tasks with labels of pixels; None for features (N, F).
        out_features: channels of the map, or F.
    """

    network: nn.Module
    frozen: bool
    pyramid: Pyramid | None
    out_features: int

    def train(self, mode: bool = True) -> BackboneByName:
        """Training mode, except for a frozen network."""
        super().train(mode)
        self.network.train(mode and not self.frozen)
        return self

    def decoder(self, task: Task) -> nn.Module:
        """Of a map `mtl.archs.pyramid.decoder`; of features (N, F) a linear layer."""
        return pyramid.decoder(task) if self.pyramid else nn.Linear(self.out_features, task.outputs)
