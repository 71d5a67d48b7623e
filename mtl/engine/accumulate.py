"""Writes a step's gradients to `.grad`, with the dtype, strides and sparsity that autograd itself would give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.engine.backward_pass import BackwardPass, full_precision
from mtl.engine.gradients import columns
from mtl.engine.guard import Untouched
from mtl.engine.switches import Info
from mtl.losses import hooks
from mtl.losses.base import HeadGradients
from mtl.losses.hooks import defines


@dataclass
class Gradients:
    """What one step adds to `.grad`: either the weighted `losses` (loss weighting), or `direction` and `heads`.

    Attributes:
        one: the arguments of the step.
        values: (T,) losses as the method saw them, without a graph.
        info: the step's report. Its norm is the direction's, until `accumulate` knows the norm of `.grad`.
        losses: (T,) losses with their graph. One backward pass of their weighted sum gives all gradients.
        absent: numbers of the tasks that the host knows to be absent; their parameters get zeros.
        direction: (P,) gradient of the shared parameters, or of the features.
        heads: gradients of each head's parameters, multiplied by the loss scale.
        extra: () the method's regulariser with its graph.
        rows: (T, P) each task's part of `direction`, if requested.
        before: copies of the buffers of a loss weighting, from before the step.
    """

    one: BackwardPass
    values: Tensor
    info: Info
    losses: Tensor | None = None
    absent: list[int] = field(default_factory=list)
    direction: Tensor | None = None
    heads: HeadGradients | None = None
    extra: Tensor | None = None
    rows: Tensor | None = None
    before: Untouched | None = None


def accumulate(found: Gradients) -> Info:
    """Add what `gradients` found to `.grad`; return the step's report.

    Raises:
        ValueError: the losses reach no shared parameter. With custom autograd functions, this shows only now.
    """
    one, info = found.one, found.info
    strategy = one.strategy
    with full_precision(one.device):
        if found.extra is not None:
            one.scaled(found.extra).backward(retain_graph=True)  # the losses below share its graph
        if found.heads is None:
            _backward_pass(found)
        else:
            add([p for head in one.heads for p in head], [g for own in found.heads for g in own])
            if found.direction is not None:
                _add_direction(one, found.direction)
        # The reported norm is the norm of the shared parameters' `.grad`. Here it differs from the direction's norm.
        if found.heads is None or one.of_features or defines(strategy, "regulariser"):
            info = replace(info, norm=one.unscaled(norm(one.shared)))
        # After an overflow, the buffers of a loss weighting are put back. The device decides; the host does not wait.
        if found.before:
            finite = found.values.isfinite().all() & info.norm.isfinite()
            if heads := [p for head in one.heads for p in head]:
                finite = finite & norm(heads).isfinite()
            found.before.unless(finite if one.share is None else one.replicas.everywhere(finite))
    hooks.note_step(strategy)
    strategy.movement.note(strategy, one.model)
    return info


def _backward_pass(found: Gradients) -> None:
    """Loss weighting: one backward pass, which reaches every parameter.

    Raises:
        ValueError: it reached none of the shared parameters.
    """
    # `seed` are the tasks' weights: backward of the vector of losses with this seed is backward of Σ w_i L_i.
    one, seed = found.one, found.info.weights
    # DistributedDataParallel will divide the sum over the processes by their number. The shares already contain this
    # division, so it is undone.
    if one.share is not None:
        seed = seed * one.share * one.replicas.size
    before = [None if p.grad is None else p.grad._version for p in one.shared] if one.unseen else []
    if found.losses.requires_grad:
        found.losses.backward(one.scaled(seed))
    if before and before == [None if p.grad is None else p.grad._version for p in one.shared]:
        raise ValueError(
            f"losses: reach no parameter of shared, not even behind the custom function {one.unseen}. Were the "
            "features detached, or made under no_grad?"
        )
    # A detached loss leaves `.grad` at None, but a loss with weight 0 would leave zeros. An optimizer treats these
    # differently (weight decay, momentum), so absent tasks' parameters get zeros.
    if found.absent:
        left = [p for p in (*one.shared, *(p for i in found.absent for p in one.heads[i])) if p.grad is None]
        add(left, [torch.zeros_like(p) for p in left])


def _add_direction(one: BackwardPass, direction: Tensor) -> None:
    """Add the shared gradient. A gradient of the features is first sent back through the backbone."""
    direction = one.scaled(direction)
    if not one.of_features:
        add(one.shared, pieces(one.shared, direction))
        return
    seed = direction.view_as(one.features).to(one.features.dtype)
    if one.replicas is None:
        one.features.backward(seed)
    else:  # not with backward(): DistributedDataParallel would wait for the heads' gradients, which are already there
        found = torch.autograd.grad(one.features, one.shared, seed, allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(one.shared, found, strict=True)]
        add(one.shared, one.replicas.total(*found))


def pieces(parameters: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """Cut `row` (P,) into tensors of the parameters' shapes."""
    cut = row.split(columns(parameters))
    return [
        torch.view_as_complex(c.view(*p.shape, 2)) if p.is_complex() else c.view(p.shape)
        for p, c in zip(parameters, cut, strict=True)
    ]


@torch.no_grad()
def add(parameters: Iterable[Parameter], gradients: Iterable[Tensor | None]) -> None:
    """Add to `.grad`. A new `.grad` has its parameter's strides and dtype, and its own memory.

    Fused optimizers read a parameter and its gradient in memory order, so both need equal strides.
    """
    # All new gradients are copied at once at the end: on a GPU, one kernel instead of one for each parameter.
    targets, sources = [], []
    for p, g in zip(parameters, gradients, strict=True):
        if g is None:
            continue
        if g.is_sparse:
            p.grad = g.clone() if p.grad is None else p.grad + g
        elif p.grad is None:
            p.grad = torch.empty_like(p)
            targets.append(p.grad)
            sources.append(g)
        elif p.grad.is_sparse:
            p.grad = p.grad + g
        else:
            p.grad += g
    if targets:
        _copy(targets, sources)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, on a GPU with one kernel for many tensors."""
    # That kernel needs equal strides in all pairs. A channels_last weight has others than a piece of a row.
    equal = [t.stride() == s.stride() for t, s in zip(targets, sources, strict=True)]
    for wanted in {*equal}:
        pairs = [(t, s) for t, s, same in zip(targets, sources, equal, strict=True) if same is wanted]
        torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])


@torch.no_grad()
def norm(parameters: Sequence[Parameter]) -> Tensor:
    """() norm of all the parameters' `.grad` taken together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    if any(g.is_sparse or g.is_complex() for g in gradients):
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    first = gradients[0]
    if any(g.dtype != first.dtype or g.device != first.device for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    # What `get_total_norm` computes for one dtype and device, without its sorting of the tensors, which takes longer.
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
