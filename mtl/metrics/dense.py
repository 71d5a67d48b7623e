"""Metrics of maps, pooled over all labelled pixels of a split: classes, depth, directions.

Eigen & Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-scale Convolutional
Architecture", ICCV 2015. Means of batch means, which some repositories print, are other numbers: here a pixel counts
the same in every batch, and the median is that of all pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtl.metrics.base import Metric, Score

BINS = 18_000  # of a hundredth of a degree


class ConfusionMatrix(Metric):
    """Mean intersection over union, and share of pixels with the right class. Predictions (N, C, H, W), −100: no label.

    The mean is over the classes that some pixel is labelled with or predicted as; a class that is only predicted counts
    0. MTAN's code has no number there: a class that occurs nowhere makes its mean NaN. Where every class occurs, as in
    NYUv2's test images, both agree.

    Args:
        classes: C. The state is (C, C) int64, labels by predictions.
    """

    scores = (Score("miou", "%"), Score("pixel_accuracy", "%"))

    def __init__(self, classes: int):
        self.classes = classes

    def zero(self) -> Tensor:
        return torch.zeros(self.classes, self.classes, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        target = target.long()
        known = target != -100
        pairs = (target * self.classes + prediction.argmax(1)).masked_fill(~known, 0)
        # Not bincount, for whose length the host waits.
        state.view(-1).index_add_(0, pairs.flatten(), known.flatten().long())

    def compute(self, state: Tensor) -> dict[str, float]:
        right, pixels = state.diagonal(), state.sum().item()
        union = state.sum(0) + state.sum(1) - right
        ious = (right / union)[union > 0]  # of nothing, the mean is NaN
        accuracy = 100 * right.sum().item() / pixels if pixels else math.nan
        return {"miou": 100 * ious.mean().item(), "pixel_accuracy": accuracy}


class DepthErrors(Metric):
    """Mean |d̂ − d| and mean |d̂ − d| / d. Predictions (N, 1, H, W), depths d (N, H, W), 0 or NaN: no label.

    The relative error is a ratio, not a percentage. The state holds both sums and the number of pixels, as float64.
    """

    scores = (Score("abs_err", higher_is_better=False), Score("rel_err", higher_is_better=False))

    def zero(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        known = target > 0  # not so of NaN
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
    """Angle between prediction and label in degrees: mean, median, and shares within 11.25°, 22.5° and 30°.

    Predictions (N, 3, H, W) of any length, labels (N, H, W, 3); zeros or NaN: no label. A prediction of zeros is 90°
    off, one of NaN 180°. The state is an int64 histogram of hundredths of a degree: mean and median are exact to
    0.005°, and the shares' limits lie between two bins.
    """

    scores = (
        Score("mean", "°", higher_is_better=False), Score("median", "°", higher_is_better=False),
        Score("11", "%"), Score("22", "%"), Score("30", "%"),
    )  # fmt: skip
    limits = {"11": 11.25, "22": 22.5, "30": 30.0}

    def zero(self) -> Tensor:
        return torch.zeros(BINS, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        known = target.square().sum(-1) > 0  # not so of NaN
        normal = target.to(prediction.dtype).movedim(-1, 1)
        cosine = (prediction * normal).sum(1)
        sine = torch.linalg.cross(prediction, normal, dim=1).norm(dim=1)
        # Unlike the arc cosine, it is exact where the angle is small.
        degrees = torch.atan2(sine, cosine).rad2deg().masked_fill(cosine == 0, 90.0).nan_to_num(180.0)
        bins = (degrees * 100).long().clamp(0, BINS - 1)
        state.index_add_(0, bins.masked_fill(~known, 0).flatten(), known.flatten().long())

    def compute(self, state: Tensor) -> dict[str, float]:
        pixels = int(state.sum())
        if not pixels:
            return {score.name: math.nan for score in self.scores}
        middles, below = (torch.arange(BINS, dtype=torch.float64) + 0.5) / 100, state.cumsum(0)
        # The two pixels in the middle; the same one where their number is odd.
        halves = torch.tensor([(pixels - 1) // 2, pixels // 2], dtype=below.dtype)
        median = middles[torch.searchsorted(below, halves, right=True)].mean().item()
        shares = {name: 100 * int(state[: round(limit * 100)].sum()) / pixels for name, limit in self.limits.items()}
        return {"mean": (middles @ state.double()).item() / pixels, "median": median, **shares}
