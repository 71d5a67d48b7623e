"""Tasks that ask one question with the answer yes or no, such as an attribute of a face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mtl.metrics.base import Metric
from mtl.metrics.binary import YesOrNo
from mtl.tasks.base import Task
from mtl.tasks.labels import wrong_classes


@dataclass(frozen=True)
class Binary(Task):
    """Binary cross-entropy of one logit: predictions (N, 1), targets (N,) 0 or 1, −100 for no label."""

    allowed = "0 (no), 1 (yes) or -100 (no label) is needed"

    @property
    def metrics(self) -> Sequence[Metric]:
        return (YesOrNo(),)

    def wrong(self, target: Tensor) -> Tensor:
        return wrong_classes(target, 2)

    def units(self, target: Tensor) -> Tensor:
        return (target.long() != -100).long()  # converted first: in uint8, −100 would be 156

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != (len(target), 1):
            shape = tuple(prediction.shape)
            raise ValueError(f"{self.name} is one logit for each sample, but the model predicts the shape {shape}")
        # Filled before the loss, because a NaN that is masked afterwards would come back in the gradient.
        missing = target.long() == -100
        logit = prediction.squeeze(1).masked_fill(missing, 0.0)
        loss = F.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none")
        return loss.masked_fill(missing, 0.0)

    def answers(self, prediction: Tensor) -> dict[str, Tensor]:
        """Yes (1) or no (0), and the probability of yes, (N,) each."""
        logit = prediction.squeeze(1)
        return {"class": (logit > 0).long(), "probability": logit.sigmoid()}
