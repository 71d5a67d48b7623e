"""Gradients of single tasks, and `.grad` written as autograd itself would leave it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.engine.hidden import Aside


def columns(parameters: Sequence[Tensor]) -> list[int]:
    """How many columns of the Jacobian each parameter takes: a complex number is two of them."""
    return [2 * p.numel() if p.is_complex() else p.numel() for p in parameters]


def jacobian(
    losses: Sequence[Tensor],
    where: Sequence[Tensor],
    heads: Sequence[Sequence[Parameter]],
    keep: bool,
    scale: Tensor | float | None = None,
) -> tuple[Tensor, list[list[Tensor | None]], list[bool]]:
    """One backward pass for each loss. `.grad` stays as it is.

    A custom autograd function may call backward within, which adds to `.grad` of parameters that the graph does not
    show. That is this loss's gradient as well.

    Args:
        losses: T scalars.
        where: P numbers in all, of which the Jacobian is.
        heads: the parameters of each task's head.
        keep: whether the graph is needed afterwards.
        scale: of the losses in the backward passes; fp16 gradients would underflow without it.

    Returns:
        (T, P) the gradients for `where`, divided by `scale` again, and each head's own gradients, multiplied by it.
        Then for each task, whether its loss reached any of `where`.

    Raises:
        ValueError: a custom function adds to the gradient of another task's head.
    """
    plain = [p for p in (*where, *(p for head in heads for p in head)) if p.is_leaf]
    with Aside(plain) as aside:
        return _jacobian(losses, where, heads, keep, scale, aside)


def _jacobian(
    losses: Sequence[Tensor],
    where: Sequence[Tensor],
    heads: Sequence[Sequence[Parameter]],
    keep: bool,
    scale: Tensor | float | None,
    aside: Aside,
) -> tuple[Tensor, list[list[Tensor | None]], list[bool]]:
    sizes = columns(where)
    # Under autocast gradients are in half precision; their inner products need more.
    dtype = torch.float32
    for p in where:
        dtype = torch.promote_types(dtype, p.real.dtype if p.is_complex() else p.dtype)
    device = where[0].device if where else losses[0].device
    rows = torch.zeros(len(losses), sum(sizes), dtype=dtype, device=device)
    own: list[list[Tensor | None]] = []
    reached = []
    for i, (loss, head) in enumerate(zip(losses, heads, strict=True)):
        inputs = [*where, *head]
        if not loss.requires_grad or not inputs:  # an absent task: its loss is a constant
            own.append([None] * len(head))
            reached.append(False)
            continue
        retain = keep or i < len(losses) - 1
        seed = None if scale is None else torch.ones_like(loss) * scale
        with torch.enable_grad():
            found = torch.autograd.grad(loss, inputs, seed, retain_graph=retain, allow_unused=True)
        if hidden := aside.take():
            found = [_sum(g, hidden.pop(id(p), None)) for p, g in zip(inputs, found, strict=True)]
            if hidden:
                raise ValueError(
                    f"heads: a custom autograd function in the graph of losses[{i}] adds to gradients of another head; "
                    "what several tasks use belongs in shared"
                )
        for g, piece in zip(found, rows[i].split(sizes), strict=False):
            if g is not None:
                g = g.to_dense() if g.is_sparse else g
                g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
                piece.view(g.shape).copy_(g)
        own.append(list(found[len(where) :]))
        reached.append(any(g is not None for g in found[: len(where)]))
    if scale is not None:
        rows /= scale
    return rows, own, reached


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def pieces(parameters: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """`row` (P,) cut into one tensor of each parameter's shape."""
    cut = row.split(columns(parameters))
    return [
        torch.view_as_complex(c.view(*p.shape, 2)) if p.is_complex() else c.view(p.shape)
        for p, c in zip(parameters, cut, strict=True)
    ]


@torch.no_grad()
def add(parameters: Iterable[Parameter], gradients: Iterable[Tensor | None]) -> None:
    """Add to `.grad`. A new one has its parameter's strides and dtype, and memory of its own.

    Fused optimizers walk a parameter and its gradient side by side in memory, so they depend on equal strides.
    """
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
        torch._foreach_copy_(targets, sources)


def norm(parameters: Sequence[Parameter]) -> Tensor:
    """() norm of all the parameters' `.grad` taken together."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    if any(g.is_sparse or g.is_complex() for g in gradients):
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        gradients = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
    return torch.nn.utils.get_total_norm(gradients)
