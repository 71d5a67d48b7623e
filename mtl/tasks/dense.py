"""Tasks with a map of labels for each image: classes, depth, surface normals.

Losses and masks follow Liu et al., "End-to-End Multi-Task Learning with Attention" (MTAN), CVPR 2019. A loss is the
mean over all labelled pixels of a batch. A pixel without a label has loss 0 and gradient 0, even if its prediction is
NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric
from mtl.metrics.dense import Angles, ConfusionMatrix, DepthErrors, Reduction, reduced
from mtl.tasks.base import Task
from mtl.tasks.labels import wrong_classes
from mtl.views import Directions, Metres, Moves, Pixels

SHORTEST = 1e-3  # a predicted normal is divided by its length, but at least by this

# Colours of classes: Tableau's ten, then the same ten lighter. None of them is black, the colour of "no label".
CLASSES = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194),
    (127, 127, 127), (188, 189, 34), (23, 190, 207), (174, 199, 232), (255, 187, 120), (152, 223, 138), (255, 152, 150),
    (197, 176, 213), (196, 156, 148), (247, 182, 210), (199, 199, 199), (219, 219, 141), (158, 218, 229),
)  # fmt: skip
# Nine points of matplotlib's viridis, from near (dark) to far (yellow): equal steps of depth look equally large.
DEPTHS = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class Segmentation(Task):
    """Segmentation: cross-entropy of each pixel's class, over `outputs` classes.

    Predictions (N, outputs, H, W), targets (N, H, W) of any integer type. −100 marks a pixel without a label; int8 can
    hold it, in one byte per pixel.
    """

    moves: ClassVar[Moves] = Pixels()

    @property
    def metrics(self) -> Sequence[Metric]:
        return (ConfusionMatrix(self.outputs),)

    @property
    def allowed(self) -> str:
        return f"a map (N, H, W) of classes from 0 to {self.outputs - 1} is needed, -100 where a pixel has no label"

    def wrong(self, target: Tensor) -> Tensor:
        _check_labels(target, 3)
        return wrong_classes(target, self.outputs)

    def units(self, target: Tensor) -> Tensor:
        return _count(target.long() != -100)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        _check_prediction(self, prediction, target)
        target = target.long()
        # Unlabelled pixels are filled before the loss. If the loss were masked afterwards, a NaN prediction would still
        # give a NaN gradient, because 0 times NaN is NaN.
        known = prediction.masked_fill((target == -100)[:, None], 0.0)
        return F.cross_entropy(known, target, ignore_index=-100, reduction="none").sum((1, 2))

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The likeliest class of each pixel and its probability, (N, H, W) each."""
        probability, likeliest = prediction.softmax(1).max(1)
        return {"class": likeliest, "probability": probability}

    def draw(self, images: Tensor | None, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """One colour for each class; black without a label, or where a prediction is NaN."""
        target = target.long()
        likeliest = prediction.argmax(1).masked_fill(prediction.isnan().any(1), -100)
        table = class_colours(self.outputs).to(target.device)
        return tuple(_blank(table[c.clamp(min=0)], c == -100) for c in (target, likeliest))


@dataclass(frozen=True)
class Depth(Task):
    """L1 loss of each pixel's depth: predictions (N, 1, H, W), targets (N, H, W) in metres.

    A pixel has no label if its depth is 0 (as in MTAN's files) or NaN (as after a crop beyond the image).
    `reduction` says how the metrics combine batches, see `mtl.metrics.dense`.
    """

    reduction: Reduction = "pooled"

    moves: ClassVar[Moves] = Metres()
    allowed = "a map (N, H, W) of depths from 0 is needed, 0 or NaN where a pixel has no label"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (reduced(DepthErrors(), self.reduction),)

    def wrong(self, target: Tensor) -> Tensor:
        _check_labels(target, 3)
        values = target.float()  # losses are computed in float32, where 1e300 is infinite
        return (values < 0) | values.isinf()

    def units(self, target: Tensor) -> Tensor:
        return _count(target > 0)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        _check_prediction(self, prediction, target)
        error = prediction.squeeze(1) - target.to(prediction.dtype)
        return error.masked_fill(~(target > 0), 0.0).abs().sum((1, 2))

    def missing(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The depth of each pixel in metres, (N, H, W)."""
        return {"metres": prediction.squeeze(1)}

    def draw(self, images: Tensor | None, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Colours from the nearest to the farthest true depth of these samples; black without a label.

        A predicted depth out of this range has the colour of its end.
        """
        target, depth = target.float(), prediction.squeeze(1).float()
        known = target > 0
        # Without any label, the range is the predictions' own.
        range_ = target[known] if known.any() else depth[depth.isfinite()]
        low, high = (range_.min(), range_.max()) if len(range_) else (depth.new_tensor(0.0), depth.new_tensor(1.0))
        wrong = ~known, depth.isnan()
        shares = ((d - low) / (high - low).clamp(min=1e-12) for d in (target, depth))
        return tuple(_blank(_depth_colours(s), w) for s, w in zip(shares, wrong, strict=True))


@dataclass(frozen=True)
class Disparity(Depth):
    """`Depth` of a map that grows where things come nearer: multiplied by s where a crop is shown s times larger."""

    moves: ClassVar[Moves] = Metres(inverse=True)


@dataclass(frozen=True)
class Normals(Task):
    """Surface normals: 1 − cos of the angle between the predicted and the true normal of each pixel.

    Predictions (N, 3, H, W) may have any length and are normalised here. Targets (N, H, W, 3) are unit vectors: x along
    the columns, y along the rows, z. A pixel has no label if its normal is (0, 0, 0), as in MTAN's files, or NaN.
    Labels that interpolation has shortened are not normalised, as in MTAN.

    Different from MTAN's code: a prediction is divided by its length, but at least by 1e-3. So no gradient is longer
    than 1000, even if a prediction is zero. `reduction` says how the metrics combine batches, see `mtl.metrics.dense`.
    """

    outputs: int = 3
    reduction: Reduction = "pooled"

    moves: ClassVar[Moves] = Directions()
    allowed = "a map (N, H, W, 3) of unit vectors is needed, zeros or NaN where a pixel has no label"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (reduced(Angles(), self.reduction),)

    def wrong(self, target: Tensor) -> Tensor:
        _check_labels(target, 4)
        if target.shape[3] != 3:
            raise ValueError(f"shape {tuple(target.shape)}")
        # Three NaNs are a missing label. A NaN in one component only is wrong: `not <=` is True for it.
        too_long = ~(target.float().norm(dim=3) <= 1.01) & ~target.isnan().all(3)
        return too_long[..., None].expand(target.shape)

    def units(self, target: Tensor) -> Tensor:
        return _count(_directed(target))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        _check_prediction(self, prediction, target)
        unknown = ~_directed(target)
        normal = target.to(prediction.dtype).movedim(-1, 1).masked_fill(unknown[:, None], 0.0)
        direction = F.normalize(prediction.masked_fill(unknown[:, None], 0.0), dim=1, eps=SHORTEST)
        return (1 - (direction * normal).sum(1)).masked_fill(unknown, 0.0).sum((1, 2))

    def missing(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """The unit normal of each pixel, (N, H, W, 3), as labels are stored."""
        return {"normal": F.normalize(prediction, dim=1, eps=SHORTEST).movedim(1, -1)}

    def draw(self, images: Tensor | None, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The usual colours: x, y and z from −1 to 1 as red, green and blue from 0 to 255; black without a label."""
        predicted = self.answers(prediction.float())["normal"]
        maps = (target.float(), ~_directed(target)), (predicted, ~_directed(predicted))
        return tuple(_blank(((n.nan_to_num() + 1) * 127.5).clamp(0, 255), unknown) for n, unknown in maps)


def class_colours(classes: int) -> Tensor:
    """(classes, 3) uint8. Beyond the table the colours are PASCAL VOC's, made from the bits of the class."""
    colours = list(CLASSES[:classes])
    for number in range(len(colours), classes):
        colours.append(tuple(sum((number >> 3 * i + c & 1) << 7 - i for i in range(8)) for c in range(3)))
    return torch.tensor(colours, dtype=torch.uint8)


def _depth_colours(share: Tensor) -> Tensor:
    """(…, 3) colours of numbers between 0 and 1."""
    table = torch.tensor(DEPTHS, dtype=torch.float32, device=share.device)
    place = share.nan_to_num().clamp(0, 1) * (len(DEPTHS) - 1)
    left = place.long().clamp(max=len(DEPTHS) - 2)
    return torch.lerp(table[left], table[left + 1], (place - left)[..., None])


def _blank(colours: Tensor, where: Tensor) -> Tensor:
    """uint8 colours (N, H, W, 3), black where there is nothing to show."""
    return colours.round().to(torch.uint8).masked_fill(where[..., None], 0)


def _directed(normals: Tensor) -> Tensor:
    return normals.square().sum(-1) > 0  # False for NaN


def _count(known: Tensor) -> Tensor:
    """(N,) the number of True entries of each sample, from (N, …)."""
    return known.flatten(1).sum(1)


def _check_labels(target: Tensor, dimensions: int) -> None:
    if target.dim() != dimensions:
        hint = "; drop the last dimension with squeeze(-1)" if target.shape[dimensions:] == (1,) else ""
        raise ValueError(f"shape {tuple(target.shape)}{hint}")


def _check_prediction(task: Task, prediction: Tensor, target: Tensor) -> None:
    wanted = (len(target), task.outputs, *target.shape[1:3])
    if prediction.shape != wanted:
        shape = tuple(prediction.shape)
        cure = "" if len(shape) > 2 else "; networks with maps are arch=fcn, unet, segnet, deeplabv3 and torchvision"
        raise ValueError(
            f"{task.name} needs a map {wanted} of predictions, but the model predicts the shape {shape}{cure}"
        )
