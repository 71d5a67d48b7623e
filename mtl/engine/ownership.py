"""The owner of each parameter: compares the caller's lists (shared, heads) with the graphs of the losses."""

from __future__ import annotations

from torch import Tensor

from mtl.engine import arguments, reach
from mtl.engine.backward_pass import BackwardPass


def check(one: BackwardPass) -> None:
    """Check that the losses' graphs agree with the caller's lists, and leave each parameter in one list.

    Raises:
        ValueError: a loss has no graph, or reaches no or wrong parameters. See `mtl.backward`.
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
    """Walk the graph of each loss, and check the parameters in which it ends.

    Args:
        one: the arguments of the step.
        maybe: (T,) whether each task may be absent; such a task is not checked.
    """
    names, losses, stop = one.strategy.names, one.samples[0], one.cut
    found = [reach.reach(x, stop) if x.requires_grad and not maybe[i] else None for i, x in enumerate(losses)]
    if one.of_features:
        reach.check_features(names, one.features, found, one.shared)
    if one.combines:
        reach.check_chunks(names, found, one.switches.chunks)
        known = [*one.shared, *one.strategy.parameters()]
        reach.check_owners(names, losses, found, known, one.heads)
    elif one.shared:
        for i, reached in enumerate(found):
            if reached is not None and not any(id(p) in reached.leaves for p in one.shared):
                reach.check_shared(i, names[i], reached, visible=True)
                one.unseen = reached.opaque


def _tied(one: BackwardPass, losses: list[Tensor], maybe: list[bool]) -> list[bool]:
    """For each parameter in both lists: whether several losses reach it (tied weights). If not, it is a head's own."""
    listed = {id(p) for p in one.shared}
    if one.of_features or not any(id(p) in listed for head in one.heads for p in head):
        return []
    found = [reach.reach(loss).leaves if loss.requires_grad else {} for loss in losses]
    heads = [head for head in one.heads if head]
    # Losses that were computed as one vector have a common graph. Each seems to reach everything, so only gradients
    # that are not 0 show what a loss really depends on.
    vector = all(any(id(p) in leaves for p in head) for leaves in found if leaves for head in heads)
    flags = []
    for i, head in enumerate(one.heads):
        for p in head:
            if id(p) not in listed:
                continue
            # For an absent task the graph does not show whether it uses its head's parameter. We assume that it does.
            several = any(id(p) in leaves for j, leaves in enumerate(found) if j != i)
            several = several and (maybe[i] or id(p) in found[i])
            if several and vector and len(losses) > 1:
                several = (maybe[i] or bool(reach.moved(losses[i], [p]))) and reach.moved_by_others(p, i, losses)
            flags.append(several)
    return flags
