"""One backward pass, after its arguments were understood: the checks, the gradients of the tasks, and `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.engine import arguments, gradients, guard, hidden, reach
from mtl.engine.agreement import Call
from mtl.engine.replicas import Replicas
from mtl.engine.switches import TINY, Info, Switches
from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Strategy, count, masked, overrides
from mtl.optim.taskwise import leave, leave_presence, merge, settle


@dataclass
class BackwardPass:
    """The arguments of one step, in the form that it computes with."""

    strategy: Strategy
    switches: Switches
    shared: list[Parameter]
    heads: list[list[Parameter]]
    present: Tensor | None
    features: Tensor | None
    of_features: bool
    scale: Tensor | float | None
    replicas: Replicas | None
    per_task: bool
    inspect: Callable[[Tensor], None] | None
    listed: tuple[list[Parameter], list[list[Parameter]]] = ((), ())  # shared and heads as the caller gave them
    tied: Sequence[bool] = ()  # of the parameters in both lists, which several losses reach
    unseen: str = ""  # custom functions behind which the shared parameters must be

    def check(self, samples: list[list[Tensor]], combines: bool) -> None:
        """Refuse what could not be right.

        Raises:
            ValueError: see `backward`.
        """
        names, strategy = self.strategy.names, self.strategy
        if self.replicas is not None:
            self.replicas.check(strategy, self.of_features, self.shared)
        strategy.across, strategy.grouped = self.replicas, self.replicas is not None and self.replicas.all
        self.listed = self.shared, self.heads
        maybe = self._maybe_absent()
        for losses in samples:
            for i, loss in enumerate(losses):
                if not maybe[i]:
                    reach.check_constant(i, names[i], loss)
        if combines:
            arguments.check_plain([*self.shared, *(p for head in self.heads for p in head)])
            self.tied = self._tied(samples[0], maybe)
            self._settle(self.tied)
        elif self.replicas is not None:
            self.replicas.check_constants(samples[0], names, self.heads)
        if not reach.due(strategy, maybe):
            return
        stop = self.features if self.of_features else None
        found = [reach.reach(x, stop) if x.requires_grad and not maybe[i] else None for i, x in enumerate(samples[0])]
        if self.of_features:
            reach.check_features(names, self.features, found, self.shared)
        if combines:
            known = [*self.shared, *strategy.parameters()]
            reach.check_owners(names, samples[0], found, known, self.heads)
        elif self.shared:
            for i, reached in enumerate(found):
                if reached is not None and not any(id(p) in reached.leaves for p in self.shared):
                    reach.check_shared(i, names[i], reached, visible=True)
                    self.unseen = reached.opaque

    def _maybe_absent(self) -> list[bool]:
        """(T,) which tasks may have no label in this batch, as far as the host knows without waiting."""
        if self.present is None:
            return [False] * self.strategy.tasks
        known = guard.host(self.present)
        return [True] * self.strategy.tasks if known is None else [not there for there in known]

    def _tied(self, losses: list[Tensor], maybe: list[bool]) -> list[bool]:
        """For each parameter in both lists, whether several losses reach it (tied weights); else it is its head's."""
        listed = {id(p) for p in self.shared}
        if self.of_features or not any(id(p) in listed for head in self.heads for p in head):
            return []
        found = [reach.reach(loss).leaves if loss.requires_grad else {} for loss in losses]
        heads = [head for head in self.heads if head]
        # Losses that were computed as one vector have one graph in common: then only their gradients tell them apart.
        vector = all(any(id(p) in leaves for p in head) for leaves in found if leaves for head in heads)
        flags = []
        for i, head in enumerate(self.heads):
            for p in head:
                if id(p) not in listed:
                    continue
                # Whether an absent task uses its own head's parameter cannot be seen: take it that it does.
                several = any(id(p) in leaves for j, leaves in enumerate(found) if j != i)
                several = several and (maybe[i] or id(p) in found[i])
                if several and vector and len(losses) > 1:
                    several = (maybe[i] or reach.moves(losses[i], [p])) and reach.moved_by_others(p, i, losses)
                flags.append(several)
        return flags

    def _settle(self, flags: Sequence[bool]) -> None:
        """Leave each parameter in one list."""
        self.shared, self.heads = self.listed
        listed, known = {id(p) for p in self.shared}, iter(flags)
        both = [(id(p), next(known)) for head in self.heads for p in head if id(p) in listed] if flags else []
        own, tied = ({key for key, flag in both if flag is several} for several in (False, True))
        self.shared = [p for p in self.shared if id(p) not in own]
        self.heads = [[p for p in head if id(p) not in tied] for head in self.heads]

    def run(self, samples: list[list[Tensor]], combines: bool) -> Info:
        """The step itself; the strategy's buffers stay as they were if it is not finite."""
        strategy, log = self.strategy, self.switches.transform == "log"
        share, values = None, torch.stack([loss.detach() for loss in samples[-1]])
        if self.replicas is not None:
            share, self.present, values = self.replicas.step(
                strategy, self._call(samples, combines), values, self.present, self.listed
            )
            if self.tied:
                self._settle(self.replicas.any_of(self.tied, values.device))
        # The other families' step looks for itself, once it has the gradients.
        untouched = guard.Untouched(strategy) if isinstance(strategy, LossWeighting) else None
        values = masked(values, self.present)
        if strategy.needs_positive or log:
            why = "takes logarithms or ratios of losses" if strategy.needs_positive else "is given log-losses"
            guard.refuse_negative(strategy, values, self.present, why)
        if share is None:
            samples = [self.switches.transformed(_only(self.present, part)) for part in samples]
        else:
            samples = [_only(share > 0, part) for part in samples]
            if log:  # of the mean over all processes, whose slope is 1 / L
                share = torch.where(values > TINY, share / values, 0.0)
        if log:
            values = masked(values.clamp(min=TINY).log(), self.present)
        step = self._combine(samples, values, share) if combines else self._weigh(samples[0], values, share)
        if not self.per_task:
            merge(self.shared, len(self.heads))
        if untouched:
            finite = values.isfinite().all() & step.norm.isfinite()
            if heads := [p for head in self.heads for p in head]:
                finite = finite & gradients.norm(heads).isfinite()
            untouched.unless(finite if share is None else self.replicas.everywhere(finite))
        return step

    def _call(self, samples: list[list[Tensor]], combines: bool) -> Call:
        """What all processes must have in common, and whether this one has a backward pass to make."""
        facts = {"switches": self.switches, "per_task": self.per_task, "shared parameters": len(self.listed[0])}
        facts["parameters of heads"] = [len(head) for head in self.listed[1]]
        return Call("mtl.backward", facts, combines or any(loss.requires_grad for loss in samples[0]))

    def _weigh(self, losses: list[Tensor], values: Tensor, share: Tensor | None) -> Info:
        """Loss weighting: one backward pass, which reaches every parameter."""
        losses, absent = self._without_absent(losses)
        self._regularise(losses)
        stacked, weights = self._weights_of_losses(losses, values, share)
        seed = weights
        if share is not None:  # DistributedDataParallel takes the mean over the processes, we want the sum
            seed = seed * share * self.replicas.size
        before = [None if p.grad is None else p.grad._version for p in self.shared] if self.unseen else []
        if stacked.requires_grad:
            stacked.backward(self._scaled(seed))
        if before and before == [None if p.grad is None else p.grad._version for p in self.shared]:
            raise ValueError(
                f"losses: reach no parameter of shared, not even behind the custom function {self.unseen}. Were the "
                "features detached, or made under no_grad?"
            )
        if absent:  # zeros, as the absent losses would have left
            left = [p for p in (*self.shared, *(p for i in absent for p in self.heads[i])) if p.grad is None]
            gradients.add(left, [torch.zeros_like(p) for p in left])
        return Info(weights=weights, norm=self._unscaled(gradients.norm(self.shared)))

    def _without_absent(self, losses: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """The losses, of which those of absent tasks have no graph, where the host knows them; and which these are.

        0 times the slope of a NaN is NaN, and would spoil what all tasks share.
        """
        known = None if self.present is None or self.replicas is not None else guard.host(self.present)
        if known is None:
            return losses, []
        absent = [i for i, there in enumerate(known) if not there and losses[i].requires_grad]
        return [loss.detach() if i in absent else loss for i, loss in enumerate(losses)], absent

    def _regularise(self, losses: list[Tensor]) -> None:
        if not overrides(self.strategy, LossWeighting, "regulariser"):
            return
        with self._nothing_hidden():
            extra = self.strategy.regulariser(losses, self.features, self.present)
        if extra is not None and extra.requires_grad:
            self._scaled(extra).backward(retain_graph=True)

    @contextmanager
    def _nothing_hidden(self) -> Iterator[None]:
        """Derivatives that a method takes in here must not leave gradients behind.

        Raises:
            ValueError: they did.
        """
        why = (
            f"heads: {type(self.strategy).__name__} takes second derivatives, and a custom autograd function hides "
            "parameters from them; choose another method"
        )
        with hidden.Aside([*self.shared, *(p for head in self.heads for p in head)]) as aside:
            try:
                yield
            except RuntimeError as error:
                if aside.take():
                    raise ValueError(why) from error
                raise
            if aside.take():
                raise ValueError(why)

    def _weights_of_losses(self, losses: list[Tensor], values: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the stacked losses, ∂total/∂L_i): the weight that each task really has, whatever the method, a user's too.

        The method's own parameters get their gradient here.

        Raises:
            ValueError: the total does not depend on the losses.
        """
        strategy, stacked = self.strategy, torch.stack(losses)
        # No task has a label in this batch, and absent losses may be constants. Other processes may have labels.
        if share is None and not stacked.requires_grad:
            return stacked, torch.zeros_like(stacked)
        # One of several processes sees the means over all of them, which have no graph.
        seen = stacked if share is None else values.clone().requires_grad_()
        total = strategy(seen.clone(), self.present)  # a method may compute in place
        own = [p for p in strategy.parameters() if p.requires_grad]
        weights, *found = torch.autograd.grad(total, [seen, *own], retain_graph=True, allow_unused=True)
        if weights is None:
            raise ValueError(
                f"{type(strategy).__name__}: the total does not depend on the losses, so it trains nothing; "
                "torch.tensor(...), .item() and .detach() cut it off from them"
            )
        gradients.add(own, [None if g is None else self._scaled(g) for g in found])
        weights = weights.detach()
        if self.switches.scale == "sum":
            weights = weights * _to_count(weights, self.present)
        return stacked, weights

    @torch.no_grad()
    def _combine(self, samples: list[list[Tensor]], values: Tensor, share: Tensor | None) -> Info:
        """Gradients of single tasks, merged by their weights or by the method's own rule."""
        strategy, losses = self.strategy, samples[-1]
        weights = None
        if isinstance(strategy, LossWeighting):
            with torch.enable_grad():
                self._regularise(losses)
                _, weights = self._weights_of_losses(losses, values, share)
        jacobian, own, cross = self._jacobians(samples, share)
        if self.inspect is not None:
            self.inspect(jacobian)
        gramian = jacobian @ jacobian.T
        if self.of_features and self.replicas is not None:  # each process has the gradients of its own samples
            (gramian,) = self.replicas.total(gramian)
        if not self.shared and not self.of_features and not isinstance(strategy, LossWeighting):
            for parameters, found in zip(self.heads, own, strict=True):  # a frozen backbone: nothing to balance
                gradients.add(parameters, found)
            return Info(None, torch.zeros_like(values[0]))
        untouched = None
        keeps = strategy.lazy or any(True for _ in strategy.buffers()) or values.device.type == "cpu"  # its draws
        if keeps and not isinstance(strategy, LossWeighting):
            finite = values.isfinite().all() & gramian.isfinite().all() & _finite(own)
            # A copy of the buffers costs as much as the Jacobian. On a CPU it is known beforehand that none is needed.
            untouched = None if guard.host(finite[None]) == [True] else guard.Untouched(strategy)
        direction, weights = self._direction(jacobian, gramian if cross is None else cross, weights, values)
        if untouched:
            untouched.unless(finite)
        norm = (weights @ gramian @ weights).clamp(min=0).sqrt() if self._apart else direction.norm()
        equal = gramian.sum().clamp(min=torch.finfo(gramian.dtype).tiny).sqrt()
        factor = self._factor(norm, equal)
        if factor is not None:
            direction, norm = direction * factor, norm * factor
        self._heads(losses, own, weights)
        shared_norm = self._write(direction, norm)
        if self.per_task:
            rows = jacobian * (weights if factor is None else weights * factor)[:, None]
            _leave_rows(self.shared, self._scaled(rows), self.present)
        similarity = _similarity(gramian, self.present) if len(losses) > 1 else (None, None, None)
        if factor is not None and weights is not None:
            weights = weights * factor
        return Info(weights, shared_norm, norm / equal, *similarity)

    @property
    def _apart(self) -> bool:
        """Whether the direction is one of features that are spread over several processes."""
        return self.of_features and self.replicas is not None

    def _direction(
        self, jacobian: Tensor, gramian: Tensor, weights: Tensor | None, values: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(P,) the update before clipping, and (T,) the weights that it has, if it has weights."""
        strategy, summed = self.strategy, self.switches.scale == "sum"
        if isinstance(strategy, JacobianAggregation):
            features = self.features if self.of_features else None
            with self._own_gradients_scaled():
                result = strategy.aggregate(jacobian, self.present, values, features)
            direction, weights = result if isinstance(result, tuple) else (result, None)
            if summed:
                share = _to_count(weights, self.present)
                direction, weights = direction * share, weights * share
            return direction, weights
        if isinstance(strategy, GramianWeighting):
            with self._own_gradients_scaled():
                weights = strategy.weights(gramian, self.present, values).to(jacobian)
            if summed:
                weights = weights * _to_count(weights, self.present)
        return weights @ jacobian, weights

    @contextmanager
    def _own_gradients_scaled(self) -> Iterator[None]:
        """What a method writes into its own parameters' `.grad` in here (RotoGrad) gets the scale of all others."""
        own = [] if self.scale is None else list(self.strategy.parameters())
        before = [p.grad for p in own]
        for p in own:
            p.grad = None
        yield
        for p, earlier in zip(own, before, strict=True):
            found, p.grad = p.grad, earlier
            gradients.add([p], [None if found is None else self._scaled(found)])

    def _factor(self, norm: Tensor, equal: Tensor) -> Tensor | None:
        """() what scale=norm or the method's own clip multiplies the shared gradient by."""
        tiny = torch.finfo(norm.dtype).tiny
        if self.switches.scale == "norm":
            return equal / norm.clamp(min=tiny)
        if self.switches.scale == "paper" and self.strategy.max_norm is not None:
            return (self.strategy.max_norm / norm.clamp(min=tiny)).clamp(max=1.0)
        return None

    def _heads(self, losses: list[Tensor], own: list[list[Tensor | None]], weights: Tensor | None) -> None:
        """Give each head its own gradient, with the method's weight and terms. `own` holds scaled gradients."""
        strategy = self.strategy
        if overrides(strategy, GramianWeighting, "head_terms"):
            true = own if self.scale is None else [[None if g is None else g / self.scale for g in h] for h in own]
            losses, _ = self._without_absent(losses)
            with torch.enable_grad(), self._nothing_hidden():
                terms = strategy.head_terms(losses, self.features, weights, self.heads, true)
            for parameters, found in zip(self.heads, terms or [], strict=False):
                gradients.add(parameters, [None if g is None else self._scaled(g) for g in found])
        factors = _head_weights(strategy, weights, self.switches)
        if self.per_task:
            for i, parameters in enumerate(self.heads):
                for p in parameters:
                    leave_presence(p, None if self.present is None else self.present[i : i + 1])
        for i, (parameters, found) in enumerate(zip(self.heads, own, strict=True)):
            if factors is not None:
                found = [None if g is None else factors[i] * g for g in found]
            gradients.add(parameters, found)

    def _write(self, direction: Tensor, norm: Tensor) -> Tensor:
        """Add the shared gradient to `.grad`; return its () norm as this call left it."""
        direction = self._scaled(direction)
        if self.per_task:
            for p in self.shared:
                settle(p)
        if not self.of_features:
            gradients.add(self.shared, gradients.pieces(self.shared, direction))
            if overrides(self.strategy, LossWeighting, "regulariser"):
                return self._unscaled(gradients.norm(self.shared))
            return norm
        seed = direction.view_as(self.features).to(self.features.dtype)
        if self.replicas is None:
            with torch.enable_grad():
                self.features.backward(seed)
        else:  # by hand: DistributedDataParallel would wait for the heads, whose gradients are already there
            with torch.enable_grad():
                found = torch.autograd.grad(self.features, self.shared, seed, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.shared, found, strict=True)]
            gradients.add(self.shared, self.replicas.total(*found))
        return self._unscaled(gradients.norm(self.shared))

    def _jacobians(
        self, samples: list[list[Tensor]], share: Tensor | None
    ) -> tuple[Tensor, list[list[Tensor | None]], Tensor | None]:
        """The (T, P) Jacobian to combine, each head's own gradients (mean over the batches), J₁J₂ᵀ of two batches."""
        jacobian, own = self._jacobian(samples[0], share)
        if len(samples) == 1:
            return jacobian, own, None
        heads_of = [own]
        second, own = self._jacobian(samples[1], share)
        heads_of.append(own)
        cross = jacobian @ second.T
        if len(samples) == 2:
            jacobian = jacobian.add_(second).div_(2)
        else:
            jacobian, own = self._jacobian(samples[2], share)
            heads_of.append(own)
        mean = []
        for parts in zip(*heads_of, strict=True):  # one head, all batches
            found = [[g for g in batches if g is not None] for batches in zip(*parts, strict=True)]
            mean.append([sum(batches) / len(samples) if batches else None for batches in found])
        return jacobian, mean, cross

    def _jacobian(self, losses: list[Tensor], share: Tensor | None) -> tuple[Tensor, list[list[Tensor | None]]]:
        """(T, P) and each head's own gradients, of one batch, over all processes."""
        # The graph stays for what follows: feature gradients on their way through the backbone, or terms of the heads.
        keep = self.of_features or overrides(self.strategy, GramianWeighting, "head_terms")
        where = [self.features] if self.of_features else self.shared
        rows, own, reached = gradients.jacobian(losses, where, self.heads, keep, self.scale)
        if where:
            maybe = self._maybe_absent() if share is None else [True] * len(losses)
            for i, there in enumerate(reached):
                if not there and not maybe[i]:
                    reach.check_shared(i, self.strategy.names[i], reach.reach(losses[i]), visible=False)
        if self.present is not None:  # 0 times the slope of a NaN is NaN
            here = self.present if share is None else share > 0
            rows = torch.where(here[:, None], rows, 0.0)
            own = [[g if g is None or g.is_sparse else torch.where(h, g, 0.0) for g in head]
                   for h, head in zip(here, own, strict=True)]  # fmt: skip
        if share is not None:
            rows *= share[:, None]
            if not self.of_features:
                (rows,) = self.replicas.total(rows)
            own = self.replicas.heads(self.heads, own, share)
        return rows, own

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.scale is None else value * self.scale

    def _unscaled(self, value: Tensor) -> Tensor:
        return value if self.scale is None else value / self.scale


def _finite(own: list[list[Tensor | None]]) -> Tensor | bool:
    """() whether the heads' gradients are finite."""
    found = [g.to_dense() if g.is_sparse else g for head in own for g in head if g is not None]
    return torch.nn.utils.get_total_norm(found).isfinite() if found else True


def _only(present: Tensor | None, losses: list[Tensor]) -> list[Tensor]:
    """The losses, with a constant 0 for an absent task: whatever a caller put there reaches no parameter."""
    if present is None:
        return losses
    return [torch.where(p, loss, torch.zeros_like(loss)) for p, loss in zip(present, losses, strict=True)]


def _to_count(weights: Tensor, present: Tensor | None) -> Tensor:
    """() the factor by which the weights' sizes add up to the number of tasks; a sum with signs could be 0 or less."""
    total = weights.abs().sum()
    return torch.where(total > 0, count(present, weights) / total, 1.0)


def _head_weights(strategy: Strategy, weights: Tensor | None, switches: Switches) -> Tensor | None:
    """(T,) what each head's own gradient is multiplied by; None leaves them alone."""
    if switches.heads == "own":
        return None
    if switches.heads == "weighted" or isinstance(strategy, LossWeighting):
        return weights
    return strategy.head_weights(weights)


def _similarity(gramian: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Over the pairs of present tasks: mean cosine, share of negative cosines, mean magnitude similarity."""
    tiny = torch.finfo(gramian.dtype).tiny
    squares = gramian.diagonal()
    rows, columns = torch.triu_indices(len(gramian), len(gramian), 1, device=gramian.device)
    products = squares[rows].sqrt() * squares[columns].sqrt()
    cosines = gramian[rows, columns] / products.clamp(min=tiny)
    magnitudes = 2 * products / (squares[rows] + squares[columns]).clamp(min=tiny)
    pairs = torch.ones_like(cosines) if present is None else (present[rows] & present[columns]).to(cosines)
    total = pairs.sum().clamp(min=1)
    return (cosines * pairs).sum() / total, ((cosines < 0) * pairs).sum() / total, (magnitudes * pairs).sum() / total


def _leave_rows(shared: list[Parameter], rows: Tensor, present: Tensor | None) -> None:
    """Add each task's (T, P) gradient to `task_grads`, for the optimizers that keep statistics for each task."""
    for p, part in zip(shared, rows.split([p.numel() for p in shared], dim=1), strict=True):
        leave(p, part.view(len(rows), *p.shape), present)
