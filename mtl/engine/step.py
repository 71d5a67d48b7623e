"""`mtl.Step`: one update with any method, from a function that computes the losses of a part of the batch.

Some methods need more than one backward pass: fresh batches, steps that are tried out, a second look at the losses.
`Step` makes these passes, each when its method needs it, and calls the method's hooks. The engine, the certificates and
foreign loops all use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mtl.engine import arguments
from mtl.engine.accumulate import Gradients, accumulate
from mtl.engine.accumulate import norm as gradient_norm
from mtl.engine.backward import gradients
from mtl.engine.backward_pass import Owners
from mtl.engine.switches import PAPER, Info, Switches
from mtl.losses import Equal, Statistics, Strategy
from mtl.losses.hooks import defines
from mtl.random import derive


@dataclass
class Losses:
    """What one forward pass found.

    Attributes:
        values: T scalar losses with their graph, as in `mtl.backward`.
        features: the tensor that all heads start from; only methods that work on features need it.
    """

    values: Sequence[Tensor] | Tensor | Mapping[str, Tensor]
    features: Tensor | None = None


Forward = Callable[[slice], Losses | Sequence[Tensor] | Tensor | Mapping[str, Tensor]]


class Observer(Protocol):
    """Something that looks at a step without changing it, such as the gradient microscope."""

    def before(self, passes: Sequence[Losses]) -> None:
        """Before the backward pass: what the forward passes found, with their graphs."""

    def jacobian(self, jacobian: Tensor) -> None:
        """The (T, P) Jacobian that the step combines, if it takes one; not to be kept or changed."""

    def after(self, weights: Tensor | None) -> None:
        """After the backward pass: the (T,) weights of the tasks, if the method has weights."""


class Step:
    """One update of all parameters with any method.

    Example::

        step = mtl.Step(strategy, optimizer, shared=model.backbone, heads=model.heads)
        for images, labels in loader:
            step(lambda part: losses(model(images[part]), labels[part]), size=len(images))

    Args:
        strategy: of any family.
        optimizer: over the parameters of the model and of the strategy.
        shared, heads: as in `mtl.backward`.
        switches: variations of the step.
        model: the modules whose batch norm averages are left alone in passes that only try something out. Without it
            these are the modules among `shared` and `heads`.
        scaler: the GradScaler of mixed precision; `Step` calls its `step` and `update`.
        max_norm: norm to which the gradient of all the optimizer's parameters is clipped; None does not clip.

    Raises:
        ValueError: the optimizer cannot work with this strategy or these switches.
    """

    def __init__(
        self,
        strategy: Strategy,
        optimizer: torch.optim.Optimizer,
        shared: Owners,
        heads: Sequence[Owners] | Mapping[str, Owners] | None = None,
        *,
        switches: Switches = PAPER,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
    ):
        self.strategy, self.optimizer, self.switches = strategy, optimizer, switches
        self.scaler, self.max_norm = scaler, max_norm
        self._shared, self._heads = _kept(shared), _kept(heads)
        self._modules = list(_modules(self._shared, self._heads)) if model is None else [model]
        self._per_task = getattr(optimizer, "per_task", False)
        self._alternates = getattr(optimizer, "alternates", False)
        self._sums: list[Tensor] | None = None
        self._epoch = False  # whether the caller tells us of epochs; the engine has the mean losses already
        self._checked = False  # whether the optimizer holds the model; groups may be added until the first step
        switches.check(strategy)
        if self._alternates and (type(strategy) is not Equal or switches != PAPER):
            raise ValueError(
                f"optimizer: with {type(optimizer).__name__} the tasks take turns and nothing is left to weigh; "
                "use the strategy Equal and no switches"
            )
        if self._alternates and scaler is not None:
            raise ValueError(f"scaler: {type(optimizer).__name__} makes one step for each task and takes no GradScaler")
        if self._per_task:
            switches.check_per_task(strategy)

    def __call__(
        self, forward: Forward, size: int, labelled: Tensor | None = None, observer: Observer | None = None
    ) -> Info:
        """Make one update.

        Args:
            forward: forward(part) makes a fresh forward pass over the samples `part`, a slice, of the batch. It returns
                their T losses, or `Losses`.
            size: number N of samples in the batch.
            labelled: (N, T) bool, False where a sample has no label of that task; None where all have all. A task is
                absent from a part of the batch in which no sample has its label.
            observer: looks at this step.

        Returns:
            what the backward pass did, with the forward passes that it was made of in `passes`: one, or one for each
            independent batch, or one for each task's turn.

        Raises:
            ValueError, TypeError, RuntimeError: as `mtl.backward`; or the batch is too small to be divided.
        """
        strategy, whole = self.strategy, slice(0, size)
        if not callable(forward):
            example = "step(lambda part: losses(model(x[part]), y[part]), size=len(x))"
            raise TypeError(f"forward: a {type(forward).__name__}, not a function of a part of the batch: {example}")
        if not self._checked:
            self._check_optimizer()
        if defines(strategy, "look_ahead"):
            self._look_ahead(forward, size, labelled)
        if self._alternates:
            info = self._take_turns(forward, whole, _present(labelled, [whole]), observer)
            self._add_up(info.passes, size, labelled)
            return info
        parts = _parts(size, strategy.samples)
        present = _present(labelled, parts)
        passes = [_losses(forward(part)) for part in parts]
        self.optimizer.zero_grad(set_to_none=True)
        if observer is not None:
            observer.before(passes)
        values = [one.values for one in passes] if len(passes) > 1 else passes[0].values
        found = gradients(
            values, strategy, self._shared, self._heads, present, passes[0].features, self.switches, self.scaler,
            each=self._per_task, inspect=None if observer is None else observer.jacobian,
        )  # fmt: skip
        info, tasks = accumulate(found), _tasks(found) if self._per_task else {}
        del found  # the gradients of the tasks take much memory
        if observer is not None:
            observer.after(info.weights)
        with self._resting(present):
            self._update(tasks)
        if defines(strategy, "after_step"):
            # The same samples under the new parameters.
            with torch.no_grad(), self._frozen_statistics():
                again = _losses(forward(whole))
            strategy.after_step(torch.stack(self.switches.transformed(self._scalars(again))), present)
        self._add_up(passes, size, labelled)
        return replace(info, passes=tuple(passes))

    # -- epochs -------------------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int, seed: int | None = None) -> None:
        """Tell the method that epoch number `epoch` of `epochs`, counted from 0, begins."""
        self.strategy.epoch_start(epoch, epochs, seed)
        self._sums, self._epoch = None, True

    def end_epoch(self, scores: Tensor | None = None, higher_is_better: Tensor | None = None) -> None:
        """Tell the method how the epoch went.

        The mean losses of the epoch's steps are known here.

        Args:
            scores: (T,) each task's main metric, where the method learns from it; accuracies in percent.
            higher_is_better: (T,) bool, the direction of the scores.

        Raises:
            RuntimeError: no step was made since `start_epoch`.
        """
        if not defines(self.strategy, "epoch_end"):
            return
        if self._sums is None:
            raise RuntimeError("end_epoch: no step was made since start_epoch")
        total, counts = self._sums
        means = torch.where(counts > 0, total / counts, torch.nan)  # NaN: no label all epoch
        self._sums = None
        self.strategy.epoch_end(Statistics(means, scores, higher_is_better))

    @torch.no_grad()
    def _add_up(self, passes: Sequence[Losses], size: int, labelled: Tensor | None) -> None:
        """Add the losses to the epoch's sums, each as often as it has labelled samples."""
        if not self._epoch or not defines(self.strategy, "epoch_end"):
            return
        parts = [slice(0, size)] * len(passes) if self._alternates else _parts(size, len(passes))
        for one, part in zip(passes, parts, strict=True):
            losses = torch.stack(self._scalars(one)).detach()
            if labelled is None:
                counts = torch.full_like(losses, part.stop - part.start)
            else:
                counts = labelled[part].sum(0).to(losses)
            total = torch.where(counts > 0, losses * counts, 0.0)
            self._sums = [total, counts] if self._sums is None else [self._sums[0] + total, self._sums[1] + counts]

    # -- the parts of a step ------------------------------------------------------------------------------------------

    def _scalars(self, found: Losses) -> list[Tensor]:
        return arguments.scalars("losses", found.values, self.strategy.names)

    def _check_optimizer(self) -> None:
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        known.update(id(p) for p in self.strategy.parameters())
        for name, owner in (("shared", self._shared), ("heads", [] if self._heads is None else self._heads)):
            left = sum(p.requires_grad and id(p) not in known for p in arguments.parameters(name, owner))
            if left:
                raise ValueError(
                    f"optimizer: lacks {left} trainable parameters of {name}, which would never be trained; "
                    "add them to it, or freeze them with requires_grad_(False)"
                )
        self._checked = True

    def _update(self, tasks: Mapping[str, Any]) -> None:
        """Clip, and make the optimizer's step.

        Args:
            tasks: the further arguments of an optimizer that keeps statistics for each task; else empty.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.max_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
            for rows in tasks.get("rows", {}).values():  # their sum stays the gradient
                rows *= (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.scaler is None:
            self.optimizer.step(**tasks)
        else:
            self.scaler.step(self.optimizer, **tasks)
            self.scaler.update()

    def _take_turns(self, forward: Forward, whole: slice, present: Tensor | None, observer: Observer | None) -> Info:
        """MTL-IO: each task in turn makes a forward pass and a step with its own optimizer."""
        if observer is not None:  # at the weights before all turns, so in a forward pass of its own
            with self._frozen_statistics(), torch.random.fork_rng(self._devices):
                observer.before([_losses(forward(whole))])
            observer.after(None)
        passes, tasks = [], self.strategy.tasks
        for k in range(tasks):
            passes.append(_losses(forward(whole)))
            loss = self._scalars(passes[k])[k]
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step_task(k, tasks, None if present is None else present[k : k + 1])
        shared = arguments.shared_parameters(self._shared, self.strategy)
        norm = gradient_norm(shared) if shared else torch.zeros((), device=loss.device)
        return Info(torch.ones(tasks, device=loss.device), norm, passes=tuple(passes))

    def _look_ahead(self, forward: Forward, size: int, labelled: Tensor | None) -> None:
        halves, seed = _parts(size, 2), self.strategy.base_seed()

        def losses_of(k: int) -> Tensor:
            # The same dropout masks at every call: methods take differences of these losses.
            with torch.random.fork_rng(self._devices):
                torch.manual_seed(derive(seed, "look_ahead", k))
                found = _losses(forward(halves[k]))
            return torch.stack(self.switches.transformed(self._scalars(found)))

        own = {id(p) for p in self.strategy.parameters()}
        groups = self.optimizer.param_groups
        parameters = [p for g in groups for p in g["params"] if p.requires_grad and id(p) not in own]
        with self._frozen_statistics():
            self.strategy.look_ahead(losses_of, parameters, groups[0]["lr"], _present(labelled, halves))

    @property
    def _devices(self) -> list[torch.device]:
        """The GPUs whose random stream must stay as it is in a pass that tries something out."""
        return list({p.device for g in self.optimizer.param_groups for p in g["params"] if p.device.type == "cuda"})

    @contextmanager
    def _resting(self, present: Tensor | None) -> Iterator[None]:
        """Undo the optimizer's update of what the method has learned of an absent task; momentum would move it."""
        own = [] if present is None else [p for p in self.strategy.parameters() if p.shape[:1] == present.shape]
        states = [s for p in own for s in self.optimizer.state.get(p, {}).values()]
        kept = [(t, t.detach().clone()) for t in (*own, *states) if torch.is_tensor(t) and t.shape[:1] == present.shape]
        yield
        with torch.no_grad():
            for tensor, old in kept:
                tensor.copy_(torch.where(present.view(-1, *[1] * (old.ndim - 1)), tensor, old))

    @contextmanager
    def _frozen_statistics(self) -> Iterator[None]:
        """Forward passes in here normalise by the batch, as in training, but leave the running averages alone."""
        norms = [m for one in self._modules for m in one.modules() if getattr(m, "track_running_stats", False)]
        for m in norms:
            m.track_running_stats = False
        try:
            yield
        finally:
            for m in norms:
                m.track_running_stats = True


