"""Any classification network of torchvision as a backbone, with or without its pretrained weights.

For tasks with labels of pixels, a feature pyramid joins the network's maps of several sizes (`mtl.archs.pyramid`). Not
every network has such maps: torchvision's transformers (vit, swin, maxvit) are refused then; some of timm's have them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mtl.archs import pyramid
from mtl.archs.by_name import LAYERS, BackboneByName
from mtl.archs.pyramid import Pyramid
from mtl.archs.weights import channels, first_convolution, read, start_from, wanted
from mtl.errors import suggest
from mtl.tasks import Task

CLASSES = 1000  # of ImageNet: what the last layer of torchvision's networks predicts


class TorchvisionBackbone(BackboneByName):
    """A network of torchvision without its classifier: images (N, C, H, W) to features (N, F).

    With a task that labels pixels the features are a map (N, 128, H/4, W/4); see `mtl.archs.pyramid`.
    It sees the images as the data set normalises them. Its first convolution fits any number of channels.

    Args:
        in_channels: image channels.
        name: as torchvision.models spells it, such as resnet18.
        weights: a name of torchvision's such as DEFAULT (downloaded once), a file with a state dict, or the folder of a
            run with the same network; None for random weights.
        frozen: the network does not learn, and its batch norms keep their averages; only the decoders, and the pyramid
            of a map, are trained.
        tasks: the tasks. They decide between (N, F) and a map.

    Raises:
        ValueError: there is no such network, or no such weights, or the network has no maps for a task that labels
            pixels; the message begins with the argument's name.
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
        self.name, self.frozen = name, frozen
        self.network, self.out_features = without_classifier(name, in_channels, weights)
        self.pyramid, self.widths = None, [self.out_features // 2**i for i in reversed(range(len(LAYERS)))]
        if pyramid.dense(tasks):
            self.network, channels_of = up_to_maps(self.network, in_channels, name)
            self.widths = list(channels_of.values())
            self.pyramid, self.out_features = Pyramid(self.widths), pyramid.WIDTH
        load_weights(self.network, name, weights)
        self.layer_groups = layers(self.network) | ({"pyramid": ["pyramid"]} if self.pyramid else {})
        self.network.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        found = self.seen(images)
        return found.flatten(1) if self.pyramid is None else self.pyramid(list(found.values()), images)

    def pooled(self, x: Tensor) -> Tensor:
        return self.network.avgpool(x).flatten(1)


class ResNetMaps(nn.Module):
    """torchvision's ResNet up to its last map: images (N, C, H, W) to {layer: map}, from the largest to the smallest.

    torchvision's feature extractor gives the same maps. But it takes the layers apart, and stages need them whole.
    """

    def __init__(self, network: torchvision.models.ResNet):
        super().__init__()
        for name, child in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, child)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, child in self.named_children():
            x = child(x)
            if name in LAYERS:
                found[name] = x
        return found


FAMILIES = ("resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t")


