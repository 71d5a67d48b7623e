"""A small fully convolutional network for dense tasks, after Long et al., "Fully Convolutional Networks", CVPR 2015.

It is for first tries and tests on a CPU. No paper reports results for it.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from mtl.archs.maps import check_size, labels_pixels, pooled
from mtl.archs.stages import BackboneStage
from mtl.tasks import Task

STRIDE = 4


class FCN(nn.Module):
    """Five convolutions with batch norm; features are maps (N, 4 · width, H/4, W/4).

    The last two convolutions are dilated by 2 and by 4. So a feature's receptive field is 67 pixels along each axis.

    Args:
        in_channels: image channels; height and width must be multiples of 4.
        width: channels of the first convolution.
    """

    def __init__(self, in_channels: int, width: Annotated[int, Ge(1)] = 16):
        super().__init__()
        self.out_features = 4 * width
        self.stem = _Layer(in_channels, width, stride=2)
        self.down = _Layer(width, 2 * width, stride=2)
        self.deep = _Layer(2 * width, 4 * width)
        self.wide = _Layer(4 * width, 4 * width, dilation=2)
        self.wider = _Layer(4 * width, 4 * width, dilation=4)

    def decoder(self, task: Task) -> nn.Module:
        """Two convolutions and upsampling to the images' size for a dense task; else a mean and a linear layer."""
        if not labels_pixels(task):  # one label for the whole image, such as a class
            return pooled(self.out_features, task.outputs)
        return nn.Sequential(
            nn.Conv2d(self.out_features, self.out_features // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(self.out_features // 2, task.outputs, 1),
            nn.Upsample(scale_factor=STRIDE, mode="bilinear", align_corners=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to maps of features.

        Raises:
            ValueError: height or width is not a multiple of 4.
        """
        x = self.deep(self.down(self._begin(x, [])))
        return self._widen(self._context(x))

    def stages(self) -> list[BackboneStage]:
        """The strided convolutions, the local one with the first dilated one, and the second dilated one."""
        full, half = self.out_features, self.out_features // 2
        return [
            BackboneStage([self.stem, self.down], self._begin, half // 2, self.down, half),
            BackboneStage([self.deep, self.wide], lambda x, kept: self.deep(x), full, self._context, full),
            BackboneStage([self.wider], lambda x, kept: x, full, self._widen, full),
        ]

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return x

    def _begin(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        check_size(x, STRIDE, "FCN")
        return self.stem(x)

    # Shortcuts, so that the dilated layers only add context to local features.
    def _context(self, x: Tensor) -> Tensor:
        return x + self.wide(x)

    def _widen(self, x: Tensor) -> Tensor:
        return x + self.wider(x)


class _Layer(nn.Module):
    """Convolution 3x3, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))
