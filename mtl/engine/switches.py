"""The switches of a step, which work with every method, and the step's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.losses.arguments import choose
from mtl.losses.base import JacobianAggregation, LossWeighting, Strategy, count
from mtl.losses.hooks import defines

TINY = 1e-12  # losses are clamped to at least this before transform=log takes their logarithm


@dataclass(frozen=True)
class Switches:
    """Variations of a step, for any method. "paper" always means: as the method's paper does it.

    Args:
        gradients: per-task gradients are with respect to the shared parameters, or to the features between backbone and
            heads. Features need one backward pass through the backbone instead of T (MGDA-UB, Sener & Koltun 2018).
        transform: log gives log-losses to the method, which makes it independent of the losses' scales.
        heads: the heads' gradients under a gradient method: of their own loss ("own"), or that times the task's weight.
        scale: the length of the step.

            ======  ==========================================================================================
            paper   as published
            sum     the absolute values of the weights add up to the number of tasks, as with equal weighting
            norm    the shared gradient is as long as with equal weighting; the heads' gradients stay
            ======  ==========================================================================================

            With gradients=features, the lengths of the features' gradients count.
        chunks: number of parts in which the (T, P) Jacobian is computed. Only one part is in memory at a time. Its
            share of the Gramian is added up, and one weighted backward pass gives the step. Each part needs T backward
            passes, but only down to its own layers. Together they cost at most about T (chunks + 3) / 4 whole ones.
        parallel: number of tasks whose gradients come from one backward pass. More are faster for small networks on a
            GPU, and need as many times the memory of a pass. Results differ by rounding. 1: a pass for each task.

    Loss weighting makes one backward pass whatever `chunks` and `parallel` say, so one grid may hold both families.
    """

    gradients: Literal["paper", "parameters", "features"] = "paper"
    transform: Literal["none", "log"] = "none"
    heads: Literal["paper", "own", "weighted"] = "paper"
    scale: Literal["paper", "sum", "norm"] = "paper"
    chunks: Annotated[int, Ge(1)] = 1
    parallel: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        for name, options in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name not in ("chunks", "parallel"):
                choose(name, value, options)
            elif type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: must be an integer from 1")

    def transformed(self, losses: list[Tensor]) -> list[Tensor]:
        """The losses as the method sees them: unchanged, or their logarithms."""
        if self.transform == "none":
            return losses
        # A loss of exactly 0 has no logarithm. After the clamp its gradient is 0, too.
        return [x.clamp(min=TINY).log() for x in losses]

    def of_features(self, strategy: Strategy) -> bool:
        """Whether this method's per-task gradients are with respect to the features."""
        return (strategy.gradients if self.gradients == "paper" else self.gradients) == "features"

    def combines(self, strategy: Strategy, per_task: bool) -> bool:
        """Whether a step computes the gradient of each task separately."""
        # Loss weighting does not need them, but some switches and the optimizer AdaTask do.
        return not isinstance(strategy, LossWeighting) or self.scale == "norm" or self.heads == "own" or per_task

    def factor(self, strategy: Strategy, norm: Tensor, equal: Tensor) -> Tensor | None:
        """() the factor for the shared gradient, from scale=norm or from the method's own clip; None for no factor.

        Args:
            strategy: the method.
            norm: () norm of the shared gradient.
            equal: () norm under equal weighting, on the same batch.
        """
        tiny = torch.finfo(norm.dtype).tiny
        if self.scale == "norm":
            return equal / norm.clamp(min=tiny)
        if self.scale == "paper" and strategy.max_norm is not None:
            return (strategy.max_norm / norm.clamp(min=tiny)).clamp(max=1.0)
        return None

    def check(self, strategy: Strategy) -> None:
        """Check that this method works with these switches.

        Raises:
            ValueError: it does not; the message begins with the name of the switch.
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
        if self.chunks > 1:
            self._check_chunks(strategy)

    def _check_chunks(self, strategy: Strategy) -> None:
        name = type(strategy).__name__
        if isinstance(strategy, JacobianAggregation):
            raise ValueError(
                f"chunks={self.chunks}: {name} merges whole gradients and needs all of them at once; drop it, or "
                "choose a method that weighs the tasks by their Gramian, such as UPGrad"
            )
        if self.of_features(strategy):
            raise ValueError(f"chunks={self.chunks}: gradients of features are small, and come in one piece; drop it")

    def check_per_task(self, strategy: Strategy) -> None:
        """Check that the step is a weighted sum of one gradient per task, which optimizers such as AdaTask need.

        Raises:
            ValueError: it is not.
        """
        name = type(strategy).__name__
        if self.chunks > 1:
            raise ValueError(f"step.chunks={self.chunks} holds no task's whole gradient, and the optimizer needs each")
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
    """() the factor that makes the weights' absolute values add up to the number of tasks (scale=sum)."""
    # Absolute values, because some methods have negative weights: a plain sum could be 0 or negative.
    total = weights.abs().sum()
    return torch.where(total > 0, count(present, weights) / total, 1.0)


@dataclass(frozen=True)
class Info:
    """The report of one backward pass. Its tensors stay on the device, so that the host does not wait.

    Attributes:
        weights: (T,) the weights applied to the shared gradients, after scaling and clipping. Heads get the unscaled
            weights, except with scale=sum. None if the method has no weights.
        norm: () norm of the shared parameters' gradient as this call left it.
        ratio: () this norm divided by the norm under equal weighting on the same batch. With gradients=features, both
            are norms of the features' gradients. None if per-task gradients were not computed.
        cosine: () mean cosine between the task gradients, over all pairs; None as above, and for T = 1.
        conflict: () share of the pairs with a negative cosine; None as for `cosine`.
        magnitude: () mean magnitude similarity 2‖g_i‖‖g_j‖ / (‖g_i‖² + ‖g_j‖²) over the pairs (Yu et al., 2020). It is
            1 for equal lengths. None as for `cosine`.
        passes: the forward passes of a `mtl.Step`; empty from `mtl.backward`.
    """

    weights: Tensor | None
    norm: Tensor
    ratio: Tensor | None = None
    cosine: Tensor | None = None
    conflict: Tensor | None = None
    magnitude: Tensor | None = None
    passes: tuple[Any, ...] = ()
