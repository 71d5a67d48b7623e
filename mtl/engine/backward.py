"""`mtl.backward`: from task losses and a strategy to `.grad`. The engine and a user's own loop call the same function.

It has two halves. `gradients` computes what the step adds to `.grad`; `accumulate` adds it. Only the second half writes
to the model. `mtl.Step` calls the two halves itself, because some optimizers need each task's gradient as well.

Notation: T tasks, P shared parameters, J the (T, P) Jacobian with one gradient per task, G = J Jᵀ its (T, T) Gramian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtl.engine import chunks, guard, method, ownership, returned
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
    """Fill `.grad` of all parameters as `strategy` decides. Like `Tensor.backward`, it adds to an existing `.grad`.

    Several processes may share each batch (`strategy.group`). They then average the losses, the Jacobian and the heads'
    gradients. Every process counts the same in a mean, so their parts of the batch should be equally large. All must
    call this function and the hooks equally often: DistributedDataParallel's join() does not work here.

    Args:
        losses: T scalar losses: a list or a (T,) tensor in the order of the strategy's tasks, or a dict by task name.
            A strategy with `samples` = S > 1 needs a sequence of S of these, from independent batches.
        strategy: the method, of any family.
        shared: the parameters that several tasks share, or the module that holds them. Per-task gradients are taken
            with respect to them. If all are frozen, a gradient method has nothing to balance; heads are still trained.
        heads: for each task, in order or by name, its own parameters (maybe none) or its module. Gradient methods
            need `heads`, because they would never train a parameter that is in neither list. Loss weighting does not:
            its backward pass reaches every parameter. A parameter in both lists is shared if several losses reach it.
        present: (T,) bool, False if the batch (or one of several batches) has no label of that task. The loss of an
            absent task is ignored, even if it is NaN. One exception: for loss weighting on a GPU or with several
            processes, it must have finite gradients or no graph.
        features: the backbone's output, from which all heads start. Needed for gradients=features.
        switches: variations of the step.
        scale: the GradScaler of mixed precision, or the number that it holds. Do not scale the losses yourself: this
            function does. The method sees the true losses and gradients, and `.grad` holds the scaled gradient that
            `scaler.step(optimizer)` expects.

    Returns:
        weights and gradient statistics of this step. If a loss or gradient is not finite, `.grad` is not finite
        either, and the method's buffers stay as they were.

    Raises:
        ValueError, TypeError: an argument is not as described here (the message begins with its name). Or a loss
            reaches no parameter, or a method that takes logarithms or ratios of losses got a negative one, or the
            switches do not fit the strategy.
        RuntimeError: a hook of the method was not called, such as `after_step`. Or a parameter of the method gets
            gradients, but no optimizer moves it. Or another process of the group refused this step (the message
            quotes its error), or has left.
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
    """Compute what one step adds to `.grad`, without adding it.

    Only the method changes: its buffers are updated, and its own parameters (such as log variances) get gradients.

    Args:
        losses, strategy, shared, heads, present, features, switches, scale: as in `backward`.
        each: whether to return each task's weighted gradient as well (`Gradients.rows`).
        inspect: called with the (T, P) Jacobian that the step combines, if there is one (none with `chunks`). Do not
            keep or change it.

    Raises:
        ValueError, TypeError, RuntimeError: as `backward`.
    """
    # Convert the arguments to one form and refuse mistakes. If this process refuses, the others must not wait for it in
    # a collective: `heard` sends them the error.
    with heard(strategy, losses) as replicas:
        one = understood(losses, strategy, shared, heads, present, features, switches, scale, each, replicas)
        ownership.check(one)  # now each parameter is in exactly one list: shared, or one head's
        one.meet()  # losses and `present` of all processes; does nothing in a single process
    with full_precision(one.device):
        # The losses as the method sees them: an absent task's loss is 0, and none is negative under a logarithm.
        # `samples` have their graphs. `values` are the same numbers without a graph, averaged over the processes.
        # `share` is None in a single process.
        samples, values, share = one.seen()
        scalars, absent = one.without_absent(samples[-1])
        # A copy of the method's buffers, to be put back if a gradient turns out to be infinite or NaN. Loss weighting
        # learns that only after the backward pass, in `accumulate`. Gradient methods check it earlier: `guard.kept`.
        before = guard.Untouched(strategy) if isinstance(strategy, LossWeighting) else None
        found = Gradients(one, values, Info(None, values.new_zeros(())), absent=absent, before=before)
        found.extra = method.regulariser(one, samples[-1] if one.combines else scalars)
        weights = direction = None

        # Family 1 weighs losses. A task's weight is the slope of the total with respect to its loss. This holds for any
        # formula: in Π L_i^{1/T} (GLS), for example, the weight of task i is total / (T L_i). With these weights fixed,
        # one backward pass of Σ w_i L_i through the network gives the same gradient as the total itself.
        if isinstance(strategy, LossWeighting):
            found.losses = torch.stack(samples[-1] if one.combines else scalars)
            inputs = found.losses if share is None else values.clone().requires_grad_()
            if inputs.requires_grad:
                total = strategy(inputs.clone(), **taken(strategy, "forward", present=one.present))
                weights = method.slopes(one, total, inputs)
            else:  # no task has a label in this batch
                weights = torch.zeros_like(inputs)
            if not one.combines:  # the usual case: `accumulate` makes the one backward pass
                found.info = replace(found.info, weights=weights)
                return found

        with torch.no_grad():
            # T backward passes, one for each task's gradient. `own` are the heads' gradients. `cross` is J₁ J₂ᵀ of two
            # independent batches, for the few methods that need it; None otherwise.
            jacobian = None
            if switches.chunks > 1:  # then the whole Jacobian is never in memory
                gramian, own, cross = chunks.gramians(one, samples, share)
            else:
                jacobian, own, cross = jacobians(one, samples, share)
                gramian = one.gramian(jacobian)
                if inspect is not None:
                    inspect(jacobian)
            if one.frozen:  # all shared parameters are frozen: nothing to balance, each head gets its own gradient
                found.heads = own
                return found

            # Family 2 (MGDA, Nash-MTL) computes weights from the Gramian alone. Family 3 (GradDrop, MoCo) merges the
            # gradients by a rule of its own, and may have no weights. `taken` passes only the facts that the method's
            # signature names. A method of family 1 comes here only if a switch needs gradients; it has its weights.
            with guard.kept(strategy, values, gramian, own), method.own_gradients_scaled(one):
                if isinstance(strategy, GramianWeighting):
                    facts = taken(strategy, "weights", present=one.present, losses=values)
                    found_weights = strategy.weights(gramian if cross is None else cross, **facts)
                    weights = returned.weights(strategy, found_weights).to(gramian)
                elif isinstance(strategy, JacobianAggregation):
                    facts = taken(strategy, "aggregate", present=one.present, losses=values, features=one.cut)
                    direction, weights = returned.merged(strategy, strategy.aggregate(jacobian, **facts), jacobian)

            # The method decides the length of the step, unless the switch `scale` does. The order matters: scale=sum
            # also applies to the heads, but scale=norm and a method's own clip apply to the shared gradient only.
            if switches.scale == "sum" and not isinstance(strategy, LossWeighting):
                factor = to_count(weights, one.present)
                weights, direction = weights * factor, None if direction is None else direction * factor
            if jacobian is None:
                direction = chunks.direction(one, samples, share, weights)
            elif direction is None:
                direction = weights @ jacobian
            # ‖Jᵀw‖² = wᵀ G w. With gradients=features, each process has only its own samples' part of the direction;
            # G is summed over all processes. Rounding can make wᵀ G w slightly negative, hence the clamp.
            norm = direction.norm() if one.whole else (weights @ gramian @ weights).clamp(min=0).sqrt()
            # The norm under equal weighting: ‖Σ g_i‖² = Σ_ij G_ij.
            equal = gramian.sum().clamp(min=torch.finfo(gramian.dtype).tiny).sqrt()
            found.heads = method.heads(one, scalars, own, weights)
            if (factor := switches.factor(strategy, norm, equal)) is not None:
                direction, norm = direction * factor, norm * factor
                weights = None if weights is None else weights * factor
            if each:  # for AdaTask, which scales each task's part with statistics of its own
                found.rows = jacobian * weights[:, None]
            found.direction = direction
            # A method may have returned its own buffer, which its next step changes.
            weights = None if weights is None else weights.clone()
            found.info = Info(weights, norm, norm / equal, *similarity(gramian, one.present))
    return found
