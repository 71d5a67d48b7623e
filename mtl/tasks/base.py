"""A task: a name, a head width, a criterion, metrics, and the rule that tells which samples carry its label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl.metrics.task import Metric


@dataclass(frozen=True)
class Task(ABC):
    """Base of every task.

    Args:
        name: key in configs, logs and tables.
        outputs: width of the task's head.
        partial: has no effect any more, and is accepted for the sake of older code: samples without a label are found
            in every batch, and every mean is over the labelled samples only.
    """

    name: str
    outputs: int
    partial: bool = False

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The first one is the task's main figure."""

    def head(self, features: int) -> nn.Module:
        """What turns features (N, F) into this task's prediction (N, outputs); may have no parameters.

        Raises:
            ValueError: no prediction of this task can be made from so many features.
        """
        return nn.Linear(features, self.outputs)

    @property
    def allowed(self) -> str:
        """What a label may be, in the words of a message."""
        return "a label must be a finite number"

    def check(self, target: Tensor) -> None:
        """Look once, when the data is loaded, at all labels (N, …) of a split.

        Raises:
            ValueError: this task cannot be trained on them; the message names the first wrong sample and its value.
        """
        labelled = self.labelled(target)
        if target.is_complex():
            raise ValueError(f"dtype {_name(target.dtype)}; {self.allowed}")
        if not isinstance(labelled, Tensor) or labelled.dtype != torch.bool:
            raise ValueError(f"{type(self).__name__}.labelled must return a bool for each sample, not {labelled!r:.60}")
        if labelled.shape != target.shape[:1]:
            size, shape = len(target), tuple(target.shape)
            hint = "; drop the second dimension with squeeze(1)" if shape[1:] == (1,) else ""
            raise ValueError(f"shape {shape}; one label for each sample has the shape ({size},){hint}")
        if target.ndim == 1 and target.is_floating_point():
            # As float32, in which losses are computed: 1e300 is infinite there.
            self.refuse(labelled & ~target.float().isfinite(), target)

    def refuse(self, wrong: Tensor, target: Tensor) -> None:
        """Raises:
        ValueError: `wrong` (bool, the shape of `target`) marks some label.
        """
        if count := int(wrong.sum()):
            first = tuple(wrong.nonzero()[0].tolist())
            others = f" ({count} labels are wrong)" if count > 1 else ""
            raise ValueError(f"sample {first[0]} has the label {target[first].item()}{others}; {self.allowed}")

    @abstractmethod
    def labelled(self, target: Tensor) -> Tensor:
        """(N,) bool: which samples carry this task's label."""

    @abstractmethod
    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        """(N,) loss of each sample; 0 where there is no label."""

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """() mean loss over the labelled samples; a differentiable 0 when there is none.

        Raises:
            ValueError: the criterion does not return one loss for each sample.
        """
        losses = self.criterion(prediction, target)
        if losses.shape != target.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}.criterion returned the shape {tuple(losses.shape)} for a "
                f"prediction {tuple(prediction.shape)}; one loss for each sample has the shape ({len(target)},)"
            )
        # A factor of exactly 1 where all samples are labelled: then this is losses.mean(), bit for bit.
        return losses.mean() * (len(target) / self.count(target).clamp(min=1).to(losses.dtype))

    def count(self, target: Tensor) -> Tensor:
        """() number of labelled samples, on the device."""
        return self.labelled(target).sum()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
