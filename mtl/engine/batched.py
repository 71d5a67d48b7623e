"""The gradients of several tasks in one backward pass: `step.parallel`.

torch runs each operation of the pass once for all of them (`torch.vmap`). A small network on a GPU spends most of its
time on starting operations, so it gains most. The pass needs the memory of as many passes as there are tasks in it.

With half precision in the graph (autocast), torch.vmap's rule for batch norm mixes two precisions and fails. Then the
older `is_grads_batched` takes the pass: it runs convolutions and batch norm task by task, so less time is gained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.engine.hidden import Aside


def jacobian(
    losses: Sequence[Tensor],
    where: Sequence[Tensor],
    heads: Sequence[Sequence[Parameter]],
    keep: bool,
    scale: Tensor | float | None,
    spans: Sequence[slice],
    dtype: torch.dtype,
    parallel: int,
) -> tuple[Tensor, list[list[Tensor | None]], list[bool]]:
    """As `gradients.jacobian`, with up to `parallel` tasks in a backward pass.

    The graph does not say which of the tasks in a pass reached `where`: if one did, all count as having done so.

    Raises:
        ValueError: an operation of the network cannot be run for several tasks at once, or a custom function adds to
            `.grad` by itself.
    """
    live = [i for i, loss in enumerate(losses) if loss.requires_grad]  # an absent task's loss is a constant
    own: list[list[Tensor | None]] = [[None] * len(head) for head in heads]
    rows = None
    reached = [False] * len(losses)
    with Aside([p for p in (*where, *(p for head in heads for p in head)) if p.is_leaf]) as aside, torch.enable_grad():
        seed = torch.ones_like(losses[0]) if scale is None else torch.ones_like(losses[0]) * scale
        # A head belongs to one task, so its gradient of Σ L is that of its own loss. One pass serves all heads.
        parameters = [p for i in live for p in heads[i]]
        if parameters:
            outputs, retain = [losses[i] for i in live], keep or bool(where)
            found = torch.autograd.grad(outputs, parameters, [seed] * len(live), retain_graph=retain, allow_unused=True)
            gradients = iter(found)
            for i in live:
                own[i] = [next(gradients) for _ in heads[i]]
        half = _half(losses)
        for start in range(0, len(live) if where else 0, parallel):
            block = live[start : start + parallel]
            retain = keep or block[-1] != live[-1]
            found, there = _pass([losses[i] for i in block], where, seed, retain, parallel, half)
            if len(block) == len(losses):  # the usual case; the Jacobian is large, and is not copied once more
                rows = _columns(found, spans, dtype)
            else:
                rows = _empty(losses, spans, dtype) if rows is None else rows
                rows[block] = _columns(found, spans, dtype)
            for i in block:
                reached[i] = any(there)
        if aside.take():
            raise ValueError(
                f"parallel={parallel}: a custom autograd function in the graph of the losses adds to `.grad` by "
                "itself, for all tasks at once; drop it"
            )
    rows = _empty(losses, spans, dtype) if rows is None else rows
    if scale is not None:
        rows /= scale
    return rows, own, reached


def _empty(losses: Sequence[Tensor], spans: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """(T, P) zeros, for the rows of absent tasks."""
    return torch.zeros(len(losses), sum(s.stop - s.start for s in spans), dtype=dtype, device=losses[0].device)


def _half(losses: Sequence[Tensor]) -> bool:
    """Whether autograd's graph of the losses holds a tensor in half precision."""
    seen, todo = set(), [loss.grad_fn for loss in losses]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(output.dtype in (torch.bfloat16, torch.float16) for output in node._input_metadata):
            return True
        todo += [following for following, _ in node.next_functions]
    return False


def _pass(
    losses: list[Tensor], where: Sequence[Tensor], seed: Tensor, retain: bool, parallel: int, half: bool
) -> tuple[list[Tensor], list[bool]]:
    """For each tensor in `where`, the gradients of all these losses, stacked; and whether any loss reaches it."""
    reached: list[bool] = []

    def one(*seeds: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(losses, where, seeds, retain, allow_unused=True, is_grads_batched=half)
        reached[:] = [g is not None for g in found]
        tasks = (len(losses),) if half else ()
        return [p.new_zeros(tasks + p.shape) if g is None else g for p, g in zip(where, found, strict=True)]

    # Loss k has the seeds (0, …, 1, …, 0): one in pass k, and 0 in the others.
    seeds = torch.eye(len(losses), dtype=seed.dtype, device=seed.device) * seed
    try:
        return (one if half else torch.vmap(one))(*seeds.unbind(1)), reached
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"parallel={parallel}: torch cannot run this backward pass for several tasks at once "
            f"({str(error).strip().splitlines()[0]}); use parallel=1"
        ) from error


def _columns(found: Sequence[Tensor], spans: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """(tasks, P) the gradients side by side, in the columns that are wanted."""
    parts = []
    for g, span in zip(found, spans, strict=True):
        g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
        parts.append(g.reshape(len(g), -1)[:, span].to(dtype))
    return torch.cat(parts, 1)