def without_classifier(name: str, in_channels: int, weights: str | None) -> tuple[nn.Module, int]:
    """A network of torchvision without its last layer, with random weights; and the width of its features.

    Args:
        name, in_channels: as in `TorchvisionBackbone`.
        weights: that are loaded later, as some networks are built differently for them.

    Raises:
        ValueError: there is no such network, or no such weights.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        hint = suggest(name, known) or f"; such as {', '.join(n for n in FAMILIES if n in known)}"
        raise ValueError(f"name: {name!r} is none of torchvision's {len(known)} classification networks{hint}")
    if wanted(weights):
        _named(name, weights)
    network = torchvision.models.get_model(name, weights=None, **_options(name, weights))
    width = _remove_classifier(network)
    _see(network, in_channels)
    return network, width


def up_to_maps(
    network: nn.Module, in_channels: int, name: str, levels: Sequence[int] | None = None
) -> tuple[nn.Module, dict[int, int]]:
    """The network as one that returns a dict of maps, from the largest to the smallest.

    Only the layers up to the last map are kept: the layers behind it would never be trained.

    Args:
        levels: of the maps: 3 for an eighth of the images' size. Those that the network lacks are left out; None: all.

    Returns:
        the network, and {level: channels}.

    Raises:
        ValueError: it has fewer than two maps; the message begins with "name".
    """
    found = _stages(network, in_channels, name)
    chosen = {level: at for level, at in found.items() if levels is None or level in levels}
    if not chosen:
        shown = ", ".join(map(str, found))
        raise ValueError(f"levels: {list(levels)}; {name} has maps of the levels {shown}, and one is needed")
    if levels is None and isinstance(network, torchvision.models.ResNet):
        maps = ResNetMaps(network)
    else:
        maps = create_feature_extractor(network, [path for path, _ in chosen.values()])
    return maps, {level: width for level, (_, width) in chosen.items()}


def load_weights(network: nn.Module, name: str, weights: str | None) -> None:
    """Load torchvision's weights of this name, those of a file, or none.

    Raises:
        ValueError: they are missing or do not fit; the message begins with "weights".
    """
    if wanted(weights):
        named = _named(name, weights)
        start_from(network, _download(named) if named else read(weights), weights)


def layers(network: nn.Module) -> dict[str, list[str]]:
    """The children of the attribute `network`, as layer groups of the gradient microscope."""
    return {
        name: [f"network.{name}"] for name, child in network.named_children() if any(True for _ in child.parameters())
    }


@torch.no_grad()
def _stages(network: nn.Module, in_channels: int, name: str) -> dict[int, tuple[str, int]]:
    """{level: (module, channels)} of the last map of each size, from level 2, a quarter of the images' size, to 5.

    Raises:
        ValueError: there are fewer than two such maps.
    """
    height, width = 128, 160  # not equal: a map (N, H, W, C) is told from (N, C, H, W)
    found: dict[int, tuple[str, int]] = {}

    def note(path: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            across, down = math.log2(width / output.shape[3]), math.log2(height / output.shape[2])
            if abs(across - down) < 0.3 and round(down) >= 2:
                found[round(down)] = path, output.shape[1]

    tried = copy.deepcopy(network).to("meta").eval()  # on this device nothing is computed but shapes
    for path, module in tried.named_modules():
        if path and path.count(".") < 2:  # stages, and the blocks of "features"
            module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
    try:
        tried(torch.zeros(1, in_channels, height, width, device="meta"))
    except Exception:  # a transformer that accepts one size of images only
        found.clear()
    maps = {size: at for size, at in sorted(found.items()) if size <= 5}
    if len(maps) < 2:
        raise ValueError(f"name: {name} has no maps of several sizes, which tasks with labels of pixels need; "
                         "a convolutional network has, such as resnet18")  # fmt: skip
    return maps


def _options(name: str, weights: str | None) -> dict[str, object]:
    """Arguments of torchvision's constructor that its pretrained networks are built with."""
    known = torchvision.models.get_model_weights(name).__members__
    if name in ("googlenet", "inception_v3"):  # without the classifiers in the middle
        return {"aux_logits": False, "init_weights": weights is None, "transform_input": weights in known}
    if name.startswith("vit_") and weights in known:
        return {"image_size": known[weights].meta["min_size"][0]}
    return {}


def _named(name: str, weights: str) -> object | None:
    """torchvision's weights of this name; None where `weights` is a file or a folder.

    Raises:
        ValueError: it is neither.
    """
    known = torchvision.models.get_model_weights(name)
    if weights in known.__members__:
        return known[weights]
    if Path(weights).exists():
        return None
    names = list(known.__members__)
    raise ValueError(
        f"weights: {weights!r} is no file, no folder of a run, and none of {', '.join(names)}{suggest(weights, names)}"
    )


def _download(weights: object) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; or a file that is not what its name says
        raise ValueError(
            f"weights: {weights.url} cannot be downloaded ({error}); put the file into $TORCH_HOME/hub/checkpoints, "
            "or set arch.weights=FILE"
        ) from error


def _remove_classifier(network: nn.Module) -> int:
    """Put nothing in the place of the last layer, which predicts the classes; return the width of what it saw."""
    for path, module in reversed(list(network.named_modules())):
        parent, _, child = path.rpartition(".")
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            setattr(network.get_submodule(parent), child, nn.Identity())
            return module.in_features
        if isinstance(module, nn.Conv2d) and module.out_channels == CLASSES:  # SqueezeNet
            setattr(network.get_submodule(parent), child, nn.Identity())
            return module.in_channels
    raise ValueError(f"name: {type(network).__name__} has no last layer that predicts {CLASSES} classes")


def _see(network: nn.Module, in_channels: int) -> None:
    """Let the first convolution see images of `in_channels` channels."""
    path = first_convolution(network)
    old = network.get_submodule(path)
    if old.in_channels == in_channels:
        return
    parent, _, child = path.rpartition(".")
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    new.weight = nn.Parameter(channels(old.weight.detach(), in_channels))
    if old.bias is not None:
        new.bias = old.bias
    setattr(network.get_submodule(parent), child, new)
