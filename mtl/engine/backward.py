"""`mtl.backward`: from task losses and a strategy to `.grad`. The engine and foreign loops use this same function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mtl.engine import arguments
from mtl.engine.backward_pass import BackwardPass
from mtl.engine.movement import Movement
from mtl.engine.replicas import Group, heard, replicas
from mtl.engine.switches import Info, Switches
from mtl.losses import given, hooks
from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Strategy

PAPER = Switches()  # everything as published
Owners = nn.Module | Parameter | Iterable[Any]  # whatever holds parameters


@heard
def backward(
    losses: Sequence[Tensor] | Tensor | Mapping[str, Tensor],
    strategy: Strategy,
    shared: Owners,
    heads: Sequence[Owners] | Mapping[str, Owners] | None = None,
    present: Tensor | Sequence[bool] | Mapping[str, bool] | None = None,
    features: Tensor | None = None,
    switches: Switches = PAPER,
    per_task: bool = False,
    inspect: Callable[[Tensor], None] | None = None,
    scale: torch.amp.GradScaler | float | None = None,
    group: Group | Literal["auto"] | None = "auto",
) -> Info:
    """Fill `.grad` of all parameters as `strategy` decides; like `Tensor.backward`, it adds to what is there.

    Args:
        losses: T scalar losses, as a list or a (T,) tensor in the order of the strategy's tasks, or by task name; for a
            strategy with `samples` = S > 1 a sequence of S of these, from independent batches.
        strategy: of any family.
        shared: the parameters that several tasks share, or the module that holds them; per-task gradients are taken of
            these. Where all are frozen, a gradient method has nothing to balance, and heads get their own gradients.
        heads: for each task (in order, or by name) the parameters that are its own (may be empty), or its module.
            Gradient methods need it, because a parameter in neither list would never be trained; loss weighting
            reaches every parameter by itself. A parameter in both lists is shared if several losses reach it.
        present: (T,) bool, False where the batch (or one of several batches) holds no label of that task: its loss is
            then ignored, whatever it is. Only for loss weighting with `present` on a GPU or several processes, it must
            have finite gradients or no graph.
        features: what the backbone returned and all heads started from; needed for gradients=features.
        switches: variations of the step.
        per_task: also leave the weighted gradients of the tasks as `task_grads` (T, *p.shape) on the shared parameters,
            and `present` as `task_present`, for the optimizers of `mtl.optim.taskwise`. They add up like `.grad`.
        inspect: is shown the (T, P) Jacobian that the step combines, if it takes one; not to be kept or changed.
        scale: the GradScaler of mixed precision (or the number that it holds). Give the losses as they are: the
            backward passes are scaled here, the method sees true losses and gradients, and `.grad` holds the scaled
            gradient that `scaler.step(optimizer)` expects.
        group: the processes that share each batch, each with a replica of the model under DistributedDataParallel:
            losses, Jacobian and heads' gradients are averaged over them. auto: all that torch.distributed started;
            None: this process alone. Each mean counts the processes alike, so their parts should be equally large.
            All must call this and the hooks equally often: DistributedDataParallel's join() does not work here.

    Returns:
        weights and gradient statistics of this step. After a step with a loss or gradient that is not finite, `.grad`
        is not finite either, and the method's buffers are as before.

    Raises:
        ValueError, TypeError: an argument is not what is described here (the message begins with its name), a loss
            reaches no parameter, a method that takes logarithms or ratios of losses met a negative one, or the
            switches do not fit the strategy.
        RuntimeError: a hook of the method was due and did not come, such as `after_step`; a parameter of the method
            gets gradients, but no optimizer moves it; or another process of the group refused this step (its error is
            told), or has left.
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
    if per_task:
        switches.check_per_task(strategy)
    of_features, combines = switches.of_features(strategy), switches.combines(strategy, per_task)
    samples = _samples(losses, strategy)
    arguments.check_grad_mode(samples)
    own = None if heads is None else arguments.head_parameters(heads, strategy, exclusive=combines)
    if combines and own is None:
        why = "a step with per-task gradients" if isinstance(strategy, LossWeighting) else type(strategy).__name__
        raise ValueError(f"heads: {why} needs each task's own parameters (may be empty)")
    if of_features and features is None:
        raise ValueError("features: gradients of features need the tensor that all heads start from")
    if features is not None and (of_features or strategy.flat):
        given.check_features(strategy, features)
    device = samples[0][0].device
    there = arguments.marks(present, strategy.names, device)
    one = BackwardPass(
        strategy, switches, owned, own or [[] for _ in strategy.names], there, features, of_features,
        arguments.loss_scale(scale, device), replicas(group), per_task, inspect,
    )  # fmt: skip
    one.check(samples, combines)
    # A caller may be inside of autocast; the method's own products must not be rounded to half precision.
    inside = torch.is_autocast_enabled(device.type)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False) if inside else nullcontext():
        step = one.run(samples, combines)
    hooks.note_step(strategy)
    strategy.movement.note(strategy, owned)
    return step


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
