"""Calls a method's own functions in a step, and turns their results into weights and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mtl.config.source import definition
from mtl.engine import hidden, returned
from mtl.engine.accumulate import add
from mtl.engine.backward_pass import BackwardPass
from mtl.engine.switches import to_count
from mtl.losses.base import HeadGradients, LossWeighting, times
from mtl.losses.hooks import defines
from mtl.losses.signatures import taken


def regulariser(one: BackwardPass, losses: list[Tensor]) -> Tensor | None:
    """() the method's regulariser with its graph (Rep-MTL, for example); None if it has none."""
    if not defines(one.strategy, "regulariser"):
        return None
    with _nothing_hidden(one):
        extra = one.strategy.regulariser(
            losses, **taken(one.strategy, "regulariser", features=one.features, present=one.present)
        )
    extra = returned.regulariser(one.strategy, extra)
    return extra if extra is not None and extra.requires_grad else None


def slopes(one: BackwardPass, total: Tensor, losses: Tensor) -> Tensor:
    """(T,) the slopes ∂total/∂L_i. They are the tasks' weights in this step, for every method and a user's own loss.

    The method's own parameters, such as log variances, get their gradients here as well.

    Args:
        one: the arguments of the step.
        total: () the method's result.
        losses: (T,) the losses that the method was given.

    Raises:
        ValueError: the total is no scalar, or does not depend on the losses.
    """
    strategy, total = one.strategy, returned.total(one.strategy, total)
    own = [p for p in strategy.parameters() if p.requires_grad]
    # retain_graph: the losses' own graph is needed for the backward pass through the network.
    weights, found = None, []
    if total.requires_grad:  # else torch would speak of elements and grad_fn, not of the losses
        weights, *found = torch.autograd.grad(total, [losses, *own], retain_graph=True, allow_unused=True)
    if weights is None:
        raise ValueError(
            f"{type(strategy).__name__}: the total does not depend on the losses, so it trains nothing; "
            "torch.tensor(...), .item() and .detach() cut it off from them "
            f"(defined in {definition(type(strategy).forward)})"
        )
    # Scaled, because the optimizer's GradScaler will divide all gradients by the loss scale.
    add(own, [None if g is None else one.scaled(g) for g in found])
    weights = weights.detach()
    if one.switches.scale == "sum":
        weights = weights * to_count(weights, one.present)
    return weights


@contextmanager
def own_gradients_scaled(one: BackwardPass) -> Iterator[None]:
    """Multiply the gradients that a method writes to its own parameters in this block (RotoGrad) by the loss scale.

    The optimizer's GradScaler later divides all gradients by the scale, and these are among them.
    """
    own = [] if one.scale is None else list(one.strategy.parameters())
    before = [p.grad for p in own]
    for p in own:
        p.grad = None
    yield
    for p, earlier in zip(own, before, strict=True):
        found, p.grad = p.grad, earlier
        add([p], [None if found is None else one.scaled(found)])


def heads(one: BackwardPass, losses: list[Tensor], own: HeadGradients, weights: Tensor | None) -> HeadGradients:
    """The gradient of each head: its own loss's, that times the task's weight, or the method's own choice.

    Args:
        one: the arguments of the step.
        losses: T scalars with their graph.
        own: each head's gradients of its own loss, multiplied by the loss scale.
        weights: (T,) the tasks' weights, if the method has weights.

    Returns:
        the gradients, multiplied by the loss scale.
    """
    strategy, switch = one.strategy, one.switches.heads
    if switch == "own":
        return own
    if switch == "weighted" or isinstance(strategy, LossWeighting):
        return times(own, weights)
    if not defines(strategy, "head_gradients"):
        return times(own, weights) if strategy.heads == "weighted" else own
    facts = taken(strategy, "head_gradients", weights=weights, losses=losses, features=one.features, heads=one.heads)
    # The method sees true gradients. Its result is scaled again.
    true = own if one.scale is None else [[None if g is None else one.unscaled(g) for g in head] for head in own]
    with torch.enable_grad(), _nothing_hidden(one):
        found = returned.head_gradients(strategy, strategy.head_gradients(true, **facts), own)
    return found if one.scale is None else [[None if g is None else one.scaled(g) for g in head] for head in found]


@contextmanager
def _nothing_hidden(one: BackwardPass) -> Iterator[None]:
    """Check that derivatives which a method computes in this block do not write to any `.grad`.

    Raises:
        ValueError: a custom autograd function did so, which makes second derivatives wrong.
    """
    why = (
        f"heads: {type(one.strategy).__name__} takes second derivatives, and a custom autograd function hides "
        "parameters from them; choose another method"
    )
    with hidden.Aside([*one.shared, *(p for head in one.heads for p in head)]) as aside:
        try:
            yield
        except RuntimeError as error:
            if aside.take():
                raise ValueError(why) from error
            raise
        if aside.take():
            raise ValueError(why)
