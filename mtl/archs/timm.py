"""Any network of timm as a backbone; timm is an extra package: pip install mtl[timm]."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtl.archs import pyramid
from mtl.archs.by_name import LAYERS, BackboneByName, is_resnet
from mtl.archs.pyramid import Pyramid
from mtl.archs.torchvision import layers
from mtl.archs.weights import read, start_from, wanted
from mtl.errors import SetupError, one_line, suggest
from mtl.tasks import Task


class TimmBackbone(BackboneByName):
    """A network of timm without its classifier: images (N, C, H, W) to features (N, F).

    With a task that labels pixels the features are a map (N, 128, H/4, W/4), from the maps that timm gives with
    `features_only`; see `mtl.archs.pyramid`. It sees the images as the data set normalises them. Its first layer fits
    any number of channels.

    Args:
        in_channels: image channels.
        name: as timm.list_models() spells it, such as resnet18 or vit_tiny_patch16_224.augreg_in21k.
        weights: DEFAULT for timm's own (downloaded once), a file with a state dict, or the folder of a run with the
            same network; None for random weights.
        frozen: the network does not learn, and its batch norms keep their averages; only the decoders, and the pyramid
            of a map, are trained.
        tasks: the tasks. They decide between (N, F) and a map.

    Raises:
        SetupError: timm is not installed.
        ValueError: there is no such network, or no such weights; the message begins with the argument's name.
    """

    def __init__(
        self,
        in_channels: int,
        name: str,
        weights: str | None = None,
        frozen: bool = False,
        tasks: Sequence[Task] = (),
    ):
        super().__init__()
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise SetupError("arch=timm needs a package: pip install mtl[timm]") from error
        self.name, self.frozen, own = name, frozen, weights is not None and not Path(weights).exists()
        if own and weights != "DEFAULT":
            raise ValueError(f"weights: {weights!r} is no file, no folder of a run, and not DEFAULT")
        if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
            hint = suggest(name, timm.list_models())
            raise ValueError(f"name: {name!r} is none of timm's {len(timm.list_models())} networks{hint}")
        maps = pyramid.dense(tasks)
        kind = {"features_only": True} if maps else {"num_classes": 0}
        try:
            self.network = timm.create_model(name, pretrained=own and wanted(weights), in_chans=in_channels, **kind)
        except Exception as error:  # no network, no such weights, no such argument: each has errors of its own
            raise ValueError(f"{'weights' if own else 'name'}: {name}: {one_line(error)}") from error
        self.pyramid, self.widths = None, []
        if maps:
            info = self.network.feature_info
            # Larger maps than a quarter of the images only pass through the network.
            self.used = [i for i, by in enumerate(info.reduction()) if by >= pyramid.STRIDE]
            self.widths = [info.channels()[i] for i in self.used]
            self.pyramid, self.out_features = Pyramid(self.widths), pyramid.WIDTH
        else:
            # A network may widen what it pools: its `num_features` then says how wide the map is.
            self.out_features = getattr(self.network, "head_hidden_size", None) or self.network.num_features
            if is_resnet(self.network):
                self.widths = [part["num_chs"] for part in self.network.feature_info[-len(LAYERS) :]]
        if wanted(weights) and not own:
            start_from(self.network, read(weights), weights)
        self.layer_groups = layers(self.network) | ({"pyramid": ["pyramid"]} if maps else {})
        self.network.requires_grad_(not frozen)

    def pooled(self, x: Tensor) -> Tensor:
        return torch.flatten(self.network.forward_head(x), 1)

    def forward(self, images: Tensor) -> Tensor:
        found = self.seen(images)
        if self.pyramid is None:
            return torch.flatten(found, 1)
        maps = [found[i] for i in self.used]
        if getattr(self.network, "output_fmt", None) == "NHWC":  # of Swin, for example
            maps = [map_.movedim(-1, 1) for map_ in maps]
        return self.pyramid(maps, images)
