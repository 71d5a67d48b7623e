"""Whose each parameter is: what the caller says is compared with what the losses reach."""

from __future__ import annotations

from torch import Tensor

from mtl.engine import arguments, reach
from mtl.engine.backward_pass import BackwardPass


def check(one: BackwardPass) -> None:
    """Refuse what could not be right, and leave each parameter in one list.

    Raises:
        ValueError: see `mtl.backward`.
    """
    names, strategy = one.strategy.names, one.strategy
    if one.replicas is not None:
        one.replicas.check(strategy, one.of_features, one.shared)
    strategy.across, strategy.grouped = one.replicas, one.replicas is not None and one.replicas.all
    maybe = one.maybe_absent()
    for losses in one.samples:
        for i, loss in enumerate(losses):
            if not maybe[i]:
                reach.check_constant(i, names[i], loss)
    if one.combines:
        arguments.check_plain([*one.shared, *(p for head in one.heads for p in head)])
        one.tied = _tied(one, one.samples[0], maybe)
        one.settle(one.tied)
    elif one.replicas is not None:
        one.replicas.check_constants(one.samples[0], names, one.heads)
    if reach.due(strategy, maybe):
        _check_reach(one, maybe)


def _check_reach(one: BackwardPass, maybe: list[bool]) -> None:
    """Walk the graph of each loss: it must end in the parameters that the caller says.

    Args:
        maybe: (T,) which tasks may be absent.
    """
    names, losses, stop = one.strategy.names, one.samples[0], one.cut
    found = [reach.reach(x, stop) if x.requires_grad and not maybe[i] else None for i, x in enumerate(losses)]
    if one.of_features:
        reach.check_features(names, one.features, found, one.shared)
    if one.combines:
        known = [*one.shared, *one.strategy.parameters()]
        reach.check_owners(names, losses, found, known, one.heads)
    elif one.shared:
        for i, reached in enumerate(found):
            if reached is not None and not any(id(p) in reached.leaves for p in one.shared):
                reach.check_shared(i, names[i], reached, visible=True)
                one.unseen = reached.opaque


def _tied(one: BackwardPass, losses: list[Tensor], maybe: list[bool]) -> list[bool]:
    """For each parameter in both lists, whether several losses reach it (tied weights); else it is its head's."""
    listed = {id(p) for p in one.shared}
    if one.of_features or not any(id(p) in listed for head in one.heads for p in head):
        return []
    found = [reach.reach(loss).leaves if loss.requires_grad else {} for loss in losses]
    heads = [head for head in one.heads if head]
    # Losses that were computed as one vector have one graph in common: then only their gradients tell them apart.
    vector = all(any(id(p) in leaves for p in head) for leaves in found if leaves for head in heads)
    flags = []
    for i, head in enumerate(one.heads):
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
