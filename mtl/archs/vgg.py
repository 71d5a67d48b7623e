"""VGG-16 with batch norm in its CIFAR form: Simonyan & Zisserman, ICLR 2015, with two 512-wide fully connected layers.

15.3 M parameters and 314 MMAC; the 34 M net that goes by the same name elsewhere has 4096-wide layers.
"""

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers


class VGG16BN(nn.Module):
    """Thirteen convolutions and two fully connected layers; the third, the classifier, is the task's head.

    Args:
        in_channels: image channels; images of 32x32 only (five poolings leave 1x1).
        dropout: before each fully connected layer's successor, as in the original.
    """

    out_features = 512

    def __init__(self, in_channels: int, dropout: Annotated[float, Ge(0), Lt(1)] = 0.5):
        super().__init__()
        self.features = make_layers(cfgs["D"], batch_norm=True)
        if in_channels != 3:
            self.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        block, self.layer_groups = 1, {}  # for the gradient microscope: a pooling ends a block
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
