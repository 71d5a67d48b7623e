"""VGG-16 with batch norm for CIFAR: Simonyan & Zisserman, ICLR 2015, with two fully connected layers of width 512.

It has 15.3 M parameters and 314 MMAC. Elsewhere, a net of the same name has layers of width 4096 and 34 M parameters.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from mtl.archs.stages import BackboneStage


class VGG16BN(nn.Module):
    """Thirteen convolutions and two fully connected layers. The original's third one, the classifier, is a task's head.

    Args:
        in_channels: image channels. Images must be 32x32, because five poolings leave 1x1.
        dropout: dropout rate after each fully connected layer, as in the original.
    """

    out_features = 512

    def __init__(self, in_channels: int, dropout: Annotated[float, Ge(0), Lt(1)] = 0.5):
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=True)
        if in_channels != 3:  # torchvision's function makes images with three channels only
            self.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        block, self.layer_groups = 1, {}  # the gradient microscope's layer groups: a pooling ends a block
        for i, m in enumerate(self.features):
            self.layer_groups.setdefault(f"block{block}", []).append(f"features.{i}")
            block += isinstance(m, nn.MaxPool2d)
        self.hidden = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(dropout),
        )  # fmt: skip
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.features(x).flatten(1))

    def stages(self) -> list[BackboneStage]:
        """The five blocks. A stage ends before the pooling, with which the next one starts."""
        ends = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)]
        found = []
        for begin, end in zip([0, *(i + 1 for i in ends)], ends, strict=False):
            # A pooling, and one convolution with its batch norm and ReLU.
            start, rest = self.features[max(0, begin - 1) : begin + 3], self.features[begin + 3 : end]
            channels = self.features[begin].out_channels
            found.append(BackboneStage([start, rest], _first(start), channels, rest, channels))
        return found

    def finish(self, x: Tensor, kept: list[Tensor]) -> Tensor:
        return self.hidden(F.max_pool2d(x, 2, 2).flatten(1))


def _first(layers: nn.Module) -> Callable[[Tensor, list[Any]], Tensor]:
    return lambda x, kept: layers(x)
