"""U-Net: Ronneberger, Fischer & Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.

With batch norm, and with padding, so that the maps have the images' size. Both are usual today.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from mtl.archs.maps import check_least, labels_pixels, layer, pooled
from mtl.archs.stages import BackboneStage
from mtl.tasks import Task

DEPTH = 4  # poolings


class UNet(nn.Module):
    """Four poolings, and four steps back up that also see the maps from before; features are maps (N, width, H, W).

    Args:
        in_channels: image channels; images of at least 16x16.
        width: channels of the first convolution. Each pooling doubles them.
    """

    def __init__(self, in_channels: int, width: Annotated[int, Ge(1)] = 64):
        super().__init__()
        self.out_features = width
        widths = [width * 2**i for i in range(DEPTH + 1)]
        self.down = nn.ModuleList(_twice(n, c) for n, c in zip([in_channels, *widths], widths, strict=False))
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, 2) for c in widths[:-1])
        self.up = nn.ModuleList(_twice(2 * c, c) for c in widths[:-1])
        self.layer_groups = {
            **{f"down{i + 1}": [f"down.{i}"] for i in range(DEPTH + 1)},
            **{f"up{i + 1}": [f"raise_.{i}", f"up.{i}"] for i in reversed(range(DEPTH))},
        }
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")

    def decoder(self, task: Task) -> nn.Module:
        """Of a task with maps a 1x1 convolution, as in the paper."""
        if not labels_pixels(task):
            return pooled(self.out_features, task.outputs)
        return nn.Conv2d(self.out_features, task.outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to features.

        Raises:
            ValueError: height or width is less than 16.
        """
        check_least(x, 2**DEPTH, "UNet")
        before = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2, 2) if i else x)
            before.append(x)
        for i in reversed(range(DEPTH)):
            larger = self.raise_[i](x, output_size=before[i].shape[2:])  # which may be odd
            x = self.up[i](torch.cat((before[i], larger), 1))
        return x

    def stages(self) -> list[BackboneStage]:
        """The levels downwards, then those upwards. A level ends before its pooling, and its last map is kept."""
        width, found = self.out_features, []
        for i, block in enumerate(self.down):
            found.append(BackboneStage([block], partial(self._descend, i), width * 2**i, block[1], width * 2**i))
        for i in reversed(range(DEPTH)):
            block, modules = self.up[i], [self.raise_[i], self.up[i]]
            found.append(BackboneStage(modules, partial(self._ascend, i), width * 2**i, block[1], width * 2**i))
        return found

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return x

    def _descend(self, i: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        if i:
            kept.append(x)
            x = F.max_pool2d(x, 2, 2)
        else:
            check_least(x, 2**DEPTH, "UNet")
        return self.down[i][0](x)

    def _ascend(self, i: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        before = kept.pop()
        return self.up[i][0](torch.cat((before, self.raise_[i](x, output_size=before.shape[2:])), 1))


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(layer(inputs, outputs), layer(outputs, outputs))
