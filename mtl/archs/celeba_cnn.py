"""The CNN that FAMO, FairGrad and MTLlib train on CelebA (Liu et al., "FAMO", NeurIPS 2023): seven 3x3 convolutions
with batch norm, in four stages of 64, 128, 256 and 512 channels, global average pooling, and two layers of 512.

5,176,640 shared parameters; with 40 heads of 513 it has 5,197,160. About 0.7 GMAC at 64x64.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

CHANNELS = (64, 0, 128, 128, 0, 256, 256, 0, 512, 512)  # 0: max pooling of 2x2


class CelebACNN(nn.Module):
    """The features are 512 numbers for each image.

    Args:
        in_channels: image channels.
    """

    out_features = 512

    def __init__(self, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width in CHANNELS:
            layers += _convolution(in_channels, width) if width else [nn.MaxPool2d(2)]
            in_channels = width or in_channels
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Sequential(*_linear(512), *_linear(512))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convolutions(x).mean((2, 3)))


def _convolution(inputs: int, outputs: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU(inplace=True)


def _linear(width: int) -> Iterator[nn.Module]:
    yield nn.Linear(width, width, bias=False)
    yield nn.BatchNorm1d(width)
    yield nn.ReLU(inplace=True)
