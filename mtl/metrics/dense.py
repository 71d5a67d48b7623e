"""Metrics of dense tasks: segmentation, depth, surface normals.

Eigen & Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-scale Convolutional
Architecture", ICCV 2015. Each metric is computed once, over all labelled pixels of a split. Some repositories print the
mean of batch means instead, which differs: there a pixel counts more in a batch with fewer labels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtl.metrics.base import Metric, Score

BINS = 18_000  # from 0° to 180°, in steps of a hundredth of a degree


class ConfusionMatrix(Metric):
    """Mean intersection over union (mIoU), and the share of pixels with the right class.

    Predictions (N, C, H, W), labels (N, H, W), −100 for a pixel without a label. The mean is over the classes that
    occur in the labels or in the predictions. A class that is only predicted has IoU 0. In MTAN's code, a class that
    occurs nowhere makes the mean NaN. If every class occurs, as in NYUv2's test images, both agree.

    Args:
        classes: number of classes C. The state is a (C, C) int64 matrix, labels by predictions.
    """

    scores = (Score("miou", "%"), Score("pixel_accuracy", "%"))

    def __init__(self, classes: int):
        self.classes = classes

    def zero(self) -> Tensor:
        return torch.zeros(self.classes, self.classes, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        target = target.long()
        known = target != -100
        # Each pair (label, prediction) has one number, the index into the flattened matrix.
        pairs = (target * self.classes + prediction.argmax(1)).masked_fill(~known, 0)
        # bincount would make the host wait for the device, to learn the length of its result.
        state.view(-1).index_add_(0, pairs.flatten(), known.flatten().long())

    def compute(self, state: Tensor) -> dict[str, float]:
        right, pixels = state.diagonal(), state.sum().item()
        union = state.sum(0) + state.sum(1) - right
        ious = (right / union)[union > 0]  # if there is no class at all, the mean below is NaN
        accuracy = 100 * right.sum().item() / pixels if pixels else math.nan
        return {"miou": 100 * ious.mean().item(), "pixel_accuracy": accuracy}


class DepthErrors(Metric):
    """Absolute error |d̂ − d| and relative error |d̂ − d| / d of depths: means over the labelled pixels.

    Predictions (N, 1, H, W), depths d (N, H, W), 0 or NaN for a pixel without a label. The relative error is a ratio,
    not a percentage. The state holds both sums and the number of pixels, as float64.
    """

    scores = (Score("abs_err", higher_is_better=False), Score("rel_err", higher_is_better=False))

    def zero(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        known = target > 0  # False for NaN
        depth = target.to(prediction.dtype).masked_fill(~known, 1.0)
        error = (prediction.squeeze(1) - depth).abs().masked_fill(~known, 0.0)
        for total, values in zip(state, (error, error / depth, known), strict=True):
            total += values.sum(dtype=state.dtype)

    def compute(self, state: Tensor) -> dict[str, float]:
        absolute, relative, pixels = state.tolist()
        if not pixels:
            return {"abs_err": math.nan, "rel_err": math.nan}
        return {"abs_err": absolute / pixels, "rel_err": relative / pixels}


class Angles(Metric):
    """Angle between predicted and true normal, in degrees: mean, median, and shares within 11.25°, 22.5° and 30°.

    Predictions (N, 3, H, W) of any length, labels (N, H, W, 3), zeros or NaN for a pixel without a label. A prediction
    of zeros counts as 90°, a prediction of NaN as 180°.

    The state is an int64 histogram with bins of 0.01°. So mean and median are exact to 0.005°. The shares are exact,
    because 11.25°, 22.5° and 30° are edges of bins.
    """

    scores = (
        Score("mean", "°", higher_is_better=False), Score("median", "°", higher_is_better=False),
        Score("11", "%"), Score("22", "%"), Score("30", "%"),
    )  # fmt: skip
    limits = {"11": 11.25, "22": 22.5, "30": 30.0}

    def zero(self) -> Tensor:
        return torch.zeros(BINS, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        known = target.square().sum(-1) > 0  # False for NaN
        normal = target.to(prediction.dtype).movedim(-1, 1)
        cosine = (prediction * normal).sum(1)
        sine = torch.linalg.cross(prediction, normal, dim=1).norm(dim=1)
        # atan2 is accurate for small angles. The arc cosine is not, because the cosine hardly changes there.
        degrees = torch.atan2(sine, cosine).rad2deg().masked_fill(cosine == 0, 90.0).nan_to_num(180.0)
        bins = (degrees * 100).long().clamp(0, BINS - 1)
        state.index_add_(0, bins.masked_fill(~known, 0).flatten(), known.flatten().long())

    def compute(self, state: Tensor) -> dict[str, float]:
        pixels = int(state.sum())
        if not pixels:
            return {score.name: math.nan for score in self.scores}
        middles, below = (torch.arange(BINS, dtype=torch.float64) + 0.5) / 100, state.cumsum(0)
        # The median is the mean of the two pixels in the middle, which are the same one if the number is odd.
        halves = torch.tensor([(pixels - 1) // 2, pixels // 2], dtype=below.dtype)
        median = middles[torch.searchsorted(below, halves, right=True)].mean().item()
        shares = {name: 100 * int(state[: round(limit * 100)].sum()) / pixels for name, limit in self.limits.items()}
        return {"mean": (middles @ state.double()).item() / pixels, "median": median, **shares}
