"""A step that never holds the whole (T, P) Jacobian: `step.chunks`.

The columns of J are divided into chunks. J Jᵀ is the sum of the chunks' products, so a chunk is freed before the next
one is computed. The combined gradient Jᵀw is the gradient of Σ w_i L_i: one more backward pass.

Why columns, and not rows? With c rows at a time, each pair of tasks must still meet: about T + T² / 2c backward passes
through the whole network. A chunk of columns takes T passes that end at its own layers, about half of the work in the
same memory. The graph is kept and not run again, so dropout and batch norm do not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtl.engine import gradients
from mtl.engine.backward_pass import BackwardPass
from mtl.engine.hidden import Aside
from mtl.losses.base import HeadGradients
from mtl.losses.hooks import differentiates


class Chunk(NamedTuple):
    """Some columns of the Jacobian: for each of these parameters, a span of its columns."""

    parameters: list[Tensor]
    spans: list[slice]


def divide(parameters: Sequence[Tensor], count: int) -> list[Chunk]:
    """Divide the columns into `count` chunks, or fewer, of equal width. A large parameter is in several chunks."""
    sizes = gradients.columns(parameters)
    width = max(1, -(-sum(sizes) // count))
    found, room = [], 0
    for p, size in zip(parameters, sizes, strict=True):
        start = 0
        while start < size:
            if not room:
                found.append(Chunk([], []))
                room = width
            stop = min(size, start + room)
            found[-1].parameters.append(p)
            found[-1].spans.append(slice(start, stop))
            start, room = stop, room - (stop - start)
    return found or [Chunk([], [])]


def gramians(
    one: BackwardPass, samples: list[list[Tensor]], share: Tensor | None
) -> tuple[Tensor, HeadGradients, Tensor | None]:
    """The Gramian of a step, chunk by chunk. All graphs are kept, for `direction`.

    Args:
        one, samples, share: as in `gradients.jacobians`.

    Returns:
        (T, T) J Jᵀ of the Jacobian to combine; each head's own gradients, averaged over the batches; and J₁J₂ᵀ of the
        first two batches, None for one batch.

    Raises:
        ValueError: a custom autograd function adds to `.grad` by itself.
    """
    gramian, cross, own = 0.0, None, []
    reached = [[False] * len(losses) for losses in samples]
    with Aside([*one.shared, *(p for head in one.heads for p in head)]) as aside:
        for number, chunk in enumerate(divide(one.shared, one.switches.chunks)):
            # The heads' gradients come with the first chunk.
            heads = [[] for _ in one.heads] if number else one.heads
            jacobians = []
            for k, losses in enumerate(samples):
                found = gradients.of_batch(one, losses, share, chunk.parameters, heads, True, chunk.spans)
                jacobians.append(found[0])
                if not number:
                    own.append(found[1])
                reached[k] = [a or b for a, b in zip(reached[k], found[2], strict=True)]
            if aside.take():
                raise ValueError(
                    f"chunks={one.switches.chunks}: a custom autograd function in the graph of the losses adds to "
                    "`.grad` by itself, which chunks would count several times; drop it"
                )
            if len(samples) > 1:
                product = jacobians[0] @ jacobians[1].T
                cross = product if cross is None else cross + product
            used = jacobians[0].add_(jacobians[1]).div_(2) if len(samples) == 2 else jacobians[-1]
            gramian = gramian + used @ used.T
            del jacobians, found, used  # before the next chunk
    if one.shared:
        for losses, there in zip(samples, reached, strict=True):
            gradients.check_reached(one, losses, share, there)
    return gramian, own[0] if len(samples) == 1 else gradients.mean_heads(own), cross


def direction(one: BackwardPass, samples: list[list[Tensor]], share: Tensor | None, weights: Tensor) -> Tensor:
    """(P,) Jᵀw of the Jacobian that `gramians` means, by one backward pass for each batch that it averages.

    Args:
        one, samples, share: as in `gradients.jacobians`.
        weights: (T,) w.
    """
    keep, batches = differentiates(one.strategy), samples if len(samples) == 2 else samples[-1:]
    weights = weights / len(batches) if share is None else weights * share / len(batches)
    total = 0.0
    for losses in batches:
        live, _ = one.without_absent(losses)
        with torch.enable_grad():
            combined = torch.stack(live) @ weights.to(live[0])
        total = total + gradients.jacobian([combined], one.shared, [[]], keep, one.scale)[0][0]
    return total if share is None else one.replicas.total(total)[0]
