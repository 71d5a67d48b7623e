"""DeepLabV3 and DeepLabV3+ on a dilated ResNet, which loads torchvision's weights.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, and "Encoder-Decoder with Atrous
Separable Convolution for Semantic Image Segmentation", ECCV 2018.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.deeplabv3 import ASPP

from mtl.archs.maps import check_size, labels_pixels, layer, pooled
from mtl.archs.stages import BackboneStage, block_stages, keeping
from mtl.errors import SetupError, one_line, suggest
from mtl.tasks import Task

BLOCKS = {18: (BasicBlock, (2, 2, 2, 2)), 50: (Bottleneck, (3, 4, 6, 3))}
WIDTH = 64  # of the pretrained weights
Width = Annotated[int, Ge(1)]


class DilatedResNet(nn.Module):
    """torchvision's ResNet without its classifier; its last stages keep their size and are dilated instead.

    Args:
        in_channels: image channels.
        depth: 18 or 50.
        width: channels of the first convolution.
        stride: image pixels along each axis for each pixel of the features: 8 dilates two stages, 16 one.
        weights: name of torchvision's weights, fetched once; None starts from random ones.

    Raises:
        ValueError: the weights are unknown, or made for another network or images.
        SetupError: they are not on disk and cannot be downloaded.
    """

    def __init__(
        self, in_channels: int, depth: Literal[18, 50], width: int, stride: Literal[8, 16], weights: str | None
    ):
        super().__init__()
        block, counts = BLOCKS[depth]
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for i, count in enumerate(counts):
            stage = _stage(block, inputs, width * 2**i, count, 1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
            inputs = width * 2**i * block.expansion
        self.channels = {"layer1": width * block.expansion, "layer4": inputs}
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if stride == 8:
            dilate(self.layer3, 2)
        dilate(self.layer4, 32 // stride)
        if weights is not None:
            self.load_state_dict(_pretrained(depth, weights, in_channels, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maps after the first stage, at a quarter of the images' size, and after the last one."""
        low = self.layer1(self._stem(x))
        return low, self.layer4(self.layer3(self.layer2(low)))

    def stages(self) -> list[BackboneStage]:
        """The four layers."""
        layers = [self.layer1, self.layer2, self.layer3, self.layer4]
        widths = [self.channels["layer1"] * 2**i for i in range(len(layers))]
        return block_stages((self.conv1, self.bn1), self._stem, self.conv1.out_channels, layers, widths)

    def _stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)


