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
from mtl.metrics.dense import Angles, ConfusionMatrix, DepthErrors
from mtl.tasks.base import Task
from mtl.tasks.labels import wrong_classes
from mtl.views import Directions, Metres, Moves, Pixels

SHORTEST = 1e-3  # a predicted normal is divided by its length, but at least by this


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


@dataclass(frozen=True)
class Depth(Task):
    """L1 loss of each pixel's depth: predictions (N, 1, H, W), targets (N, H, W) in metres.

    A pixel has no label if its depth is 0 (as in MTAN's files) or NaN (as after a crop beyond the image).
    """

    moves: ClassVar[Moves] = Metres()
    allowed = "a map (N, H, W) of depths from 0 is needed, 0 or NaN where a pixel has no label"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (DepthErrors(),)

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
    than 1000, even if a prediction is zero.
    """

    outputs: int = 3

    moves: ClassVar[Moves] = Directions()
    allowed = "a map (N, H, W, 3) of unit vectors is needed, zeros or NaN where a pixel has no label"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (Angles(),)

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
        raise ValueError(f"{task.name} needs a map {wanted} of predictions, but the model predicts the shape {shape}")
