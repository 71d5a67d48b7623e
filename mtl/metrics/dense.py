"""Metrics of dense tasks: segmentation, depth, surface normals.

Eigen & Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-scale Convolutional
Architecture", ICCV 2015.

There are two ways to combine batches. `pooled` computes a metric once, over all labelled pixels of a split. So do
LibMTL and the papers that use it. `batch_mean` computes it for each batch, and takes the mean over the batches. So does
the code of MTAN, CAGrad, Nash-MTL, FAMO, FairGrad and MTLlib, for depth and normals. The two differ: a pixel counts
more in a batch with fewer labels, and a mean of medians is no median. Segmentation is pooled in all of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from mtl.metrics.base import Metric, Score, precise

BINS = 18_000  # from 0° to 180°, in steps of a hundredth of a degree
Reduction = Literal["pooled", "batch_mean"]


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


class Pooled(Metric):
    """A metric over all labelled pixels. A subclass computes its scores on the state's device, for `BatchMean`."""

    @abstractmethod
    def pixels(self, state: Tensor) -> Tensor:
        """() the number of labelled pixels."""

    @abstractmethod
    def values(self, state: Tensor) -> Tensor:
        """(K,) float64 the scores in their order; anything if there is no labelled pixel. The host must not wait."""

    def compute(self, state: Tensor) -> dict[str, float]:
        names = [score.name for score in self.scores]
        if not self.pixels(state).item():
            return dict.fromkeys(names, math.nan)
        return dict(zip(names, self.values(state).tolist(), strict=True))


class BatchMean(Metric):
    """The mean over batches of another metric's value in each batch. A batch without a labelled pixel is left out.

    The published code would return NaN for such a batch.

    Args:
        metric: the metric of one batch. The state holds the (K,) sums of its scores, and the number of batches.
    """

    def __init__(self, metric: Pooled):
        self.metric, self.scores = metric, metric.scores

    def zero(self) -> Tensor:
        return torch.zeros(len(self.scores) + 1, dtype=torch.float64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        batch = torch.zeros_like(self.metric.zero(), device=state.device)
        self.metric.update(batch, prediction, target)
        labelled = self.metric.pixels(batch) > 0
        state[:-1] += self.metric.values(batch).masked_fill(~labelled, 0.0)
        state[-1] += labelled

    def compute(self, state: Tensor) -> dict[str, float]:
        *sums, batches = state.tolist()
        return {s.name: total / batches if batches else math.nan for s, total in zip(self.scores, sums, strict=True)}


def reduced(metric: Pooled, reduction: Reduction) -> Metric:
    """The metric itself for `pooled`; its mean over batches for `batch_mean`."""
    return metric if reduction == "pooled" else BatchMean(metric)


class DepthErrors(Pooled):
    """Absolute error |d̂ − d| and relative error |d̂ − d| / d of depths: means over the labelled pixels.

    Predictions (N, 1, H, W), depths d (N, H, W), 0 or NaN for a pixel without a label. The relative error is a ratio,
    not a percentage. The state holds both sums and the number of pixels, as float64.
    """

    scores = (Score("abs_err", higher_is_better=False), Score("rel_err", higher_is_better=False))

    def zero(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        known, prediction = target > 0, precise(prediction)  # False for NaN
        depth = target.to(prediction.dtype).masked_fill(~known, 1.0)
        error = (prediction.squeeze(1) - depth).abs().masked_fill(~known, 0.0)
        for total, values in zip(state, (error, error / depth, known), strict=True):
            total += values.sum(dtype=state.dtype)

    def pixels(self, state: Tensor) -> Tensor:
        return state[2]

    def values(self, state: Tensor) -> Tensor:
        return state[:2] / state[2]


class Angles(Pooled):
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
        known, prediction = target.square().sum(-1) > 0, precise(prediction)  # False for NaN
        normal = target.to(prediction.dtype).movedim(-1, 1)
        cosine = (prediction * normal).sum(1)
        sine = torch.linalg.cross(prediction, normal, dim=1).norm(dim=1)
        # atan2 is accurate for small angles. The arc cosine is not, because the cosine hardly changes there.
        degrees = torch.atan2(sine, cosine).rad2deg().masked_fill(cosine == 0, 90.0).nan_to_num(180.0)
        bins = (degrees * 100).long().clamp(0, BINS - 1)
        state.index_add_(0, bins.masked_fill(~known, 0).flatten(), known.flatten().long())

    def pixels(self, state: Tensor) -> Tensor:
        return state.sum()

    def values(self, state: Tensor) -> Tensor:
        state = state.double()  # exact: a count is far below 2⁵³
        middles = (torch.arange(BINS, dtype=torch.float64, device=state.device) + 0.5) / 100
        below = state.cumsum(0)
        pixels = below[-1]
        # The median is the mean of the two pixels in the middle, which are the same one if the number is odd.
        halves = torch.stack([((pixels - 1) / 2).floor(), (pixels / 2).floor()])
        median = middles[torch.searchsorted(below, halves, right=True).clamp(max=BINS - 1)].mean()
        shares = [100 * state[: round(limit * 100)].sum() / pixels for limit in self.limits.values()]
        return torch.stack([(middles @ state) / pixels, median, *shares])