class DeepLabV3(nn.Module):
    """A dilated ResNet is shared; each task has spatial pyramid pooling (ASPP) and a decoder of its own.

    With ResNet-50 and NYUv2's three tasks it is LibMTL's network, of 71,888,721 parameters. Papers that use LibMTL call
    it DeepLabV3+. LibMTL starts from ImageNet's weights, `weights=IMAGENET1K_V1`, and does not normalise the images.

    Args:
        in_channels: image channels; height and width must be multiples of 8.
        depth: of the ResNet.
        width: channels of its first convolution; pretrained weights need 64. The decoders have four times as many.
        weights: name of torchvision's weights, such as IMAGENET1K_V1; None starts from random ones.
    """

    def __init__(self, in_channels: int, depth: Literal[18, 50] = 50, width: Width = WIDTH, weights: str | None = None):
        super().__init__()
        self.resnet = DilatedResNet(in_channels, depth, width, 8, weights)
        self.layer_groups = _groups()
        self.out_features, self.inner = self.resnet.channels["layer4"], 4 * width

    def decoder(self, task: Task) -> nn.Module:
        """Of a task with maps ASPP with rates 12, 24 and 36, two convolutions, and bilinear enlargement."""
        if not labels_pixels(task):
            return pooled(self.out_features, task.outputs)
        return nn.Sequential(
            ASPP(self.out_features, (12, 24, 36), self.inner),
            *layer(self.inner, self.inner),
            nn.Conv2d(self.inner, task.outputs, 1),
            nn.Upsample(scale_factor=8, mode="bilinear", align_corners=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to features (N, 32 · width, H/8, W/8); 8 · width with ResNet-18.

        Raises:
            ValueError: height or width is no multiple of 8.
        """
        check_size(x, 8, type(self).__name__)
        return self.resnet(x)[1]

    def stages(self) -> list[BackboneStage]:
        """ResNet's four layers."""
        first, *others = self.resnet.stages()
        return [first._replace(start=partial(_checked, first, 8, type(self).__name__)), *others]

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return x


class DeepLabV3Plus(nn.Module):
    """ResNet, spatial pyramid pooling (ASPP) and the early map are shared; each task has a decoder of its own.

    Features are the pooled map beside the early one, (N, 4¾ · width, H/4, W/4). The paper has one task, so that the
    place where sharing ends is ours: before the decoder's 3x3 convolutions.

    Args: as of `DeepLabV3`; height and width must be multiples of 4.
    """

    def __init__(self, in_channels: int, depth: Literal[18, 50] = 50, width: Width = WIDTH, weights: str | None = None):
        super().__init__()
        self.resnet = DilatedResNet(in_channels, depth, width, 16, weights)
        self.inner, early = 4 * width, max(1, 3 * width // 4)  # 256 and 48
        self.pyramid = ASPP(self.resnet.channels["layer4"], (6, 12, 18), self.inner)
        self.early = layer(self.resnet.channels["layer1"], early, 1)
        self.layer_groups = _groups()
        self.out_features = self.inner + early

    def decoder(self, task: Task) -> nn.Module:
        """Of a task with maps three convolutions, and bilinear enlargement."""
        if not labels_pixels(task):
            return pooled(self.out_features, task.outputs)
        return nn.Sequential(
            *layer(self.out_features, self.inner),
            *layer(self.inner, self.inner),
            nn.Conv2d(self.inner, task.outputs, 1),
            nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to features.

        Raises:
            ValueError: height or width is no multiple of 4.
        """
        check_size(x, 4, type(self).__name__)
        low, deep = self.resnet(x)
        return self.finish(deep, [low])

    def stages(self) -> list[BackboneStage]:
        """ResNet's four layers. The map after the first one is kept."""
        first, second, *others = self.resnet.stages()
        first = first._replace(start=partial(_checked, first, 4, type(self).__name__))
        return [first, keeping(second), *others]

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        """The pooled map beside the early one."""
        deep = F.interpolate(self.pyramid(x), kept[0].shape[2:], mode="bilinear", align_corners=False)
        return torch.cat((deep, self.early(kept[0])), 1)


def _checked(stage: BackboneStage, multiple: int, name: str, x: Tensor, kept: list[Tensor]) -> Tensor:
    check_size(x, multiple, name)
    return stage.start(x, kept)


def _groups() -> dict[str, list[str]]:
    """What the gradient microscope calls the ResNet's parts."""
    stages = {f"layer{i}": [f"resnet.layer{i}"] for i in range(1, 5)}
    return {"stem": ["resnet.conv1", "resnet.bn1"], **stages}


def _stage(block: type, inputs: int, planes: int, count: int, stride: int) -> nn.Sequential:
    outputs, shortcut = planes * block.expansion, None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = block(inputs, planes, stride, shortcut)
    return nn.Sequential(first, *(block(outputs, planes) for _ in range(count - 1)))


def dilate(stage: nn.Module, by: int) -> None:
    """Take a stage's stride away, and let its 3x3 convolutions reach as far as before.

    Args:
        by: how much smaller the maps behind the stage would be with all strides in place.
    """
    for m in stage.modules():
        if isinstance(m, nn.Conv2d):
            # Before the stride, the maps were larger by half as much.
            reach = by // 2 if m.stride == (2, 2) else by
            m.stride = (1, 1)
            if m.kernel_size == (3, 3):
                m.dilation = m.padding = (reach, reach)


def _pretrained(depth: int, name: str, in_channels: int, width: int) -> dict[str, Tensor]:
    known = models.get_model_weights(f"resnet{depth}")
    if name not in known.__members__:
        names = ", ".join(known.__members__)
        raise ValueError(f"weights: {name!r}; {names} or null is needed{suggest(name, known.__members__)}")
    if width != WIDTH:
        raise ValueError(f"weights: {name} has width {WIDTH}, not {width}")
    if in_channels != 3:
        raise ValueError(f"weights: {name} is made for 3 image channels, not {in_channels}")
    weights, folder = known[name], Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, a damaged file
        raise SetupError(
            f"arch.weights={name}: not in {folder} and not to be had ({one_line(error)}); put "
            f"{weights.url} there yourself, or set arch.weights=null"
        ) from error
    return {key: value for key, value in state.items() if not key.startswith("fc.")}
