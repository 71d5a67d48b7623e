"""The base classes of the methods. A method belongs to one of three families, by what it needs:

    LossWeighting          the losses             forward(losses) → total          e.g. uncertainty weighting
    GramianWeighting       J Jᵀ of the gradients  weights(gramian) → weights       e.g. MGDA
    JacobianAggregation    all gradients J        aggregate(jacobian) → direction  e.g. GradDrop

Shapes: T tasks, P shared parameters. losses (T,), jacobian (T, P), gramian (T, T), weights (T,), present (T,).

A method's author writes one of these functions. Its signature may leave out the arguments that it does not read.
Everything else (random stream, checkpoint, dtype) is in `mtl.losses.state`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mtl.config.constructors import checked
from mtl.config.source import definition
from mtl.losses import hooks, signatures
from mtl.losses.epochs import Statistics, once_an_epoch
from mtl.losses.hooks import optional
from mtl.losses.state import StrategyState

HEADS = ("own", "weighted")
FLOOR = 1e-12  # losses are clamped to at least this before a logarithm or a ratio
Mean = Literal["arithmetic", "geometric"]
HeadGradients = list[list[Tensor | None]]  # for each head, the gradients of its parameters; None: no gradient


class Strategy(StrategyState, ABC):
    """Base of every method. A method keeps its state in parameters and buffers, so that checkpoints contain it.

    Args:
        tasks: the number of tasks, or their names. With names, arguments may be given by name.

    Attributes:
        family: the family's name, for messages.
        rule: name of the function that decides the step: "forward", "weights" or "aggregate".
        claims: properties that its paper claims, by their names in `mtl.certify`.
        needs_positive: whether it takes logarithms or ratios of the losses. Such a method cannot use log-losses.
        gradients: per-task gradients are with respect to the shared "parameters" or the "features".
        heads: the gradient of task-specific parameters under a gradient method, as in the method's paper. "own": of
            their own loss; "weighted": that gradient times the task's weight. Loss weighting always weights them.
        max_norm: norm to which the shared gradient is clipped, if clipping is a part of the method.
        lazy: names of buffers whose shape is known only in the first step; None until then. Example: (T, P) averages,
            see `JacobianAggregation.kept`.
        samples: number of independent batches that a step needs: 1, or 2 or 3 for the double-sampling methods.
        single_task_argument: name of the argument for single-task results, if the method needs them.
        epoch, epochs: the training's progress, with epochs counted from 0; set by `epoch_start`.
        uses_progress: whether its weights depend on `epoch` and `epochs`.
        reads_scores: whether its weights depend on the scores that `epoch_end` gets.
        needs_accuracies: whether these scores must be shares of right answers. Such a method cannot use errors.
        flat: whether its features must have the shape (N, F).
        lr, weight_decay: settings for the method's own parameters; None follows the optimizer.
        group: the processes that share each batch, each with a replica of the model under DistributedDataParallel.
            "auto": all processes that torch.distributed has started. None: only this process. Or a process group.
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
    reads_scores: bool = False
    needs_accuracies: bool = False
    flat: bool = False
    group: Any = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A training loop may forget to call a hook. The method would then silently keep its first weights. So every
        # hook that a method defines is wrapped: it notes its calls, and `hooks.check_step` checks them.
        for hook in hooks.HOOKS:
            if hook in cls.__dict__:
                function = cls.__dict__[hook]
                setattr(cls, hook, hooks.noted(hook, once_an_epoch(function) if hook == "epoch_end" else function))
        # The wrapped constructor checks its arguments against their type hints, such as Annotated[float, Gt(0)].
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__init__, but=("tasks",), after=_check_begun)

    def __init__(self, tasks: int | Sequence[str]):
        signatures.check(self)
        super().__init__(tasks)

    # -- hooks: a method overrides the ones that it needs; `hooks.defines(strategy, name)` finds out ------------------

    @optional
    def prepare(self, features: int) -> None:
        """Create parameters whose shape depends on the features' width. Called before the optimizer is built."""

    @optional
    def views(self, features: Tensor) -> list[Tensor]:
        """Each head's input, made from the backbone's features (N, F). All but RotoGrad return the features."""
        return [features] * self.tasks

    @optional
    def look_ahead(
        self,
        losses_of: Callable[[int], Tensor],
        parameters: Sequence[nn.Parameter],
        lr: float,
        present: Tensor | None = None,
    ) -> None:
        """Try steps before the real one (the bilevel methods, such as Auto-Lambda).

        Args:
            losses_of: losses_of(k) makes a fresh forward pass over half k (0 or 1) of the batch. It returns the losses
                (T,) with their graph. Dropout masks are the same at every call.
            parameters: all trainable parameters of the model. They must be put back to their values.
            lr: the optimizer's current learning rate.
            present: (T,) bool, False if one of the halves has no label of that task; None if all tasks are present.
        """

    @optional
    def regulariser(
        self, losses: Sequence[Tensor], features: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor | None:
        """() a term that is added to the total, and need not depend on the losses alone (Rep-MTL); or None.

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
        """The heads' gradients under a gradient method, if `heads` = "own" or "weighted" does not describe them.

        Args:
            own: for each head, the gradients of its own loss for its parameters.
            weights: (T,) the weights that the method returned in this step.
            losses: T scalars with their graph.
            features: as in `mtl.backward`.
            heads: each head's parameters.

        Returns:
            the gradients, in the form of `own`. `times` multiplies each head's gradients by a number.
        """
        return own

    @optional
    def after_step(self, losses: Tensor, present: Tensor | None = None) -> None:
        """Learn from the step's effect (FAMO).

        `mtl.Step` makes the extra forward pass for this hook. A user's loop with `mtl.backward` must make it itself.

        Args:
            losses: (T,) losses of the same batch under the new parameters.
            present: (T,) bool as in `LossWeighting.forward`.
        """

    @optional
    def epoch_end(self, statistics: Statistics) -> None:
        """Learn from the results of an epoch, at its end (DWA, for example)."""


def _check_begun(strategy: Strategy, init: Callable[..., None]) -> None:
    """Raises:
    TypeError: the constructor `init` has ended without a call of the constructor of `Strategy`.
    """
    if "names" not in vars(strategy):
        where = f"{type(strategy).__name__}.__init__ (defined in {definition(init)})"
        raise TypeError(f"{where} does not call super().__init__(tasks); that call belongs into its first line")


class LossWeighting(Strategy):
    """Family 1: combines the losses into one scalar. One backward pass is enough."""

    family = "loss weighting"
    rule = "forward"

    @abstractmethod
    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine the losses.

        Args:
            losses: (T,) differentiable; an absent task's entry is a constant 0.
            present: (T,) bool, False if the batch has no label of that task; None if all tasks are present. A method
                without this argument cannot be used on batches with absent tasks.

        Returns:
            () the scalar to differentiate.
        """


class GramianWeighting(Strategy):
    """Family 2: the update is `jacobian.T @ weights`, and the weights depend on the Gramian alone."""

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
            losses: (T,) values without a graph. Only a few methods need them.

        Returns:
            (T,) the weight of each task's gradient.
        """


class JacobianAggregation(Strategy):
    """Family 3: the update depends on the whole Jacobian.

    Attributes:
        has_weights: whether `aggregate` also returns task weights.
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
            jacobian: (T, P), each row the gradient of one task; an absent task's row is 0.
            present, losses: as in `GramianWeighting.weights`.
            features: (N, …) the features, if gradients are with respect to them. P is then their number of elements.

        Returns:
            (P,) the direction, used like a gradient: parameters move against it. A method that has task weights
            returns (direction, weights).
        """

    def kept(self, name: str, like: Tensor) -> Tensor:
        """The `lazy` buffer `name`: it has the Jacobian's shape (T, P), and starts with zeros.

        It follows the Jacobian to another device or precision.

        Args:
            name: a name in `lazy`.
            like: (T, P) the Jacobian.

        Raises:
            RuntimeError: the buffer has another shape, because P has changed since the first step.
        """
        buffer = getattr(self, name)
        if buffer is None:
            buffer = torch.zeros_like(like)
        elif buffer.shape != like.shape:
            raise RuntimeError(
                f"{type(self).__name__}: `{name}` holds {buffer.shape[1]} numbers for each task from earlier steps, "
                f"but the gradients now have {like.shape[1]}. Was a shared parameter frozen or unfrozen, or is this "
                f"another model? Then make a new strategy: the state of this one does not fit"
            )
        elif buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = buffer.to(like)
        setattr(self, name, buffer)
        return buffer


def times(gradients: HeadGradients, factors: Sequence[Tensor] | Tensor) -> HeadGradients:
    """Each head's gradients, multiplied by the head's factor in `factors` (T,)."""
    return [[None if g is None else f * g for g in head] for f, head in zip(factors, gradients, strict=True)]


def masked(values: Tensor, present: Tensor | None) -> Tensor:
    """`values` (T,), with 0 for absent tasks. It selects instead of multiplying: 0 times NaN would be NaN."""
    return values if present is None else torch.where(present, values, torch.zeros_like(values))


def count(present: Tensor | None, like: Tensor) -> Tensor:
    """() the number of present tasks, at least 1, in the dtype of `like` (T,)."""
    return torch.full_like(like[0], len(like)) if present is None else present.sum().clamp(min=1).to(like)


def uniform(present: Tensor | None, like: Tensor) -> Tensor:
    """(T,) weights 1/T of the mean over the present tasks, in the dtype of `like`."""
    return masked(torch.ones_like(like), present) / count(present, like)


def renormalised(weights: Tensor, present: Tensor | None) -> Tensor:
    """(T,) `weights` rescaled so that the present tasks' weights add up to their number; 0 for absent tasks."""
    if present is None:
        return weights
    kept = masked(weights, present)
    return kept * (count(present, kept) / kept.sum().clamp(min=FLOOR))


def softmax(scores: Tensor, present: Tensor | None) -> Tensor:
    """(T,) softmax over the present tasks, 0 for absent ones."""
    if present is None:
        return torch.softmax(scores, 0)
    # If all tasks are absent, the softmax of −∞ alone is NaN; it becomes 0.
    return torch.softmax(torch.where(present, scores, -torch.inf), 0).nan_to_num(0.0)


def logs(values: Tensor, present: Tensor | None) -> Tensor:
    """(T,) logarithms of values >= 0; 0 for absent tasks. A value of 0 counts as `FLOOR` and gets gradient 0."""
    if present is not None:
        values = torch.where(present, values, torch.ones_like(values))
    return values.clamp(min=FLOOR).log()


def combine(losses: Tensor, weights: Tensor, present: Tensor | None, mean: Mean = "arithmetic") -> Tensor:
    """() Σ_i w_i L_i, or the geometric mean Π_i L_i^{w_i/Σw}, over the present tasks.

    The geometric mean (Yun & Cho, ICCV 2023) is computed from logarithms, because a product of many losses could
    overflow or underflow. It leaves absent tasks out: their 0^w would make the total 0, and the gradient NaN.
    """
    weights = masked(weights.to(losses), present)
    if mean == "arithmetic":
        return (weights * masked(losses, present)).sum()
    return (weights / weights.sum().clamp(min=FLOOR) * logs(losses, present)).sum().exp()


def among_present(mixture: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights on the simplex, for the present tasks alone. An absent task keeps its part of the mixture.

    Args:
        mixture: (T,) ≥ 0, Σ = 1.
        present: (T,) bool.

    Returns:
        (T,) the weights of the present tasks, Σ = 1; () the part of the mixture that these tasks keep. If the absent
        tasks hold the whole mixture, the others begin with equal weights. They keep 1e-30, to remember their ratios.
    """
    own = masked(mixture, present)
    total = own.sum()
    return torch.where(total > 0, own / total, uniform(present, mixture)), total.clamp(min=1e-30)


def moving_average(average: Tensor, values: Tensor, share: float) -> Tensor:
    """(T,) the moving average: share · values + (1 − share) · average.

    NaN in `average` means no value so far; the first value then replaces it. NaN in `values` means no value this time;
    the average then stays as it is.
    """
    moved = torch.where(average.isnan(), values, share * values + (1 - share) * average)
    return torch.where(values.isnan(), average, moved)
