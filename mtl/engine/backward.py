"""`mtl.backward`: from task losses and a strategy to `.grad`. The engine and foreign loops use this same function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Strategy


@dataclass(frozen=True)
class Step:
    """What one backward pass did; tensors stay on the device, nothing is synchronised.

    Attributes:
        weights: (T,) weight of each task: ∂total/∂L_i for loss weighting, the Gramian weights, or None for an
            aggregator, which has none.
        norm: () norm of the shared parameters' gradient as this call left it.
        ratio: () norm relative to equal weighting's on the same batch; None for loss weighting, whose single backward
            pass does not tell.
        cosine: () mean cosine between the task gradients, over all pairs; None for loss weighting and for T = 1.
        conflict: () share of the pairs with a negative cosine; None as above.
    """

    weights: Tensor | None
    norm: Tensor
    ratio: Tensor | None = None
    cosine: Tensor | None = None
    conflict: Tensor | None = None


def backward(
    losses: Sequence[Tensor] | Tensor,
    strategy: Strategy,
    shared: Iterable[Parameter],
    heads: Sequence[Iterable[Parameter]] | None = None,
    present: Tensor | None = None,
) -> Step:
    """Fill `.grad` of all parameters as `strategy` decides; like `Tensor.backward`, it adds to what is there.

    Args:
        losses: T scalar losses (or a (T,) tensor), in the order of the strategy's tasks.
        strategy: of any family.
        shared: the parameters that several tasks share; per-task gradients are taken of these.
        heads: for each task the parameters that are its own (may be empty). Gradient methods need it, because a
            parameter in neither list would never be trained; loss weighting reaches every parameter by itself.
        present: (T,) bool, False where the batch holds no label of that task (its loss is then ignored).

    Returns:
        weights and gradient statistics of this step.

    Raises:
        ValueError: the number of losses or heads is not the strategy's T, `shared` holds nothing trainable,
            or heads is missing for a gradient method.
    """
    losses = list(losses)
    shared = [p for p in shared if p.requires_grad]
    if len(losses) != strategy.tasks:
        raise ValueError(f"{len(losses)} losses for a strategy of {strategy.tasks} tasks ({', '.join(strategy.names)})")
    if not shared:
        raise ValueError("shared: no parameter in it requires a gradient")
    if heads is not None and len(heads) != strategy.tasks:
        raise ValueError(f"heads: {len(heads)} collections of parameters for {strategy.tasks} tasks")
    if isinstance(strategy, LossWeighting):
        return _weight_losses(losses, strategy, shared, present)
    if not isinstance(strategy, GramianWeighting | JacobianAggregation):
        raise TypeError(f"{type(strategy).__name__} belongs to none of the three families of mtl.losses")
    if heads is None:
        raise ValueError(f"heads: {type(strategy).__name__} needs each task's own parameters (may be empty)")
    return _combine_gradients(losses, strategy, shared, [[p for p in h if p.requires_grad] for h in heads], present)


def _weight_losses(losses: list[Tensor], strategy: LossWeighting, shared: list[Parameter], present) -> Step:
    stacked = torch.stack(losses)
    total = strategy(stacked, present)
    # ∂total/∂L_i, kept on the way through: the weight that each task really has, whatever the method (a user's too).
    if not stacked.requires_grad:  # no task has a label in this batch, and absent losses may be constants
        return Step(weights=torch.zeros_like(stacked), norm=_norm(shared))
    stacked.retain_grad()
    total.backward()
    weights = torch.zeros_like(stacked) if stacked.grad is None else stacked.grad
    return Step(weights=weights, norm=_norm(shared))


@torch.no_grad()
def _combine_gradients(losses, strategy, shared, heads, present) -> Step:
    jacobian, head_gradients = _jacobian(losses, shared, heads)
    gramian = jacobian @ jacobian.T
    if isinstance(strategy, GramianWeighting):
        weights = strategy.weights(gramian, present)
        direction = weights @ jacobian
        norm = (weights @ gramian @ weights).clamp(min=0).sqrt()
    else:
        weights, direction = None, strategy.aggregate(jacobian, present)
        norm = direction.norm()

    _accumulate(shared, direction)
    for i, (parameters, gradients) in enumerate(zip(heads, head_gradients, strict=True)):
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:
                g = weights[i] * g if strategy.heads == "weighted" else g
                p.grad = g if p.grad is None else p.grad + g

    cosine = conflict = None
    if len(losses) > 1:
        cosine, conflict = _similarity(gramian, present)
    ratio = norm / gramian.sum().clamp(min=torch.finfo(gramian.dtype).tiny).sqrt()
    return Step(weights, norm, ratio, cosine, conflict)


def _similarity(gramian: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean cosine over the pairs of present tasks, and the share of those pairs that is negative."""
    tiny = torch.finfo(gramian.dtype).tiny
    lengths = gramian.diagonal().sqrt()
    rows, columns = torch.triu_indices(len(gramian), len(gramian), 1, device=gramian.device)
    cosines = gramian[rows, columns] / (lengths[rows] * lengths[columns]).clamp(min=tiny)
    pairs = torch.ones_like(cosines) if present is None else (present[rows] & present[columns]).to(cosines)
    count = pairs.sum().clamp(min=1)
    return (cosines * pairs).sum() / count, ((cosines < 0) * pairs).sum() / count


def _jacobian(losses, shared, heads) -> tuple[Tensor, list]:
    """(T, P) gradients of the losses for the shared parameters, and each head's own gradients, in T passes in all."""
    size = sum(p.numel() for p in shared)
    jacobian = torch.zeros(len(losses), size, dtype=shared[0].dtype, device=shared[0].device)
    head_gradients = []
    for i, (loss, head) in enumerate(zip(losses, heads, strict=True)):
        if not loss.requires_grad:  # an absent task: its loss is a constant
            head_gradients.append([None] * len(head))
            continue
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, [*shared, *head], retain_graph=i < len(losses) - 1, allow_unused=True)
        offset = 0
        for p, g in zip(shared, gradients[: len(shared)], strict=True):
            if g is not None:
                jacobian[i, offset : offset + p.numel()].view(p.shape).copy_(g)
            offset += p.numel()
        head_gradients.append(gradients[len(shared) :])
    return jacobian, head_gradients


def _accumulate(parameters: list[Parameter], direction: Tensor) -> None:
    offset = 0
    pieces, gradients = [], []
    for p in parameters:
        piece = direction[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
        if p.grad is None:
            # Same strides as the parameter, as autograd itself would leave it: fused optimizers rely on that.
            p.grad = torch.empty_like(p)
            gradients.append(p.grad)
            pieces.append(piece)
        else:
            p.grad += piece
    if gradients:
        torch._foreach_copy_(gradients, pieces)


def _norm(parameters: list[Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    return torch.nn.utils.get_total_norm(gradients)
