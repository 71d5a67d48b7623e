"""The golden runs' network and data: a small smooth network; digits and rooms, without some labels or some tasks."""

from torch import Tensor, nn

from mtl.data.digits import Digits
from mtl.data.rooms import Rooms


class Net(nn.Module):
    """Two convolutions and batch norm, with tanh: rounding could decide on which side of a ReLU's kink a value is."""

    out_features = 8

    def __init__(self, in_channels: int):
        super().__init__()
        self.wide = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, self.out_features, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.deep(self.norm(self.wide(images)).tanh()).tanh().mean((2, 3))


class Missing(Digits):
    """Every third label is missing. Nearly all labels of `odd` are missing, so that some batches have none."""

    def load(self):
        splits = super().load()
        train, test = (dict(splits[name].columns) for name in ("train", "test"))
        train["digit"][::3], train["ink"][1::3] = -100, float("nan")
        train["odd"][:22] = -100
        test["digit"][::3], test["odd"][1::3], test["ink"][2::3] = -100, -100, float("nan")
        return splits


class Classes(Missing):
    """Only the two classification tasks, for methods that need accuracies (DTP)."""

    tasks = Digits.tasks[:2]


class Alone(Digits):
    """Only one task: nothing to balance, but every method must still work."""

    tasks = Digits.tasks[:1]


class Pair(Rooms):
    """Classes and depth."""

    tasks = Rooms().tasks[:2]
