"""What can be varied of a step whatever the strategy, and what a step reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from mtl.losses.arguments import choose
from mtl.losses.base import JacobianAggregation, LossWeighting, Strategy, count
from mtl.losses.hooks import defines

TINY = 1e-12  # losses are held above it where transform=log takes their logarithm


@dataclass(frozen=True)
class Switches:
    """What can be varied of a step whatever the strategy.

    Args:
        gradients: of what per-task gradients are taken: the shared parameters, or the features between backbone and
            heads (the upper bound of MGDA-UB, Sener & Koltun 2018: one backward pass through the backbone instead
            of T), or whichever the method is made for.
        transform: log runs the strategy on log-losses, which makes any of them blind to the losses' scales.
        heads: what the heads receive under a gradient method: the gradient of their own loss, that gradient times
            the task's weight, or whichever of the two the method's paper says.
        scale: how long the step is.

            ======  ==========================================================================================
            paper   as published
            sum     the absolute values of the weights add up to the number of tasks, as with equal weighting
            norm    the shared gradient is as long as with equal weighting; the heads' gradients stay
            ======  ==========================================================================================

            With gradients=features, the lengths of the features' gradients count.
    """

    gradients: Literal["paper", "parameters", "features"] = "paper"
    transform: Literal["none", "log"] = "none"
    heads: Literal["paper", "own", "weighted"] = "paper"
    scale: Literal["paper", "sum", "norm"] = "paper"

    def __post_init__(self) -> None:
        for name, options in get_type_hints(type(self)).items():
            choose(name, getattr(self, name), options)

    def transformed(self, losses: list[Tensor]) -> list[Tensor]:
        """The losses as the strategy sees them."""
        if self.transform == "none":
            return losses
        # A loss that is exactly 0 has no logarithm; clamped, it also has no gradient any more.
        return [x.clamp(min=TINY).log() for x in losses]

    def of_features(self, strategy: Strategy) -> bool:
        """Whether this strategy's step takes its per-task gradients of the features."""
        return (strategy.gradients if self.gradients == "paper" else self.gradients) == "features"

    def combines(self, strategy: Strategy, per_task: bool) -> bool:
        """Whether a step takes the gradients of the tasks one by one."""
        return not isinstance(strategy, LossWeighting) or self.scale == "norm" or self.heads == "own" or per_task

    def factor(self, strategy: Strategy, norm: Tensor, equal: Tensor) -> Tensor | None:
        """() what scale=norm or the method's own clip multiplies the shared gradient by.

        Args:
            norm: () of the shared gradient.
            equal: () norm under equal weighting.
        """
        tiny = torch.finfo(norm.dtype).tiny
        if self.scale == "norm":
            return equal / norm.clamp(min=tiny)
        if self.scale == "paper" and strategy.max_norm is not None:
            return (strategy.max_norm / norm.clamp(min=tiny)).clamp(max=1.0)
        return None

    def check(self, strategy: Strategy) -> None:
        """Raises:
        ValueError: this strategy cannot be switched like that.
        """
        name = type(strategy).__name__
        if strategy.gradients == "features" and self.gradients == "parameters":
            raise ValueError(f"gradients=parameters: {name} is defined on the gradients of features only; drop it")
        if isinstance(strategy, LossWeighting) and self.gradients == "features":
            raise ValueError(f"gradients=features: {name} weighs losses and takes no per-task gradients; drop it")
        merges = isinstance(strategy, JacobianAggregation) and not strategy.has_weights
        if merges and self.heads == "weighted":
            raise ValueError(f"heads=weighted: {name} merges gradients without task weights; use heads=own")
        if merges and self.scale == "sum":
            raise ValueError(f"scale=sum: {name} merges gradients without task weights; use scale=norm or paper")
        if self.transform == "log" and strategy.needs_positive:
            raise ValueError(f"transform=log: {name} needs positive losses, which log-losses are not; drop it")
        if strategy.lazy and self.gradients == "features":
            raise ValueError(f"gradients=features: {name} averages the parameters' gradients over batches; drop it")
        if self.scale == "norm" and defines(strategy, "regulariser"):
            raise ValueError(
                f"scale=norm: {name} adds a regulariser, which no scale of the losses' gradient bounds; drop it"
            )
        if strategy.samples > 1 and self.gradients == "features":
            raise ValueError(f"gradients=features: {name} compares gradients of different batches; use parameters")

    def check_per_task(self, strategy: Strategy) -> None:
        """Raises:
        ValueError: this strategy's step is not a weighted sum of one gradient for each task.
        """
        name = type(strategy).__name__
        if isinstance(strategy, JacobianAggregation):
            raise ValueError(f"{name} merges the tasks' gradients, and the optimizer needs them one by one")
        if self.of_features(strategy):
            raise ValueError(
                "step.gradients=features leaves no parameter gradients, and the optimizer needs each task's"
            )
        if defines(strategy, "regulariser"):
            raise ValueError(
                f"{name} adds a regulariser that belongs to no task, and the optimizer needs each task's gradient"
            )


PAPER = Switches()  # everything as published


def to_count(weights: Tensor, present: Tensor | None) -> Tensor:
    """() the factor by which the weights' sizes add up to the number of tasks; a sum with signs could be 0 or less."""
    total = weights.abs().sum()
    return torch.where(total > 0, count(present, weights) / total, 1.0)


@dataclass(frozen=True)
class Info:
    """What one backward pass did; tensors stay on the device, nothing is synchronised.

    Attributes:
        weights: (T,) the weights applied to the shared gradients, after scaling and clipping. Heads get the unscaled
            weights, except with scale=sum. None if the method has no weights.
        norm: () norm of the shared parameters' gradient as this call left it.
        ratio: () norm relative to equal weighting's on the same batch (for gradients=features, of the features'
            gradients); None where no per-task gradients were taken.
        cosine: () mean cosine between the task gradients, over all pairs; None as above and for T = 1.
        conflict: () share of the pairs with a negative cosine; None as above.
        magnitude: () mean magnitude similarity 2‖g_i‖‖g_j‖ / (‖g_i‖² + ‖g_j‖²) over the pairs (Yu et al., 2020): 1 for
            equal lengths; None as above.
        passes: the forward passes that a `mtl.Step` was made of; empty from `mtl.backward`.
    """

    weights: Tensor | None
    norm: Tensor
    ratio: Tensor | None = None
    cosine: Tensor | None = None
    conflict: Tensor | None = None
    magnitude: Tensor | None = None
    passes: tuple[Any, ...] = ()
