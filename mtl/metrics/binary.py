"""Metrics of tasks that ask one question with the answer yes or no."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtl.metrics.base import Metric, Score


class YesOrNo(Metric):
    """F1 of the positive class, and the share of right answers, in percent. The answer is yes if the logit is above 0.

    F1 = 2 TP / (2 TP + FP + FN), once over the whole split. Without a positive label F1 is undefined: NaN. Some
    libraries give 0 there, which would pull a mean over tasks down.

    Predictions (N, 1) logits, targets (N,) 0 or 1, −100 for a sample without a label. The state counts true and false
    positives and negatives: (4,) int64.
    """

    scores = (Score("f1", "%", may_lack=True), Score("accuracy", "%"))

    def zero(self) -> Tensor:
        return torch.zeros(4, dtype=torch.int64)

    def update(self, state: Tensor, prediction: Tensor, target: Tensor) -> None:
        yes, target = prediction.squeeze(1) > 0, target.long()  # in uint8, −100 would be 156
        is_one, is_zero = target == 1, target == 0
        state += torch.stack([yes & is_one, yes & is_zero, ~yes & is_one, ~yes & is_zero]).sum(1)

    def compute(self, state: Tensor) -> dict[str, float]:
        hits, false, missed, right = state.tolist()
        total = hits + false + missed + right
        return {
            "f1": 100 * 2 * hits / (2 * hits + false + missed) if hits + missed else math.nan,
            "accuracy": 100 * (hits + right) / total if total else math.nan,
        }