def _tasks(found: Gradients) -> dict[str, Any]:
    """What an optimizer with statistics for each task needs to know: see `AdaTask.step`."""
    one, rows, present = found.one, {}, {}
    if found.rows is not None:
        parts = found.rows.split([p.numel() for p in one.shared], dim=1)
        rows = {p: part.view(-1, *p.shape) for p, part in zip(one.shared, parts, strict=True)}
    if one.present is not None:
        present = {p: one.present[i : i + 1] for i, head in enumerate(one.heads) for p in head}
        present |= dict.fromkeys(rows, one.present)
    return {"rows": rows, "present": present}


def _losses(found: Any) -> Losses:
    """What `forward` returned, as `Losses`."""
    return found if isinstance(found, Losses) else Losses(found)


def _parts(size: int, count: int) -> list[slice]:
    """`count` parts of `size` samples, as equal as they can be; the first ones are larger.

    Raises:
        ValueError: one would be empty.
    """
    if size < count:
        raise ValueError(f"size: a batch of {size} samples cannot be divided into {count} parts")
    small, larger = divmod(size, count)
    starts = [k * small + min(k, larger) for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(starts)]


def _present(labelled: Tensor | None, parts: Sequence[slice]) -> Tensor | None:
    """(T,) bool: the tasks with labels in every part, which is what comparing the parts needs."""
    return None if labelled is None else torch.stack([labelled[part].any(0) for part in parts]).all(0)


def _kept(given: Any) -> Any:
    """The owners of parameters, with lists in place of generators, which can be read once only."""
    if given is None or isinstance(given, nn.Module | nn.Parameter):
        return given
    if isinstance(given, Mapping):
        return {name: _kept(owner) for name, owner in given.items()}
    if isinstance(given, str) or not isinstance(given, Iterable):
        return given
    return (tuple if isinstance(given, tuple) else list)(_kept(owner) for owner in given)


def _modules(shared: Owners, heads: Any) -> Iterable[nn.Module]:
    """The modules among the owners of parameters."""
    for owner in (shared, heads, *(heads.values() if isinstance(heads, Mapping) else heads or ())):
        if isinstance(owner, nn.Module):
            yield owner
