"""Per-task gradients: the Jacobian of one or several batches, in one or several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.engine import batched, reach
from mtl.engine.backward_pass import BackwardPass
from mtl.engine.hidden import Aside
from mtl.losses.base import HeadGradients
from mtl.losses.hooks import differentiates


def jacobians(
    one: BackwardPass, samples: list[list[Tensor]], share: Tensor | None
) -> tuple[Tensor, HeadGradients, Tensor | None]:
    """The gradients of a step.

    Args:
        one: the arguments of the step.
        samples: the losses of each batch, with their graphs.
        share: (T,) this process's share of each mean; None if there is only this one.

    Returns:
        the (T, P) Jacobian to combine; each head's own gradients, averaged over the batches; and J₁J₂ᵀ of the first two
        batches, None for one batch.
    """
    # The usual case is one batch. SDMGrad and MoDo take weights from two independent batches: J₁J₂ᵀ is an unbiased
    # estimate of J Jᵀ, while J₁J₁ᵀ contains the noise of the batch.
    jacobian, own = _whole(one, samples[0], share)
    if len(samples) == 1:
        return jacobian, own, None
    heads_of = [own]
    second, own = _whole(one, samples[1], share)
    heads_of.append(own)
    cross = jacobian @ second.T
    if len(samples) == 2:
        jacobian = jacobian.add_(second).div_(2)  # in place: a Jacobian is T times as large as the model
    else:
        jacobian, own = _whole(one, samples[2], share)
        heads_of.append(own)
    return jacobian, mean_heads(heads_of), cross


def mean_heads(found: Sequence[HeadGradients]) -> HeadGradients:
    """Each head's gradients, averaged over the batches."""
    mean = []
    for parts in zip(*found, strict=True):  # one head, all batches
        known = [[g for g in batches if g is not None] for batches in zip(*parts, strict=True)]
        mean.append([sum(batches) / len(found) if batches else None for batches in known])
    return mean


def _whole(one: BackwardPass, losses: list[Tensor], share: Tensor | None) -> tuple[Tensor, HeadGradients]:
    """The (T, P) Jacobian and each head's own gradients, of one batch, averaged over all processes."""
    # The graph is still needed if the features' gradient must go through the backbone, or if the method differentiates.
    keep = one.of_features or differentiates(one.strategy)
    where = [one.features] if one.of_features else one.shared
    rows, own, reached = of_batch(one, losses, share, where, one.heads, keep)
    if where:
        check_reached(one, losses, share, reached)
    return rows, own


def check_reached(one: BackwardPass, losses: list[Tensor], share: Tensor | None, reached: Sequence[bool]) -> None:
    """Check that each present task's loss reaches a shared parameter. If not, find out why, and raise."""
    maybe = one.maybe_absent() if share is None else [True] * len(losses)
    for i, there in enumerate(reached):
        if not there and not maybe[i]:
            reach.check_shared(i, one.strategy.names[i], reach.reach(losses[i]), visible=False)


def of_batch(
    one: BackwardPass,
    losses: list[Tensor],
    share: Tensor | None,
    where: Sequence[Tensor],
    heads: Sequence[Sequence[Parameter]],
    keep: bool,
    spans: Sequence[slice] | None = None,
) -> tuple[Tensor, HeadGradients, list[bool]]:
    """As `jacobian`, but averaged over all processes, and with rows of 0 for absent tasks."""
    rows, own, reached = jacobian(losses, where, heads, keep, one.scale, spans, one.switches.parallel)
    if one.present is not None:  # an absent task's row may be NaN; `where` removes it, a product with 0 would not
        here = one.present if share is None else share > 0
        rows = torch.where(here[:, None], rows, 0.0)
        own = [[g if g is None or g.is_sparse else torch.where(h, g, 0.0) for g in head]
               for h, head in zip(here, own, strict=True)]  # fmt: skip
    if share is not None:
        rows *= share[:, None]
        if not one.of_features:
            (rows,) = one.replicas.total(rows)
        own = one.replicas.heads(heads, own, share)
    return rows, own, reached


def columns(parameters: Sequence[Tensor]) -> list[int]:
    """The number of columns of the Jacobian for each parameter. A complex number takes two."""
    return [2 * p.numel() if p.is_complex() else p.numel() for p in parameters]


