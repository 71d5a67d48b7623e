"""Bookkeeping of a strategy's hooks: which hooks has the training loop called, and which one has it forgotten?

Example: DWA learns from `epoch_end`. In a loop that never calls it, DWA would silently stay equal weighting. The engine
and `mtl.Step` call all hooks; a user's own loop with `mtl.backward` is checked here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import wraps
from inspect import Signature, signature
from typing import Any

import torch
import torch.distributed as dist

from mtl.losses import given, signatures

Across = Any  # mtl.engine.replicas.Replicas: the processes that share each batch
AVERAGED = ("after_step", "epoch_end")  # hooks whose arguments are averaged over the processes
MARKED = {"after_step": 1, "look_ahead": 3}  # hooks with an argument `present`, and its position after `self`, from 0
HOOKS = ("prepare", "views", "look_ahead", "after_step", "epoch_end")
of_all: Callable[[], Across] | None = None  # set by mtl.engine.replicas, which imports the methods
PATIENCE = 32  # steps within which `epoch_start` must be called, if the method depends on the progress
LONG = 5000  # steps within which `epoch_end` must be called, if the method learns from epochs
HINT = 1000  # steps after which a missing `epoch_end` gives a warning


@dataclass
class Calls:
    """The calls of a strategy's hooks so far.

    Attributes:
        steps: number of backward passes.
        prepared: whether prepare was called.
        viewed, looked: whether views, or look_ahead, was called since the last backward pass.
        waits: whether after_step has not been called yet for the last backward pass.
        epoch_starts, epoch_ends: number of calls of epoch_start and epoch_end.
        ended: whether epoch_end was called since the last epoch_start.
        since: number of steps since the last epoch_start.
    """

    steps: int = 0
    prepared: bool = False
    viewed: bool = False
    looked: bool = False
    waits: bool = False
    epoch_starts: int = 0
    epoch_ends: int = 0
    ended: bool = False
    since: int = 0

    def note(self, hook: str) -> None:
        """Note that a hook was called."""
        if hook == "prepare":
            self.prepared = True
        elif hook == "views":
            self.viewed = True
        elif hook == "look_ahead":
            self.looked = True
        elif hook == "after_step":
            self.waits = False
        else:
            self.epoch_ends, self.ended = self.epoch_ends + 1, True

    def state(self) -> dict[str, Any]:
        """The fields as plain numbers, for a checkpoint."""
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> Calls:
        """The inverse of `state`."""
        return Calls(**state)


def noted(hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method's `function` for `hook`, so that its calls are noted in `strategy.calls`.

    The wrapper also brings the arguments into one form: losses and scores, for example, become tensors of shape (T,).
    With several processes it averages them.

    Raises (when called):
        ValueError, TypeError: an argument cannot be brought into this form; the message names hook and argument.
    """
    # The method's author may have left out the argument `present`. Such a hook is `blind`: it is called without it, and
    # refused if a task is absent.
    parameters = signature(function)
    place = MARKED.get(hook, 0)
    blind = place and len(parameters.parameters) <= 1 + place and not _open(parameters)

    @wraps(function)
    def wrapper(strategy: Any, *args: Any, **kwargs: Any) -> Any:
        if blind:
            present = args[place] if len(args) > place else kwargs.pop("present", None)
            args = args[:place] + args[place + 1 :]
            if present is not None:
                present = given.vector(f"{hook}(present)", present, strategy.names).to(torch.bool)
                signatures.refuse_absent(strategy, hook, present)
        call = parameters.bind(strategy, *args, **kwargs)
        given.tidy(hook, call.arguments, strategy)
        if strategy.across is None and hook in AVERAGED:
            strategy.across = _known(strategy, hook)
        if strategy.across is not None and hook in AVERAGED:
            _average(call.arguments, strategy, hook)
        if hook == "after_step" and strategy.movement is not None:  # has the optimizer moved the model before it?
            strategy.movement.after_step(strategy)
        result = function(*call.args, **call.kwargs)
        strategy.calls.note(hook)
        return result

    wrapper.blind = blind
    return wrapper


