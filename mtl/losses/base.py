"""What a strategy sees and returns: the three families, told apart by what a method needs.

Shapes: T tasks, P shared parameters. losses (T,), jacobian (T, P), gramian (T, T), weights (T,), present (T,).

A method's author writes one function: `forward`, `weights` or `aggregate`. It takes those of the arguments below that
it reads. All that is beside it (random stream, checkpoint, dtype) is in `mtl.losses.state`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mtl.config.constructors import checked
from mtl.losses import hooks, signatures
from mtl.losses.epochs import Statistics, once_an_epoch
from mtl.losses.hooks import optional
from mtl.losses.state import StrategyState

HEADS = ("own", "weighted")
FLOOR = 1e-12  # losses are held above it where a logarithm or a ratio is taken of them
Mean = Literal["arithmetic", "geometric"]
HeadGradients = list[list[Tensor | None]]  # of each head's parameters; None where there is none


class Strategy(StrategyState, ABC):
    """Base of every method. All state lives in parameters and buffers, so that a checkpoint holds it.

    Args:
        tasks: the number of tasks, or their names (then weights may be given by name).

    Attributes:
        family: one of the three, in words.
        rule: name of the function that decides the step: "forward", "weights" or "aggregate".
        claims: properties that its paper claims, by their names in `mtl.certify`.
        needs_positive: whether it takes logarithms or ratios of the losses, and so cannot see log-losses.
        gradients: of what the method takes per-task gradients: "parameters" or "features".
        heads: what task-specific parameters receive under a gradient method: the gradient of their own loss
            ("own"), or that gradient times the task's weight ("weighted"); each paper's way. Loss weighting always
            weights them.
        max_norm: norm to which the shared parameters' gradient is clipped, where that is part of the method.
        lazy: names of buffers whose shape the first step decides (such as (T, P) averages, see
            `JacobianAggregation.kept`); None until then.
        samples: how many independent batches a step needs: 1, or 2 or 3 for the double-sampling methods.
        single_task_argument: name of the argument that takes single-task results, where a method needs them.
        epoch, epochs: training progress, epoch counted from 0; set by `epoch_start`.
        uses_progress: whether its weights depend on `epoch` and `epochs`.
        flat: whether it takes features of shape (N, F) only.
        lr, weight_decay: of the method's own parameters; None follows the optimizer's.
        group: the processes that share each batch, each with a replica of the model under DistributedDataParallel.
            "auto": all that torch.distributed started; None: this process alone; else their process group.
    """

    family: str
    rule: ClassVar[str]
    claims: tuple[str, ...] = ()
    needs_positive: bool = False
    gradients: str = "parameters"
    heads: str = "own"
    max_norm: float | None = None
    samples: int = 1
    lazy: tuple[str, ...] = ()
    lr: float | None = None
    weight_decay: float | None = 0.0
    single_task_argument: str | None = None
    uses_progress: bool = False
    flat: bool = False
    group: Any = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A loop that forgets a hook must not train on in silence: every hook that a method defines notes its call.
        for hook in hooks.HOOKS:
            if hook in cls.__dict__:
                function = cls.__dict__[hook]
                setattr(cls, hook, hooks.noted(hook, once_an_epoch(function) if hook == "epoch_end" else function))
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__init__, but=("tasks",))

    def __init__(self, tasks: int | Sequence[str]):
        signatures.check(self)
        super().__init__(tasks)

    # -- hooks: define those that the method needs; `hooks.defines` tells which these are -----------------------------

    @optional
    def prepare(self, features: int) -> None:
        """Create the parameters whose shape depends on the width of the features; before the optimizer is built."""

    @optional
    def views(self, features: Tensor) -> list[Tensor]:
        """What each head sees of the backbone's features (N, F): the features themselves, except for RotoGrad."""
        return [features] * self.tasks

    @optional
    def look_ahead(
        self,
        losses_of: Callable[[int], Tensor],
        parameters: Sequence[nn.Parameter],
        lr: float,
        present: Tensor | None = None,
    ) -> None:
        """Try steps out before the real one (the bilevel methods).

        Args:
            losses_of: losses_of(k) is a fresh forward pass over half k (0 or 1) of the batch: (T,) with a graph, and
                with the same dropout masks at every call.
            parameters: all trainable parameters of the model; to be left as they were.
            lr: the optimizer's current learning rate.
            present: (T,) bool, False where one of the halves holds no label of that task; None when all are present.
        """

    @optional
    def regulariser(
        self, losses: Sequence[Tensor], features: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor | None:
        """() a further term that reaches the parameters by other ways than the losses (Rep-MTL), or None.

        Args:
            losses: T scalars with their graph.
            features: as in `mtl.backward`.
            present: (T,) bool as in `LossWeighting.forward`.
        """
        return None

    @optional
    def head_gradients(
        self,
        own: HeadGradients,
        weights: Tensor | None = None,
        losses: Sequence[Tensor] = (),
        features: Tensor | None = None,
        heads: Sequence[Sequence[nn.Parameter]] = (),
    ) -> HeadGradients:
        """What the heads receive under a gradient method, where neither "own" nor "weighted" is the paper's way.

        Args:
            own: for each head, the gradients of its own loss for its parameters.
            weights: (T,) of this step's gradients, as the method returned them.
            losses: T scalars with their graph.
            features: as in `mtl.backward`.
            heads: each head's parameters.

        Returns:
            as `own`; `times` multiplies each head's gradients by a number.
        """
        return own

    @optional
    def after_step(self, losses: Tensor, present: Tensor | None = None) -> None:
        """Learn from what the step did (FAMO): losses (T,) of the same batch under the new parameters.

        `mtl.Step` makes the extra forward pass for the methods that define this; a foreign loop does so itself.
        """

    @optional
    def epoch_end(self, statistics: Statistics) -> None:
        """Learn from the epoch that has ended (DWA and its kin)."""


class LossWeighting(Strategy):
    """Family 1: combines the losses into one scalar; one backward pass."""

    family = "loss weighting"
    rule = "forward"

    @abstractmethod
    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine the losses.

        Args:
            losses: (T,) differentiable; an absent task's entry is a constant 0.
            present: (T,) bool, False where the batch holds no label of that task; None when all are present. A method
                that does not take it is refused where a task is absent.

        Returns:
            () the scalar to differentiate.
        """


class GramianWeighting(Strategy):
    """Family 2: the update is `jacobian.T @ weights` with weights a function of the Gramian alone."""

    family = "Gramian weighting"
    rule = "weights"

    @abstractmethod
    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        """Weigh the tasks.

        Args:
            gramian: (T, T) inner products of the task gradients, J Jᵀ. An absent task's row and column are 0. With
                `samples` > 1 it is J₁ J₂ᵀ of the first two batches. The weights are then applied to the mean of both
                Jacobians (2 batches), or to the third Jacobian (3 batches).
            present: (T,) bool as in `LossWeighting.forward`.
            losses: (T,) values, without a graph; a few methods read them, and say so when they are missing.

        Returns:
            (T,) the weight of each task's gradient.
        """


class JacobianAggregation(Strategy):
    """Family 3: the update is a function of the whole Jacobian.

    Attributes:
        has_weights: whether `aggregate` returns task weights, too.
    """

    family = "Jacobian aggregation"
    rule = "aggregate"
    has_weights: bool = False

    @abstractmethod
    def aggregate(
        self,
        jacobian: Tensor,
        present: Tensor | None = None,
        losses: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Merge the task gradients.

        Args:
            jacobian: (T, P) one task gradient a row; an absent task's row is 0.
            present, losses: as in `GramianWeighting.weights`.
            features: (N, …) the representation, when the Jacobian is of it; then P = N · ….

        Returns:
            (P,) the direction; parameters move against it. A method that has task weights returns (direction, weights).
        """

    def kept(self, name: str, like: Tensor) -> Tensor:
        """The `lazy` buffer `name`, which holds a number for each one in the Jacobian; zeros at first.

        It follows the Jacobian to another device or precision.

        Args:
            like: (T, P) the Jacobian.

        Raises:
            RuntimeError: the buffer is of another shape: P has changed since the first step.
        """
        buffer = getattr(self, name)
        if buffer is None:
            buffer = torch.zeros_like(like)
        elif buffer.shape != like.shape:
            raise RuntimeError(
                f"{type(self).__name__}: `{name}` holds {buffer.shape[1]} numbers for each task from the steps before, "
                f"and the gradients now have {like.shape[1]}. Was a shared parameter frozen or unfrozen, or is it "
                f"another model? Make a new strategy for it: what this one has learned does not fit"
            )
        elif buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = buffer.to(like)
        setattr(self, name, buffer)
        return buffer


def times(gradients: HeadGradients, factors: Sequence[Tensor] | Tensor) -> HeadGradients:
    """Each head's gradients, multiplied by the head's number in `factors` (T,)."""
    return [[None if g is None else f * g for g in head] for f, head in zip(factors, gradients, strict=True)]


def masked(values: Tensor, present: Tensor | None) -> Tensor:
    """`values` (T,) with 0 where the task is absent; never multiplies, so a NaN there cannot leak."""
    return values if present is None else torch.where(present, values, torch.zeros_like(values))


def count(present: Tensor | None, like: Tensor) -> Tensor:
    """() the number of present tasks, at least 1, in the dtype of `like` (T,)."""
    return torch.full_like(like[0], len(like)) if present is None else present.sum().clamp(min=1).to(like)


def uniform(present: Tensor | None, like: Tensor) -> Tensor:
    """(T,) weights 1/T of the mean over the present tasks, in the dtype of `like`."""
    return masked(torch.ones_like(like), present) / count(present, like)


def renormalised(weights: Tensor, present: Tensor | None) -> Tensor:
    """(T,) `weights`, whose sum is T, of the present tasks alone, whose number is then the sum; 0 elsewhere."""
    if present is None:
        return weights
    kept = masked(weights, present)
    return kept * (count(present, kept) / kept.sum().clamp(min=FLOOR))


def softmax(scores: Tensor, present: Tensor | None) -> Tensor:
    """(T,) softmax over the present tasks, 0 elsewhere."""
    if present is None:
        return torch.softmax(scores, 0)
    return torch.softmax(torch.where(present, scores, -torch.inf), 0).nan_to_num(0.0)


def logs(values: Tensor, present: Tensor | None) -> Tensor:
    """(T,) log of values >= 0, 0 where the task is absent. A value of 0 counts as `FLOOR` and has gradient 0."""
    if present is not None:
        values = torch.where(present, values, torch.ones_like(values))
    return values.clamp(min=FLOOR).log()


def combine(losses: Tensor, weights: Tensor, present: Tensor | None, mean: Mean = "arithmetic") -> Tensor:
    """() Σ_i w_i L_i, or the geometric mean Π_i L_i^{w_i/Σw}, over the present tasks.

    The geometric mean (Yun & Cho, ICCV 2023) goes through logs: the product of many losses over- or underflows, and an
    absent task's 0^w would make the total 0 and its gradient NaN.
    """
    weights = masked(weights.to(losses), present)
    if mean == "arithmetic":
        return (weights * masked(losses, present)).sum()
    return (weights / weights.sum().clamp(min=FLOOR) * logs(losses, present)).sum().exp()


def moving_average(average: Tensor, values: Tensor, share: float) -> Tensor:
    """(T,) `average` moved to `values` by `share`; NaN there is "no value yet", here "no value this time"."""
    moved = torch.where(average.isnan(), values, share * values + (1 - share) * average)
    return torch.where(values.isnan(), average, moved)