def jacobian(
    losses: Sequence[Tensor],
    where: Sequence[Tensor],
    heads: Sequence[Sequence[Parameter]],
    keep: bool,
    scale: Tensor | float | None = None,
    spans: Sequence[slice] | None = None,
    parallel: int = 1,
) -> tuple[Tensor, list[list[Tensor | None]], list[bool]]:
    """One backward pass for each loss. `.grad` stays as it is.

    A custom autograd function may call backward inside its own backward. This adds to `.grad` of parameters that the
    graph does not show. `Aside` collects it: it belongs to this loss's gradient.

    Args:
        losses: T scalars.
        where: the tensors to differentiate with respect to, with P elements in all.
        heads: the parameters of each task's head.
        keep: whether the graph is needed afterwards.
        scale: factor of the losses in the backward passes. Without it, fp16 gradients would underflow.
        spans: for each tensor in `where`, its columns that are wanted; None for all. P is then their number.
        parallel: number of losses in a backward pass: see `mtl.engine.batched`.

    Returns:
        (T, P) the gradients for `where`, divided by `scale` again; each head's own gradients, still multiplied by it;
        and for each task, whether its loss reached any of `where`.

    Raises:
        ValueError: a custom function adds to the gradient of another task's head.
    """
    spans = [slice(0, size) for size in columns(where)] if spans is None else spans
    if parallel > 1 and len(losses) > 1:
        return batched.jacobian(losses, where, heads, keep, scale, spans, _dtype(losses, where), parallel)
    plain = [p for p in (*where, *(p for head in heads for p in head)) if p.is_leaf]
    with Aside(plain) as aside:
        return _jacobian(losses, where, heads, keep, scale, spans, aside)


def _jacobian(
    losses: Sequence[Tensor],
    where: Sequence[Tensor],
    heads: Sequence[Sequence[Parameter]],
    keep: bool,
    scale: Tensor | float | None,
    spans: Sequence[slice],
    aside: Aside,
) -> tuple[Tensor, list[list[Tensor | None]], list[bool]]:
    sizes = [span.stop - span.start for span in spans]
    device = where[0].device if where else losses[0].device
    rows = torch.empty(len(losses), sum(sizes), dtype=_dtype(losses, where), device=device)
    own: list[list[Tensor | None]] = []
    reached = []
    # Losses that are the elements of one vector have one graph, and a pass for one head would go through all heads. So
    # the gradients of all heads come from one pass: the gradient of Σ L for a head is that of its own loss.
    one = torch.ones_like(losses[0]) if scale is None else torch.ones_like(losses[0]) * scale
    seeds = _seeds(losses, one)
    at_once = _of_all_heads(losses, heads, one) if seeds else None
    for i, (loss, head) in enumerate(zip(losses, heads, strict=True)):
        inputs = where if seeds else [*where, *head]
        if not loss.requires_grad or not inputs:  # an absent task: its loss is a constant
            own.append([None] * len(head) if at_once is None else at_once[i])
            rows[i].zero_()
            reached.append(False)
            continue
        # The tasks share the backbone's graph, so only the last backward pass may free it.
        retain = keep or i < len(losses) - 1
        seed = None if scale is None else torch.ones_like(loss) * scale
        outputs, seed = seeds[i] if seeds else (loss, seed)
        with torch.enable_grad():
            found = torch.autograd.grad(outputs, inputs, seed, retain_graph=retain, allow_unused=True)
        if hidden := aside.take():
            found = [_sum(g, hidden.pop(id(p), None)) for p, g in zip(inputs, found, strict=True)]
            if hidden:
                raise ValueError(
                    f"heads: a custom autograd function in the graph of losses[{i}] adds to gradients of another head; "
                    "what several tasks use belongs in shared"
                )
        own.append(list(found[len(where) :]) if at_once is None else at_once[i])
        found = found[: len(where)]
        _fill(rows[i], found, spans)
        reached.append(any(g is not None for g in found))
    if scale is not None:
        rows /= scale
    return rows, own, reached


def _fill(row: Tensor, gradients: Sequence[Tensor | None], spans: Sequence[slice]) -> None:
    """Write the wanted columns of one task's gradients side by side into its `row`, with 0 for None."""
    # One call for all of them: a copy for each would be a kernel of its own on a GPU.
    if gradients:
        torch.cat([_flat(g, span, row) for g, span in zip(gradients, spans, strict=True)], out=row)


