"""`mtl.Step`: one update with any method, from a function that computes the losses of a part of the batch.

Most methods need one forward and one backward pass per step. A few need more: gradients of independent batches, steps
that are tried and undone, or the losses after the update. `Step` makes exactly the passes that its method needs, and
calls the method's hooks. The engine, the certificates and a user's own training loop all use this class.
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
    """The result of one forward pass.

    Attributes:
        values: T scalar losses with their graph, as in `mtl.backward`.
        features: the tensor that all heads start from; only methods that work on features need it.
    """

    values: Sequence[Tensor] | Tensor | Mapping[str, Tensor]
    features: Tensor | None = None


# forward(part) computes the losses of the samples `part` of the batch. It is a function, and not a list of losses,
# because some methods compute the losses more than once: on parts of the batch, or under changed parameters.
Forward = Callable[[slice], Losses | Sequence[Tensor] | Tensor | Mapping[str, Tensor]]


class Observer(Protocol):
    """Something that measures a step without changing it, such as the gradient microscope."""

    def before(self, passes: Sequence[Losses]) -> None:
        """Called before the backward pass, with the results of the forward passes and their graphs."""

    def jacobian(self, jacobian: Tensor) -> None:
        """Called with the (T, P) Jacobian that the step combines, if there is one. Do not keep or change it."""

    def after(self, weights: Tensor | None) -> None:
        """Called after the backward pass, with the (T,) task weights if the method has weights."""


class Step:
    """One update of all parameters with any method.

    Example::

        step = mtl.Step(strategy, optimizer, shared=model.backbone, heads=model.heads)
        for images, labels in loader:
            step(lambda part: losses(model(images[part]), labels[part]), size=len(images))

    Args:
        strategy: the method, of any family.
        optimizer: holds the parameters of the model and of the strategy.
        shared, heads: as in `mtl.backward`.
        switches: variations of the step.
        model: the module whose batch norm averages stay unchanged in trial passes. If it is not given, the modules
            among `shared` and `heads` are used.
        scaler: the GradScaler of mixed precision; `Step` calls its `step` and `update`.
        max_norm: the gradient of all the optimizer's parameters is clipped to this norm; None does not clip.

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
        self._sums: list[Tensor] | None = None  # (T,) summed losses and (T,) numbers of samples, since `start_epoch`
        # `Step` sums the losses only for callers of `start_epoch`. The engine does not call it: it has its own sums.
        self._epoch = False
        # The optimizer must hold the whole model. The first step checks it: until then, groups may still be added.
        self._checked = False
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
            forward: forward(part) makes a fresh forward pass over a part of the batch. `part` is a slice of sample
                numbers. It returns the part's T losses, or `Losses`.
            size: number N of samples in the batch.
            labelled: (N, T) bool, False where a sample has no label of that task. None: every sample has every label.
                A task is absent from a part of the batch if no sample of the part has its label.
            observer: measures this step.

        Returns:
            the report of the backward pass. Its `passes` holds the forward passes of the step: one, or one for each
            independent batch, or one for each task's turn.

        Raises:
            ValueError, TypeError, RuntimeError: as `mtl.backward`; or the batch has too few samples to be divided.
        """
        strategy, whole = self.strategy, slice(0, size)
        if not callable(forward):
            example = "step(lambda part: losses(model(x[part]), y[part]), size=len(x))"
            raise TypeError(f"forward: a {type(forward).__name__}, not a function of a part of the batch: {example}")
        if not self._checked:
            self._check_optimizer()
        # Most methods skip this. Auto-Lambda, for example, tries a step on one half of the batch, and measures its
        # effect on the losses of the other half. From this it learns its weights. The model stays as it was.
        if defines(strategy, "look_ahead"):
            self._look_ahead(forward, size, labelled)
        if self._alternates:  # only the optimizer MTL-IO: T small updates in place of one
            info = self._take_turns(forward, whole, _present(labelled, [whole]), observer)
            self._add_up(info.passes, size, labelled)
            return info
        # `samples` is 1 for most methods: then there is one part, the whole batch. MoDo, for example, needs gradients
        # of two independent batches. The halves of one batch serve as such: they have no sample in common.
        parts = _parts(size, strategy.samples)
        present = _present(labelled, parts)
        passes = [_losses(forward(part)) for part in parts]
        self.optimizer.zero_grad(set_to_none=True)  # None and not 0: the optimizer skips parameters without a gradient
        if observer is not None:
            observer.before(passes)
        # From here on `.grad` is written: `gradients` computes what to add, `accumulate` adds it.
        values = [one.values for one in passes] if len(passes) > 1 else passes[0].values
        found = gradients(
            values, strategy, self._shared, self._heads, present, passes[0].features, self.switches, self.scaler,
            each=self._per_task, inspect=None if observer is None else observer.jacobian,
        )  # fmt: skip
        info, tasks = accumulate(found), _tasks(found) if self._per_task else {}
        del found  # frees the tasks' gradients, which take T times the model's memory, before the optimizer's step
        if observer is not None:
            observer.after(info.weights)
        with self._resting(present):  # an absent task's log variance, for example, does not move
            self._update(tasks)
        if defines(strategy, "after_step"):
            # FAMO, for example, compares the losses of the same samples before and after the update.
            with torch.no_grad(), self._frozen_statistics():
                again = _losses(forward(whole))
            strategy.after_step(torch.stack(self.switches.transformed(self._scalars(again))), present)
        self._add_up(passes, size, labelled)
        return replace(info, passes=tuple(passes))

    # -- epochs -------------------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int, seed: int | None = None) -> None:
        """Announce to the method that an epoch begins.

        Args:
            epoch: number of this epoch, counted from 0.
            epochs: number of epochs of the training.
            seed: seed of the method's random stream. None keeps the last one; the first time, `torch.manual_seed`'s.
        """
        self.strategy.epoch_start(epoch, epochs, seed)
        self._sums, self._epoch = None, True

    def end_epoch(self, scores: Tensor | None = None, higher_is_better: Tensor | None = None) -> None:
        """Give the method the epoch's results. The mean training losses come from the steps made since `start_epoch`.

        Args:
            scores: (T,) each task's main metric; accuracies in percent. Only some methods need scores, such as DTP.
            higher_is_better: (T,) bool, False for metrics that are errors.

        Raises:
            RuntimeError: no step was made since `start_epoch`.
        """
        if not defines(self.strategy, "epoch_end"):
            return
        if self._sums is None:
            raise RuntimeError("end_epoch: no step was made since start_epoch")
        total, counts = self._sums
        means = torch.where(counts > 0, total / counts, torch.nan)  # NaN: the task had no label in the whole epoch
        self._sums = None
        self.strategy.epoch_end(Statistics(means, scores, higher_is_better))

    @torch.no_grad()
    def _add_up(self, passes: Sequence[Losses], size: int, labelled: Tensor | None) -> None:
        """Add the losses to the epoch's sums, each multiplied by its number of labelled samples."""
        if not self._epoch or not defines(self.strategy, "epoch_end"):
            return
        # When tasks take turns, each pass saw the whole batch. Otherwise each pass saw its own part.
        parts = [slice(0, size)] * len(passes) if self._alternates else _parts(size, len(passes))
        for one, part in zip(passes, parts, strict=True):
            losses = torch.stack(self._scalars(one)).detach()
            if labelled is None:
                counts = torch.full_like(losses, part.stop - part.start)
            else:
                counts = labelled[part].sum(0).to(losses)
            total = torch.where(counts > 0, losses * counts, 0.0)  # an absent task's loss may be NaN; NaN · 0 is NaN
            self._sums = [total, counts] if self._sums is None else [self._sums[0] + total, self._sums[1] + counts]

    # -- the parts of a step ------------------------------------------------------------------------------------------

    def _scalars(self, found: Losses) -> list[Tensor]:
        return arguments.scalars("losses", found.values, self.strategy.names)

    def _check_optimizer(self) -> None:
        """Check that the optimizer holds all trainable parameters of the model.

        Raises:
            ValueError: it lacks some, which would silently never be trained.
        """
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
            tasks: further arguments for an optimizer with statistics for each task (AdaTask). Empty for all others.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.max_norm is not None:
            if self.scaler is not None:  # the norm must be measured on the true gradient
                self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
            # AdaTask's rows, one gradient for each task, must still add up to the clipped gradient.
            for rows in tasks.get("rows", {}).values():
                rows *= (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.scaler is None:
            self.optimizer.step(**tasks)
        else:
            self.scaler.step(self.optimizer, **tasks)
            self.scaler.update()

    def _take_turns(self, forward: Forward, whole: slice, present: Tensor | None, observer: Observer | None) -> Info:
        """MTL-IO: each task in turn makes a forward pass, and a step with its own optimizer."""
        # All tasks are observed at the same weights, before the first turn. This takes a forward pass of its own, which
        # must leave no trace: neither in the random stream nor in the batch norm averages.
        if observer is not None:
            with self._frozen_statistics(), torch.random.fork_rng(self._devices):
                observer.before([_losses(forward(whole))])
            observer.after(None)
        passes, tasks = [], self.strategy.tasks
        for k in range(tasks):
            # A fresh pass for each task, because the turn before has changed the shared parameters.
            passes.append(_losses(forward(whole)))
            loss = self._scalars(passes[k])[k]
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step_task(k, tasks, None if present is None else present[k : k + 1])
        shared = arguments.shared_parameters(self._shared, self.strategy)
        norm = gradient_norm(shared) if shared else torch.zeros((), device=loss.device)
        return Info(torch.ones(tasks, device=loss.device), norm, passes=tuple(passes))

    def _look_ahead(self, forward: Forward, size: int, labelled: Tensor | None) -> None:
        """Let the method try steps: one half of the batch may give the gradient, the other one the losses after it."""
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
        """The GPUs whose random streams must not change in a trial pass."""
        return list({p.device for g in self.optimizer.param_groups for p in g["params"] if p.device.type == "cuda"})

    @contextmanager
    def _resting(self, present: Tensor | None) -> Iterator[None]:
        """Undo the optimizer's update of an absent task's own parameters in the method, such as its log variance.

        Their gradient is 0, but the optimizer's momentum would still move them.
        """
        # Only tensors with one row for each task are concerned: the row of an absent task is put back.
        own = [] if present is None else [p for p in self.strategy.parameters() if p.shape[:1] == present.shape]
        states = [s for p in own for s in self.optimizer.state.get(p, {}).values()]
        kept = [(t, t.detach().clone()) for t in (*own, *states) if torch.is_tensor(t) and t.shape[:1] == present.shape]
        yield
        with torch.no_grad():
            for tensor, old in kept:
                tensor.copy_(torch.where(present.view(-1, *[1] * (old.ndim - 1)), tensor, old))

    @contextmanager
    def _frozen_statistics(self) -> Iterator[None]:
        """Inside, batch norm uses the batch's statistics, as in training, but its running averages do not change."""
        norms = [m for one in self._modules for m in one.modules() if getattr(m, "track_running_stats", False)]
        for m in norms:
            m.track_running_stats = False
        try:
            yield
        finally:
            for m in norms:
                m.track_running_stats = True


def _tasks(found: Gradients) -> dict[str, Any]:
    """The arguments for an optimizer with statistics for each task: see `AdaTask.step`."""
    one, rows, present = found.one, {}, {}
    if found.rows is not None:
        parts = found.rows.split([p.numel() for p in one.shared], dim=1)
        rows = {p: part.view(-1, *p.shape) for p, part in zip(one.shared, parts, strict=True)}
    # A head's parameter depends on its own task only. A shared one has a row of statistics for each task.
    if one.present is not None:
        present = {p: one.present[i : i + 1] for i, head in enumerate(one.heads) for p in head}
        present |= dict.fromkeys(rows, one.present)
    return {"rows": rows, "present": present}


def _losses(found: Any) -> Losses:
    """The result of `forward` as `Losses`."""
    return found if isinstance(found, Losses) else Losses(found)


def _parts(size: int, count: int) -> list[slice]:
    """Divide `size` samples into `count` parts of nearly equal size, larger ones first: 7 into 2 gives 4 and 3.

    Raises:
        ValueError: a part would be empty.
    """
    if size < count:
        raise ValueError(f"size: a batch of {size} samples cannot be divided into {count} parts")
    small, larger = divmod(size, count)
    starts = [k * small + min(k, larger) for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(starts)]


def _present(labelled: Tensor | None, parts: Sequence[slice]) -> Tensor | None:
    """(T,) bool: the tasks that have labels in every part. Only for them can a method compare the parts."""
    return None if labelled is None else torch.stack([labelled[part].any(0) for part in parts]).all(0)


def _kept(given: Any) -> Any:
    """Copy generators into lists: `model.parameters()` can be read once only, and every step reads it."""
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
