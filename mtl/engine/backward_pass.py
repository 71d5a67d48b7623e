"""The arguments of one backward pass in one form, and the losses as the method sees them."""

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

Owners = nn.Module | Parameter | Iterable[Any]  # a module, a parameter, or any collection of parameters


@dataclass
class BackwardPass:
    """The arguments of one backward pass.

    Attributes:
        samples: the losses of each batch, as scalars in task order. Most methods need one batch.
        shared, heads: trainable parameters. After `ownership.check`, each parameter is in one list only.
        model: the shared parameters, as the caller gave them.
        listed: `shared` and `heads`, as the caller gave them.
        present: (T,) bool. After `meet`: whether the task is present in any process.
        features: the features, if the caller gave them.
        scale: the loss scale of mixed precision; None is 1.
        each: whether each task's gradient is wanted as well.
        replicas: the processes that share each batch; None if there is only this one.
        of_features: whether per-task gradients are with respect to the features.
        combines: whether the gradient of each task is computed separately.
        tied: for each parameter that is in both lists, whether several losses reach it.
        unseen: names of custom autograd functions, if the graph shows no shared parameter. They may hide behind them.
        values: (T,) losses without a graph, averaged over the processes.
        share: (T,) this process's share of each mean, such as 1/2 in two processes; None if there is only this one.
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
        self.values = torch.stack(self.samples[-1]).detach()
        self.share: Tensor | None = None
        self.tied: Sequence[bool] = ()
        self.unseen = ""

    @property
    def device(self) -> torch.device:
        """The device of the losses."""
        return self.samples[0][0].device

    @property
    def cut(self) -> Tensor | None:
        """The features, if gradients are with respect to them; otherwise None. The graph is cut there."""
        return self.features if self.of_features else None

    @property
    def whole(self) -> bool:
        """Whether this process has the whole direction, and not only the part of its own samples' features."""
        return not self.of_features or self.replicas is None

    @property
    def frozen(self) -> bool:
        """Whether a gradient method has nothing to balance, because all shared parameters are frozen."""
        return not self.shared and not self.of_features and not isinstance(self.strategy, LossWeighting)

    def maybe_absent(self) -> list[bool]:
        """(T,) whether each task may be absent. On a GPU `present` is not read, so then every task may be."""
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
        # The processes compare these facts first. If they differ, all raise the same error instead of waiting for ever.
        facts = {"switches": self.switches, "per_task": self.each, "shared parameters": len(self.listed[0])}
        facts["parameters of heads"] = [len(head) for head in self.listed[1]]
        call = Call("mtl.backward", facts, self.combines or any(loss.requires_grad for loss in self.samples[0]))
        self.share, self.present, self.values = self.replicas.step(
            self.strategy, call, self.values, self.present, self.listed
        )
        if self.tied:
            self.settle(self.replicas.any_of(self.tied, self.values.device))

    def settle(self, flags: Sequence[bool]) -> None:
        """Remove each parameter that is in both lists from one of them.

        Args:
            flags: for each such parameter, whether several losses reach it. Then it stays in `shared`.
        """
        self.shared, self.heads = self.listed
        listed, known = {id(p) for p in self.shared}, iter(flags)
        both = [(id(p), next(known)) for head in self.heads for p in head if id(p) in listed] if flags else []
        own, tied = ({key for key, flag in both if flag is several} for several in (False, True))
        self.shared = [p for p in self.shared if id(p) not in own]
        self.heads = [[p for p in head if id(p) not in tied] for head in self.heads]

    def seen(self) -> tuple[list[list[Tensor]], Tensor, Tensor | None]:
        """The losses as the method sees them.

        Returns:
            for each batch the losses with their graphs; (T,) the values without a graph; (T,) `share`, or None.

        Raises:
            ValueError: a loss is negative, and its logarithm or a ratio is needed.
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
            # The method sees log of the mean L over all processes. Its slope is 1 / L, so the shares are divided by L.
            if log:
                self.share = share = torch.where(values > TINY, share / values, 0.0)
        if log:
            values = masked(values.clamp(min=TINY).log(), self.present)
        return samples, values, share

    def without_absent(self, losses: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """Detach the losses of absent tasks, so that nothing flows back through them.

        Multiplying by a weight of 0 would not be enough: 0 times NaN is NaN, in all shared parameters. On a GPU, where
        `present` is not read, nothing is detached.

        Returns:
            the T losses, and the numbers of the detached ones.
        """
        known = None if self.present is None or self.replicas is not None else guard.host(self.present)
        if known is None:
            return losses, []
        absent = [i for i, there in enumerate(known) if not there and losses[i].requires_grad]
        return [loss.detach() if i in absent else loss for i, loss in enumerate(losses)], absent

    def gramian(self, jacobian: Tensor) -> Tensor:
        """(T, T) J Jᵀ. With features, each process has its own samples' columns of J, so the products are summed."""
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
    """Convert the arguments of `mtl.backward` to one form. Check them, and check that no hook of the method is missing.

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
    # Before anything else is computed: did the loop call the method's hooks, and did an optimizer make its step?
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
    """Enable gradients and disable autocast. In a caller's autocast, inner products of gradients would be rounded."""
    inside = torch.is_autocast_enabled(device.type)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False) if inside else nullcontext():
        yield


def _samples(losses: Any, strategy: Strategy) -> list[list[Tensor]]:
    """The losses of each batch that the method needs, as scalars in task order.

    Raises:
        ValueError: there are not as many batches as the method needs.
    """
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
    """Replace an absent task's loss by a constant 0. The caller may have given anything there, such as NaN."""
    if present is None:
        return losses
    return [torch.where(p, loss, torch.zeros_like(loss)) for p, loss in zip(present, losses, strict=True)]