def _open(parameters: Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD or p.kind is p.VAR_POSITIONAL for p in parameters.parameters.values())


def _known(strategy: Any, hook: str) -> Across | None:
    """The processes over which a hook averages, if it is called before this process's first `mtl.backward`.

    Usually the first `mtl.backward` decides. A strategy from a checkpoint knows whether all processes have trained it.
    Any other strategy notes in `alone` that it has learned from the values of one process. If the next `mtl.backward`
    is one of several processes, it is refused.
    """
    if not several() or strategy.group is None:
        return None
    if strategy.grouped and strategy.group == "auto" and of_all is not None:
        return of_all()
    strategy.alone = f"strategy.{hook}"
    return None


def several() -> bool:
    """Whether torch.distributed has started several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _average(call: dict[str, Any], strategy: Any, hook: str) -> None:
    """Replace one process's values by means over all processes: losses after a step, or statistics of an epoch."""
    if hook == "after_step":  # a blind hook has refused absent tasks already
        ((call["losses"], call["present"]),) = strategy.across.means(
            strategy, hook, [call["losses"]], [call.get("present")]
        )
        return
    # Each process sends losses and scores, even if it has no scores: otherwise the others would wait for them. The mean
    # is over the processes with a number. It is NaN if no process has one.
    statistics = call["statistics"]
    values = [statistics.losses, statistics.scores]
    known = [torch.zeros_like(values[0], dtype=torch.bool) if v is None else ~v.isnan() for v in values]
    found = strategy.across.means(strategy, hook, values, known)
    losses, scores = (means.where(anywhere, float("nan")) for means, anywhere in found)
    if statistics.scores is None and not found[1][1].any():
        scores = None
    call["statistics"] = replace(statistics, losses=losses, scores=scores)


