"""`mtl.backward`: from task losses and a strategy to `.grad`. The engine and foreign loops use this same function.

Two halves: `gradients` finds what a step adds to `.grad`, and `accumulate` adds it. Between both nothing of the model
has changed. `mtl.Step` calls the halves by itself, because some optimizers need each task's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtl.engine import guard, method, ownership
from mtl.engine.accumulate import Gradients, accumulate
from mtl.engine.backward_pass import Owners, full_precision, understood
from mtl.engine.gradients import jacobians, similarity
from mtl.engine.replicas import heard
from mtl.engine.switches import PAPER, Info, Switches, to_count
from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Strategy
from mtl.losses.signatures import taken

__all__ = ["PAPER", "Info", "Owners", "Switches", "backward", "gradients"]


def backward(
    losses: Sequence[Tensor] | Tensor | Mapping[str, Tensor],
    strategy: Strategy,
    shared: Owners,
    heads: Sequence[Owners] | Mapping[str, Owners] | None = None,
    present: Tensor | Sequence[bool] | Mapping[str, bool] | None = None,
    features: Tensor | None = None,
    switches: Switches = PAPER,
    scale: torch.amp.GradScaler | float | None = None,
) -> Info:
    """Fill `.grad` of all parameters as `strategy` decides; like `Tensor.backward`, it adds to what is there.

    Several processes that share each batch (`strategy.group`) average losses, Jacobian and heads' gradients. Each mean
    counts the processes alike, so their parts should be equally large. All must call this and the hooks equally often:
    DistributedDataParallel's join() does not work here.

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
        scale: the GradScaler of mixed precision (or the number that it holds). Give the losses as they are: the
            backward passes are scaled here, the method sees true losses and gradients, and `.grad` holds the scaled
            gradient that `scaler.step(optimizer)` expects.

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
    return accumulate(gradients(losses, strategy, shared, heads, present, features, switches, scale))


def gradients(
    losses: Sequence[Tensor] | Tensor | Mapping[str, Tensor],
    strategy: Strategy,
    shared: Owners,
    heads: Sequence[Owners] | Mapping[str, Owners] | None = None,
    present: Tensor | Sequence[bool] | Mapping[str, bool] | None = None,
    features: Tensor | None = None,
    switches: Switches = PAPER,
    scale: torch.amp.GradScaler | float | None = None,
    *,
    each: bool = False,
    inspect: Callable[[Tensor], None] | None = None,
) -> Gradients:
    """What one step adds to `.grad`. The model's `.grad` stays as it is.

    The method learns from the step: its buffers change, and its own parameters get their gradients.

    Args:
        losses, strategy, shared, heads, present, features, switches, scale: as in `backward`.
        each: whether each task's gradient is wanted as well (`Gradients.rows`).
        inspect: is shown the (T, P) Jacobian that the step combines, if it takes one; not to be kept or changed.

    Raises:
        ValueError, TypeError, RuntimeError: as `backward`.
    """
    # The arguments in one form. Whatever could not be right is refused, and the other processes hear of it.
    with heard(strategy, losses) as replicas:
        one = understood(losses, strategy, shared, heads, present, features, switches, scale, each, replicas)
        ownership.check(one)
        one.meet()
    with full_precision(one.device):
        # The losses as the method sees them: none is negative under a logarithm, and an absent task's is 0.
        samples, values, share = one.seen()
        scalars, absent = one.without_absent(samples[-1])
        before = guard.Untouched(strategy) if isinstance(strategy, LossWeighting) else None
        found = Gradients(one, values, Info(None, values.new_zeros(())), absent=absent, before=before)
        found.extra = method.regulariser(one, samples[-1] if one.combines else scalars)
        weights = direction = None

        # Family 1 weighs losses. A task's weight is the slope of the total in its loss; one backward pass is enough.
        if isinstance(strategy, LossWeighting):
            found.losses = torch.stack(samples[-1] if one.combines else scalars)
            told = found.losses if share is None else values.clone().requires_grad_()
            total = None
            if told.requires_grad:  # else no task has a label in this batch
                total = strategy(told.clone(), **taken(strategy, "forward", present=one.present))
            weights = method.slopes(one, total, told)
            if not one.combines:
                found.info = replace(found.info, weights=weights)
                return found

        with torch.no_grad():
            # One gradient for each task, and their inner products.
            jacobian, own, cross = jacobians(one, samples, share)
            if inspect is not None:
                inspect(jacobian)
            gramian = one.gramian(jacobian)
            if one.frozen:  # nothing to balance: each head gets its own gradient
                found.heads = own
                return found

            # Family 2 weighs the gradients by their Gramian; family 3 merges them by a rule of its own.
            with guard.kept(strategy, values, gramian, own), method.own_gradients_scaled(one):
                if isinstance(strategy, GramianWeighting):
                    facts = taken(strategy, "weights", present=one.present, losses=values)
                    weights = strategy.weights(gramian if cross is None else cross, **facts).to(jacobian)
                elif isinstance(strategy, JacobianAggregation):
                    facts = taken(strategy, "aggregate", present=one.present, losses=values, features=one.cut)
                    merged = strategy.aggregate(jacobian, **facts)
                    direction, weights = merged if isinstance(merged, tuple) else (merged, None)

            # The length of the step is the method's, or that of the switch `scale`. Heads follow the unclipped weights.
            if switches.scale == "sum" and not isinstance(strategy, LossWeighting):
                factor = to_count(weights, one.present)
                weights, direction = weights * factor, None if direction is None else direction * factor
            direction = weights @ jacobian if direction is None else direction
            norm = direction.norm() if one.whole else (weights @ gramian @ weights).clamp(min=0).sqrt()
            equal = gramian.sum().clamp(min=torch.finfo(gramian.dtype).tiny).sqrt()
            found.heads = method.heads(one, scalars, own, weights)
            if (factor := switches.factor(strategy, norm, equal)) is not None:
                direction, norm = direction * factor, norm * factor
                weights = None if weights is None else weights * factor
            if each:
                found.rows = jacobian * weights[:, None]
            found.direction = direction
            # A method may have returned its own buffer, which its next step changes.
            weights = None if weights is None else weights.clone()
            found.info = Info(weights, norm, norm / equal, *similarity(gramian, one.present))
    return found