def _flat(g: Tensor | None, span: slice, row: Tensor) -> Tensor:
    size = span.stop - span.start
    if g is None:
        return row.new_zeros(size)
    g = g.to_dense() if g.is_sparse else g
    g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    g = g.reshape(-1)
    return g if g.numel() == size else g[span]


def _dtype(losses: Sequence[Tensor], where: Sequence[Tensor]) -> torch.dtype:
    """That of the Jacobian. Under autocast, gradients are in half precision. Their inner products need fp32 or more."""
    dtype = torch.float32 if where else losses[0].dtype
    for other in {p.dtype for p in where}:
        dtype = torch.promote_types(dtype, other.to_real())
    return dtype


def _seeds(losses: Sequence[Tensor], one: Tensor) -> list[tuple[Any, Any]]:
    """For each loss, the outputs and seeds of a backward pass that gives its gradient: `one` for it, 0 for others.

    Empty if the losses are not the elements of one vector. Custom functions in the graph may add to `.grad`, and then
    each loss needs a pass of its own.
    """
    vectors = {_vector(loss) for loss in losses}
    if len(losses) == 1 or len(vectors) > 1 or None in vectors or reach.reach(losses[0]).custom:
        return []
    if (whole := _whole_vector(losses)) is not None:
        # One output rather than T: torch checks each of them, which takes longer than the pass of a small network.
        vector, elements = whole
        rows = (torch.eye(len(vector), dtype=vector.dtype, device=vector.device) * one).unbind()
        return [(vector, rows[i]) for i in elements]
    # The same two tensors for all: the T rows of an identity matrix, cut into numbers, would be T² operations.
    zero = torch.zeros_like(one)
    return [(losses, (zero,) * i + (one,) + (zero,) * (len(losses) - 1 - i)) for i in range(len(losses))]


def _whole_vector(losses: Sequence[Tensor]) -> tuple[Tensor, list[int]] | None:
    """The vector whose elements the losses are, and each one's index; None if something was done to them in between."""
    vector = losses[0]._base
    if vector is None or vector.dim() != 1 or vector.grad_fn is None:
        return None
    if any(loss._base is not vector or loss.grad_fn.next_functions[0][0] is not vector.grad_fn for loss in losses):
        return None
    stride = vector.stride(0)
    return vector, [(loss.storage_offset() - vector.storage_offset()) // stride for loss in losses]


def _of_all_heads(
    losses: Sequence[Tensor], heads: Sequence[Sequence[Parameter]], seed: Tensor
) -> list[list[Tensor | None]]:
    """Each head's own gradients, from one backward pass of the losses' sum."""
    parameters = [p for head in heads for p in head]
    if not parameters:
        return [[] for _ in heads]
    with torch.enable_grad():
        seeds = [seed] * len(losses)
        found = iter(torch.autograd.grad(losses, parameters, seeds, retain_graph=True, allow_unused=True))
    return [[next(found) for _ in head] for head in heads]


def _vector(loss: Tensor) -> Any:
    """The node of the vector from which `loss` was selected; None if there is none."""
    node = loss.grad_fn
    while node is not None and node.name() not in ("SelectBackward0", "UnbindBackward0"):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 else None  # such as the logarithm of a loss
    return None if node is None else node.next_functions[0][0]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def similarity(gramian: Tensor, present: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Mean cosine, share of negative cosines, and mean magnitude similarity, over the pairs of present tasks.

    All three are None for a single task.
    """
    if len(gramian) == 1:
        return None, None, None
    tiny = torch.finfo(gramian.dtype).tiny
    pairs = torch.triu_indices(len(gramian), len(gramian), 1, device=gramian.device)  # (2, number of pairs)
    rows, columns = pairs.unbind()
    squares = gramian.diagonal()[pairs]
    products = squares.sqrt()
    products = products[0] * products[1]
    cosines = gramian[rows, columns] / products.clamp(min=tiny)
    magnitudes = 2 * products / (squares[0] + squares[1]).clamp(min=tiny)
    three = torch.stack([cosines, cosines < 0, magnitudes])
    if present is None:
        return three.mean(1).unbind()
    known = (present[rows] & present[columns]).to(cosines)
    return ((three * known).sum(1) / known.sum().clamp(min=1)).unbind()