def optional(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook of the base class that does nothing, so that `defines` can tell it from a method's own hook."""
    function.optional = True
    return function


def defines(strategy: Any, hook: str) -> bool:
    """Whether the method defines `hook` itself, so that it must be called."""
    return not hasattr(getattr(type(strategy), hook), "optional")


def knows_absent(strategy: Any) -> bool:
    """Whether all functions of the method take `present`, so that a task may be absent."""
    taken = all(signatures.taken(strategy, name, present=None) for name in (strategy.rule, "regulariser"))
    return taken and not any(getattr(getattr(type(strategy), hook), "blind", False) for hook in MARKED)


def needs_features(strategy: Any) -> bool:
    """Whether the method cannot do without the features: a function of its own takes them, without a default."""
    return any(
        defines(strategy, hook) and signatures.required(strategy, hook, "features")
        for hook in ("views", "regulariser", "head_gradients")
    )


def reads_features(strategy: Any) -> bool:
    """Whether a function of the method takes the features, which may be an argument that it can do without."""
    hooks = ("regulariser", "head_gradients")
    optional = any(defines(strategy, hook) and signatures.taken(strategy, hook, features=None) for hook in hooks)
    return optional or needs_features(strategy)


def differentiates(strategy: Any) -> bool:
    """Whether the method computes derivatives of the losses itself. Their graph must then be kept."""
    if defines(strategy, "regulariser"):
        return True
    heads = signatures.taken(strategy, "head_gradients", losses=None, features=None)
    return bool(heads) and defines(strategy, "head_gradients")


def check_epoch(strategy: Any, epoch: int) -> None:
    """Note that an epoch begins.

    Raises:
        RuntimeError: the method needs `epoch_end`, and it was not called for the last epoch.
    """
    calls = strategy.calls
    silent = calls.epoch_starts and calls.since and epoch > strategy.epoch and not calls.ended
    if silent and defines(strategy, "epoch_end"):
        raise RuntimeError(f"{_name(strategy)}: epoch {strategy.epoch} ended without {_EPOCH_END}")
    calls.epoch_starts, calls.ended, calls.since = calls.epoch_starts + 1, False, 0


def check_step(strategy: Any, moved: bool | None = None) -> None:
    """Check before a backward pass that no hook is missing.

    A method that depends on the progress needs `epoch_start` within `PATIENCE` steps. A method that only learns from
    `epoch_end` is harder to check: a missing call may just mean that the first epoch is long. It warns after `HINT`
    steps without any call, and refuses after `LONG`. A call of `epoch_start` turns both off.

    Args:
        moved: whether an optimizer has changed the parameters since the last backward pass; None if unknown.

    Raises:
        RuntimeError: a hook was not called; the message says which one, and how to call it.
    """
    calls, name = strategy.calls, _name(strategy)
    if defines(strategy, "prepare") and not calls.prepared:
        raise RuntimeError(f"{name}: call strategy.prepare(features), the width of the features, before the optimizer")
    if defines(strategy, "views") and not calls.viewed:
        raise RuntimeError(f"{name}: each head i must get strategy.views(features)[i] instead of the features")
    if defines(strategy, "look_ahead") and not calls.looked:
        raise RuntimeError(
            f"{name} tries steps out before each step: call strategy.look_ahead(losses_of, parameters, lr) before "
            "every mtl.backward, with losses_of(k) the (T,) losses of half k of the batch; mtl.Step does so by itself"
        )
    if calls.waits:
        _refuse_waiting(name, moved)
    _check_epochs(strategy)


def _refuse_waiting(name: str, moved: bool | None) -> None:
    call = "strategy.after_step(losses), with the (T,) losses of the same batch under the new parameters"
    if moved is False:
        raise RuntimeError(
            f"{name} learns from what one step on one batch did, and no parameter has moved since the last "
            "mtl.backward. For micro-batches: add up each task's losses over them, call mtl.backward once with the "
            f"sums, then optimizer.step() and {call}. Or choose a method that accumulates, such as uncertainty"
        )
    raise RuntimeError(
        f"{name} learns from what a step did: after every optimizer.step() call {call}; mtl.Step does so by itself. "
        "An optimizer that calls a closure several times in a step (LBFGS) needs max_iter=1 for that"
    )


def _check_epochs(strategy: Any) -> None:
    calls, name = strategy.calls, _name(strategy)
    ends = defines(strategy, "epoch_end")
    start = "strategy.epoch_start(epoch, epochs) at the start of each epoch"
    if strategy.uses_progress and not calls.epoch_starts and calls.steps >= PATIENCE:
        more = f" and {_EPOCH_END}" if ends else ""
        raise RuntimeError(f"{name} depends on epochs, but none has begun in {calls.steps} steps: call {start}{more}")
    if not ends or calls.epoch_starts or calls.epoch_ends:
        return
    if calls.steps >= LONG:
        raise RuntimeError(
            f"{name} learns from epochs, but in {calls.steps} steps none has ended: call {_EPOCH_END}. "
            f"If the first epoch is longer than that, call {start}, too"
        )
    if calls.steps == HINT:
        warnings.warn(
            f"{name} learns from epochs, but in {HINT} steps none has ended: it waits for {_EPOCH_END}. If the first "
            f"epoch is longer than that, call {start}, too; without any call it refuses after {LONG} steps",
            stacklevel=6,
        )


def note_step(strategy: Any) -> None:
    """Note a backward pass, after which some hooks are due again."""
    calls = strategy.calls
    calls.steps, calls.since = calls.steps + 1, calls.since + 1
    calls.viewed = calls.looked = False
    calls.waits = defines(strategy, "after_step")


_EPOCH_END = "strategy.epoch_end(mtl.losses.Statistics(losses=mean losses of the epoch)) at its end"


def _name(strategy: Any) -> str:
    return type(strategy).__name__
