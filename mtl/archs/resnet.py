"""ResNets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, and the wide form of
Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016.

ResNet-20/32/44/56/110 have three stages of 16, 32 and 64 channels (section 4.2 of He et al.). Their shortcuts are
projections (1x1 convolution and batch norm), because most published CIFAR-100 results have these. ResNet-20 has 0.28 M
parameters and 41 MMAC, ResNet-56 0.86 M and 126 MMAC. ResNet-18 is the ImageNet net with a 3x3 stem and no pooling.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from mtl.archs.stages import BackboneStage, block_stages

Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Lt(1)]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _initialise(module: nn.Module) -> None:
    """He initialisation by fan-out, as in the paper's code."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def _layers(blocks: int, each: int) -> dict[str, list[str]]:
    """{"layer1": ["blocks.0", …], …}: the gradient microscope's layer groups, one for each stage of `each` blocks."""
    stages = range(blocks // each)
    return {f"layer{i + 1}": [f"blocks.{k}" for k in range(i * each, (i + 1) * each)] for i in stages}


class BasicBlock(nn.Module):
    """conv–BN–ReLU–conv–BN plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """ResNet for small images. The features are the channel means of the last stage.

    Args:
        in_channels: image channels.
        depth: 18 (64–512 channels, four stages) or one of 20, 32, 44, 56, 110 (16–64 channels, three stages).
    """

    def __init__(self, in_channels: int, depth: Literal[18, 20, 32, 44, 56, 110]):
        super().__init__()
        # depth = 6 n + 2: n blocks of two convolutions in each of three stages, a stem, and the linear head.
        widths, blocks = ((64, 128, 256, 512), 2) if depth == 18 else ((16, 32, 64), (depth - 2) // 6)
        self.conv, self.bn = _conv3x3(in_channels, widths[0]), nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for i, width in enumerate(widths):
            for block in range(blocks):
                # The first block of each later stage halves height and width.
                stages.append(BasicBlock(inputs, width, stride=2 if i > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*stages)
        self.layer_groups = {"stem": ["conv", "bn"], **_layers(len(stages), blocks)}
        self.out_features, self.widths = inputs, widths
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self._stem(x)).mean((2, 3))

    def stages(self) -> list[BackboneStage]:
        """One for each width."""
        each = len(self.blocks) // len(self.widths)
        layers = [self.blocks[i : i + each] for i in range(0, len(self.blocks), each)]
        return block_stages((self.conv, self.bn), self._stem, self.widths[0], layers, self.widths)

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return x.mean((2, 3))

    def _stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class PreActivationBlock(nn.Module):
    """BN–ReLU–conv, dropout, BN–ReLU–conv plus the shortcut (Wide ResNet's block)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv3x3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        # Where the width changes, the shortcut starts from the activated input, as in the authors' code.
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(F.relu(self.bn2(self.conv1(y)), inplace=True))
        return self.conv2(y) + shortcut


class WideResNet(nn.Module):
    """Wide ResNet; depth 28 and width 10 is WRN-28-10 (36.5 M parameters).

    Args:
        in_channels: image channels.
        depth: 6n + 4.
        width: multiple k of the 16, 32 and 64 channels.
        dropout: dropout rate between the two convolutions of a block; the paper uses 0 or 0.3.

    Raises:
        ValueError: depth is not 6n + 4.
    """

    def __init__(self, in_channels: int, depth: int = 28, width: Positive = 10, dropout: Share = 0.0):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: {depth} is not 6n + 4 (10, 16, 22, 28, 34, 40, …)")
        self.conv = _conv3x3(in_channels, 16)
        blocks, inputs = [], 16
        self.widths = (16 * width, 32 * width, 64 * width)
        for i, channels in enumerate(self.widths):
            for block in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(inputs, channels, 2 if i > 0 and block == 0 else 1, dropout))
                inputs = channels
        self.blocks = nn.Sequential(*blocks)
        self.layer_groups = {"stem": ["conv"], **_layers(len(blocks), (depth - 4) // 6)}
        self.bn = nn.BatchNorm2d(inputs)
        self.out_features = inputs
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.blocks(self.conv(x)), [])

    def stages(self) -> list[BackboneStage]:
        """One for each width."""
        each = len(self.blocks) // len(self.widths)
        layers = [self.blocks[i : i + each] for i in range(0, len(self.blocks), each)]
        return block_stages((self.conv,), self.conv, 16, layers, self.widths)

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return F.relu(self.bn(x), inplace=True).mean((2, 3))
