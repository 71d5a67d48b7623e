"""The arguments of one backward pass, in the one form that it computes with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mtl.engine import arguments, guard
from mtl.engine.agreement import Call
from mtl.engine.movement import Movement
from mtl.engine.replicas import Replicas
from mtl.engine.switches import TINY, Switches
from mtl.losses import given, hooks, signatures
from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Strategy, masked

Owners = nn.Module | Parameter | Iterable[Any]  # whatever holds parameters


@dataclass
class BackwardPass:
    """The arguments of one backward pass.

    Attributes:
        samples: the losses of each batch that the method needs, as scalars in task order.
        shared, heads: trainable parameters; each in one list only, once `ownership.check` has settled whose they are.
        model: the shared parameters, as the caller gave them.
        listed: `shared` and `heads`, as the caller gave them.
        present: (T,) bool; after `meet`, of the tasks that are present in any process.
        each: whether each task's gradient is wanted as well.
        of_features: whether the tasks' gradients are those of the features.
        combines: whether the tasks' gradients are taken one by one.
        tied: for each parameter in both lists, whether several losses reach it.
        unseen: custom functions behind which the shared parameters must be.
        values: (T,) losses without a graph, means over the processes.
        share: (T,) this process's share of each mean; None where this process is alone.
    """

    strategy: Strategy
    switches: Switches
    samples: list[list[Tensor]]
    shared: list[Parameter]
    heads: list[list[Parameter]]
    present: Tensor | None
    features: Tensor | None
    scale: Tensor | float | None
    each: bool
    replicas: Replicas | None

    def __post_init__(self) -> None:
        self.of_features = self.switches.of_features(self.strategy)
        self.combines = self.switches.combines(self.strategy, self.each)
        self.model, self.listed = self.shared, (self.shared, self.heads)
        self.values = torch.stack([loss.detach() for loss in self.samples[-1]])
        self.share: Tensor | None = None
        self.tied: Sequence[bool] = ()
        self.unseen = ""

    @property
    def device(self) -> torch.device:
        """Of the losses."""
        return self.samples[0][0].device

    @property
    def cut(self) -> Tensor | None:
        """The features, if the tasks' gradients are theirs."""
        return self.features if self.of_features else None

    @property
    def whole(self) -> bool:
        """Whether this process has the whole direction, and not its own samples' part of the features' gradient."""
        return not self.of_features or self.replicas is None

    @property
    def frozen(self) -> bool:
        """Whether a gradient method has nothing to balance."""
        return not self.shared and not self.of_features and not isinstance(self.strategy, LossWeighting)

    def maybe_absent(self) -> list[bool]:
        """(T,) which tasks may have no label in this batch, as far as the host knows without waiting."""
        if self.present is None:
            return [False] * self.strategy.tasks
        known = guard.host(self.present)
        return [True] * self.strategy.tasks if known is None else [not there for there in known]

    def meet(self) -> None:
        """Exchange losses and presence with the other processes, if there are any.

        Raises:
            ValueError: the processes do not belong together.
            RuntimeError: another process cannot take this step.
        """
        if self.replicas is None:
            return
        facts = {"switches": self.switches, "per_task": self.each, "shared parameters": len(self.listed[0])}
        facts["parameters of heads"] = [len(head) for head in self.listed[1]]
        call = Call("mtl.backward", facts, self.combines or any(loss.requires_grad for loss in self.samples[0]))
        self.share, self.present, self.values = self.replicas.step(
            self.strategy, call, self.values, self.present, self.listed
        )
        if self.tied:
            self.settle(self.replicas.any_of(self.tied, self.values.device))

    def settle(self, flags: Sequence[bool]) -> None:
        """Leave each parameter in one list.

        Args:
            flags: for each parameter in both lists, whether several losses reach it, so that it is shared.
        """
        self.shared, self.heads = self.listed
        listed, known = {id(p) for p in self.shared}, iter(flags)
        both = [(id(p), next(known)) for head in self.heads for p in head if id(p) in listed] if flags else []
        own, tied = ({key for key, flag in both if flag is several} for several in (False, True))
        self.shared = [p for p in self.shared if id(p) not in own]
        self.heads = [[p for p in head if id(p) not in tied] for head in self.heads]

    def seen(self) -> tuple[list[list[Tensor]], Tensor, Tensor | None]:
        """The losses as the method sees them: of each batch with a graph, (T,) without one, and (T,) the shares.

        Raises:
            ValueError: a negative loss, where a logarithm or a ratio is taken of it.
        """
        strategy, log, share = self.strategy, self.switches.transform == "log", self.share
        values = masked(self.values, self.present)
        if strategy.needs_positive or log:
            why = "takes logarithms or ratios of losses" if strategy.needs_positive else "is given log-losses"
            guard.refuse_negative(strategy, values, self.present, why)
        if share is None:
            samples = [self.switches.transformed(_only(self.present, part)) for part in self.samples]
        else:
            samples = [_only(share > 0, part) for part in self.samples]
            if log:  # of the mean over all processes, whose slope is 1 / L
                self.share = share = torch.where(values > TINY, share / values, 0.0)
        if log:
            values = masked(values.clamp(min=TINY).log(), self.present)
        return samples, values, share

    def without_absent(self, losses: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The losses, of which those of absent tasks have no graph, where the host knows them; and which these are.

        0 times the slope of a NaN is NaN, and would spoil what all tasks share.
        """
        known = None if self.present is None or self.replicas is not None else guard.host(self.present)
        if known is None:
            return losses, []
        absent = [i for i, there in enumerate(known) if not there and losses[i].requires_grad]
        return [loss.detach() if i in absent else loss for i, loss in enumerate(losses)], absent

    def gramian(self, jacobian: Tensor) -> Tensor:
        """(T, T) J Jᵀ. Of features, each process has the gradients of its own samples."""
        gramian = jacobian @ jacobian.T
        return gramian if self.whole else self.replicas.total(gramian)[0]

    def scaled(self, value: Tensor) -> Tensor:
        """`value` times the loss scale."""
        return value if self.scale is None else value * self.scale

    def unscaled(self, value: Tensor) -> Tensor:
        """`value` divided by the loss scale."""
        return value if self.scale is None else value / self.scale


def understood(
    losses: Any,
    strategy: Strategy,
    shared: Any,
    heads: Any,
    present: Any,
    features: Any,
    switches: Switches,
    scale: Any,
    each: bool,
    replicas: Replicas | None,
) -> BackwardPass:
    """The arguments of `mtl.backward` in one form, once the method's hooks have been called.

    Raises:
        ValueError, TypeError, RuntimeError: as `mtl.backward`.
    """
    if not isinstance(strategy, LossWeighting | GramianWeighting | JacobianAggregation):
        known = "give one of mtl.losses, such as mtl.losses.PCGrad(tasks=2)"
        if isinstance(strategy, Strategy):
            known = f"{type(strategy).__name__} belongs to none of the three families of mtl.losses"
        shown = f"the class {strategy.__name__}" if isinstance(strategy, type) else f"a {type(strategy).__name__}"
        raise TypeError(f"strategy: {shown} is no strategy; {known}")
    switches.check(strategy)
    owned = arguments.shared_parameters(shared, strategy)
    strategy.movement = strategy.movement or Movement()
    hooks.check_step(strategy, strategy.movement.look(strategy, owned))
    if each:
        switches.check_per_task(strategy)
    samples = _samples(losses, strategy)
    arguments.check_grad_mode(samples)
    combines = switches.combines(strategy, each)
    own = None if heads is None else arguments.head_parameters(heads, strategy, exclusive=combines)
    if combines and own is None:
        why = "a step with per-task gradients" if isinstance(strategy, LossWeighting) else type(strategy).__name__
        raise ValueError(f"heads: {why} needs each task's own parameters (may be empty)")
    of_features = switches.of_features(strategy)
    if of_features and features is None:
        raise ValueError("features: gradients of features need the tensor that all heads start from")
    if features is not None and (of_features or strategy.flat):
        given.check_features(strategy, features)
    device = samples[0][0].device
    there = arguments.marks(present, strategy.names, device)
    for hook in (strategy.rule, "regulariser"):
        signatures.check_present(strategy, hook, there)
    factor, own = arguments.loss_scale(scale, device), own or [[] for _ in strategy.names]
    return BackwardPass(strategy, switches, samples, owned, own, there, features, factor, each, replicas)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off: a caller may be inside of it, and the method's products must not be rounded."""
    inside = torch.is_autocast_enabled(device.type)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False) if inside else nullcontext():
        yield


def _samples(losses: Any, strategy: Strategy) -> list[list[Tensor]]:
    """The losses of each batch that the method needs, as scalars in task order."""
    if strategy.samples == 1:
        return [arguments.scalars("losses", losses, strategy.names)]
    batches = [] if isinstance(losses, Mapping) or (isinstance(losses, Tensor) and losses.dim() < 2) else list(losses)
    if len(batches) != strategy.samples or any(isinstance(b, Tensor) and b.dim() == 0 for b in batches):
        raise ValueError(
            f"losses: {type(strategy).__name__} needs the losses of {strategy.samples} independent batches; "
            f"give a list of {strategy.samples} lists of {strategy.tasks} losses, or use mtl.Step"
        )
    return [arguments.scalars(f"losses[{k}]", batch, strategy.names) for k, batch in enumerate(batches)]


def _only(present: Tensor | None, losses: list[Tensor]) -> list[Tensor]:
    """The losses, with a constant 0 for an absent task: whatever a caller put there reaches no parameter."""
    if present is None:
        return losses
    return [torch.where(p, loss, torch.zeros_like(loss)) for p, loss in zip(present, losses, strict=True)]
