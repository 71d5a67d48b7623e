"""Walks the graphs of the losses, to find mistakes: a detached loss, heads in the wrong order, a forgotten parameter.

None of these would raise an error by itself. The model would just be trained badly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.engine import hidden
from mtl.losses.base import Strategy

EVERY = 100  # the graphs are checked in every 100th step, and in the first two


@dataclass
class Reach:
    """The tensors in which a backward pass from one loss ends.

    Attributes:
        leaves: the tensors that would get a gradient, by id.
        nodes: names of the operations on the way.
        custom: the nodes of custom autograd functions, which may hide parameters.
        hidden: parameters that these functions hold, by id.
    """

    leaves: dict[int, Tensor] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    custom: list[Any] = field(default_factory=list)
    hidden: dict[int, Parameter] = field(default_factory=dict)

    @property
    def checkpointed(self) -> bool:
        """Whether torch's re-entrant checkpoint recomputes a part of the graph in the backward pass."""
        return "CheckpointFunctionBackward" in self.nodes

    @property
    def opaque(self) -> str:
        """Names of the custom functions, for messages."""
        return ", ".join(sorted({node.name().removesuffix("Backward") for node in self.custom}))


def reach(loss: Tensor, stop: Tensor | None = None) -> Reach:
    """Walk the graph of `loss`. The walk does not go beyond `stop`, such as the features."""
    found = _walk([_element(loss)], stop)
    if loss.grad_fn is None and loss.requires_grad:
        found.leaves[id(loss)] = loss
    return found


def _walk(todo: list[Any], stop: Tensor | None = None) -> Reach:
    # Not recursive, because the graph of a deep network exceeds Python's recursion limit.
    found, seen = Reach(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or (stop is not None and node is stop.grad_fn):
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad, the node of a leaf
            found.leaves[id(node.variable)] = node.variable
        else:
            found.nodes.add(node.name())
            if hidden.custom(node):
                found.custom.append(node)
                found.hidden |= {id(p): p for p in hidden.behind(node)}
            todo.extend(parent for parent, _ in node.next_functions)
    return found


def _element(loss: Tensor) -> Any:
    """The node that made `loss`.

    Losses may come as one tensor, torch.stack([a, b]). Its elements share one node, from which every loss seems to
    reach everything. In this case, the element's own node before the stack is returned.
    """
    node = loss.grad_fn
    if node is not None and node.name() == "UnbindBackward0":
        stack = node.next_functions[0][0]
        if stack is not None and stack.name() == "StackBackward0":
            return stack.next_functions[loss.output_nr][0]
    return node


def due(strategy: Strategy, absent: Sequence[bool]) -> bool:
    """Whether the graphs are checked in this step. Walking them in every step would take too long.

    They are checked until every task was checked twice in this process, and then in one step of a hundred.

    Args:
        strategy: the method, which counts the checks.
        absent: (T,) whether each task may be absent, so that it cannot be checked.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # the host must not read from the device
        return False
    looks = strategy.looks or [0] * strategy.tasks
    wanted = strategy.calls.steps % EVERY == 0 or any(n < 2 and not gone for n, gone in zip(looks, absent, strict=True))
    if wanted:
        strategy.looks = [n + (not gone) for n, gone in zip(looks, absent, strict=True)]
    return wanted


def check_constant(i: int, name: str, loss: Tensor) -> None:
    """Check that the loss of a present task has a graph.

    Raises:
        ValueError: it has none.
    """
    if not loss.requires_grad:
        raise ValueError(
            f"losses[{i}] ({name}): has no graph, so it trains nothing. Was it detached, or made under no_grad? "
            "If the batch has no labels of this task, say so with present="
        )


def check_shared(i: int, name: str, found: Reach | None, visible: bool) -> None:
    """Raise the error for a loss that reaches no shared parameter, with the likely cause.

    Args:
        i: number of the task.
        name: name of the task.
        found: the loss's graph, if it was walked.
        visible: whether the step makes a usual backward pass. It may then reach parameters behind custom functions.

    Raises:
        ValueError: always, except if the parameters may be behind a custom function.
    """
    if found is not None and found.custom:
        if visible:
            return
        check_checkpoint(i, name, found)
        raise ValueError(
            f"losses[{i}] ({name}): reaches no parameter of shared. A custom autograd function ({found.opaque}) may "
            "hide them from gradients of single tasks: give them, or an output of theirs, to its apply, or choose loss "
            "weighting such as Equal"
        )
    raise ValueError(
        f"losses[{i}] ({name}): reaches no parameter of shared. Were the features detached, or made under no_grad? "
        "If the batch has no labels of this task, say so with present="
    )


def check_checkpoint(i: int, name: str, found: Reach) -> None:
    """Refuse torch's re-entrant checkpoint, which does not work with `torch.autograd.grad`.

    Raises:
        ValueError: the graph contains one.
    """
    if found.checkpointed:
        raise ValueError(
            f"losses[{i}] ({name}): a re-entrant checkpoint hides parameters from gradients of single tasks; use "
            "checkpoint(..., use_reentrant=False)"
        )


def check_run(i: int, name: str, found: Reach, wanted: Sequence[Tensor]) -> None:
    """Check that each custom function with hidden parameters is run when gradients of `wanted` are computed.

    autograd runs only the nodes on the way to the wanted parameters. A function beside this way is skipped, and its
    hidden parameters would get no gradient.

    Raises:
        ValueError: such a function would be skipped.
    """
    keys = {id(p) for p in wanted}
    for node in found.custom:
        if hidden.behind(node) and not keys & set(_walk([node]).leaves):
            function, shape = node.name().removesuffix("Backward"), tuple(hidden.behind(node)[0].shape)
            raise ValueError(
                f"losses[{i}] ({name}): the custom autograd function {function} hides a parameter of shape {shape}, "
                "and no gradient of a single task runs it; give its parameters to its apply, or choose loss weighting"
            )


def check_chunks(names: Sequence[str], found: Sequence[Reach | None], chunks: int) -> None:
    """Refuse `chunks` where a custom function hides parameters: a pass for a chunk of other parameters may skip it.

    Raises:
        ValueError: a graph contains such a function.
    """
    for name, reached in zip(names, found, strict=True):
        if chunks > 1 and reached is not None and reached.hidden:
            raise ValueError(
                f"chunks={chunks}: a custom autograd function ({reached.opaque}) in the graph of task {name} may hide "
                "parameters, and a part of the passes would skip it; drop it"
            )


def check_features(
    names: Sequence[str], features: Tensor, found: Sequence[Reach | None], shared: Sequence[Parameter]
) -> None:
    """Check that the losses depend on the shared parameters only through `features`.

    Args:
        names: names of the tasks.
        features: the features.
        found: each loss's graph, walked as far as `features`; None for a task that may be absent.
        shared: the shared parameters.

    Raises:
        ValueError: they depend on them in another way as well, or the features do not depend on them.
    """
    known, behind = {id(p) for p in shared}, reach(features)
    if shared and not behind.custom and not known & set(behind.leaves):
        raise ValueError("features: reach no parameter of shared. Were they detached, or made under no_grad?")
    for name, reached in zip(names, found, strict=True):
        if reached is not None and known & set(reached.leaves):
            raise ValueError(
                f"features: the loss of task {name} reaches shared parameters by another way, too; that part of their "
                "gradient would be lost. Use gradients=parameters"
            )


def moved(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters for which the gradient of `loss` is not 0.

    The graph alone does not show this: losses that were computed as one vector share their whole graph.
    """
    if not loss.requires_grad or not parameters:
        return []
    reached = reach(loss)
    # Custom functions in the graph may write to `.grad`, which must not be changed here.
    with hidden.Aside([*reached.leaves.values(), *reached.hidden.values()] if reached.custom else []):
        found = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    return [p for p, other in zip(parameters, _not_zero(found), strict=True) if other]


def _not_zero(gradients: Sequence[Tensor | None]) -> list[bool]:
    """Whether each gradient has an element other than 0. The host waits for the device once."""
    found = {i: (g.to_dense() if g.is_sparse else g).any() for i, g in enumerate(gradients) if g is not None}
    if not found:
        return [False] * len(gradients)
    device = next(iter(found.values())).device
    read = dict(zip(found, torch.stack([one.to(device) for one in found.values()]).tolist(), strict=True))
    return [read.get(i, False) for i in range(len(gradients))]


def _separate(
    losses: Sequence[Tensor],
    found: Sequence[Reach | None],
    heads: Sequence[Sequence[Parameter]],
    owner: Mapping[int, int],
) -> bool:
    """Whether no loss has a gradient for another task's head. Found with 2 log₂ T backward passes instead of T.

    For each binary digit, the tasks are divided by this digit of their numbers. Any two tasks are divided by some
    digit. So it is enough that the losses of one half have no gradient for the heads of the other half.

    False if single passes are as cheap, or if custom functions in the graph may write to `.grad`.
    """
    crossing = [i for i, one in enumerate(found) if one is not None and any(owner.get(k, i) != i for k in one.leaves)]
    digits = (len(losses) - 1).bit_length()
    if len(crossing) <= 2 * digits or any(one is not None and one.custom for one in found):
        return False
    for digit, half in product(range(digits), (0, 1)):
        # Different factors: with equal ones, two wrong gradients could cancel.
        seeds = {i: torch.full_like(losses[i], 1 + i / len(losses)) for i in crossing if i >> digit & 1 == half}
        others = [p for j, head in enumerate(heads) if j >> digit & 1 != half for p in head]
        if not seeds or not others:
            continue
        outputs = [losses[i] for i in seeds]
        gradients = torch.autograd.grad(outputs, others, [*seeds.values()], retain_graph=True, allow_unused=True)
        if any(_not_zero(gradients)):
            return False
    return True


def moved_by_others(p: Parameter, task: int, losses: Sequence[Tensor]) -> bool:
    """Whether the loss of another task than `task` has a gradient for `p`."""
    return any(moved(loss, [p]) for j, loss in enumerate(losses) if j != task)


def check_owners(
    names: Sequence[str],
    losses: Sequence[Tensor],
    found: Sequence[Reach | None],
    shared: Sequence[Parameter],
    heads: Sequence[Sequence[Parameter]],
) -> None:
    """Compare the parameters that each loss reaches with the caller's lists.

    Args:
        names: names of the tasks.
        losses: T scalars.
        found: each loss's graph; None for a task that may be absent.
        shared: the shared parameters, with the method's own.
        heads: each head's parameters.

    Raises:
        ValueError: a loss reaches no parameter of its own head, or a parameter of another head, or one in no list.
    """
    owner = {id(p): i for i, head in enumerate(heads) for p in head}
    known = {id(p) for p in shared}
    separate = _separate(losses, found, heads, owner)
    for i, reached in enumerate(found):
        if reached is None:
            continue
        check_checkpoint(i, names[i], reached)
        check_run(i, names[i], reached, [*shared, *heads[i]])
        others = [] if separate else [leaf for key, leaf in reached.leaves.items() if owner.get(key, i) != i]
        others = moved(losses[i], others)
        own = [p for p in heads[i] if id(p) in reached.leaves]
        if heads[i] and not reached.custom and (not own or (others and not moved(losses[i], own))):
            where = (
                f"; it reaches parameters of heads[{owner[id(others[0])]}]: are the heads in task order?"
                if others
                else ""
            )
            raise ValueError(f"heads[{i}]: the loss of task {names[i]} reaches none of its parameters{where}")
        if others:
            j, shape = owner[id(others[0])], tuple(others[0].shape)
            raise ValueError(
                f"heads[{j}]: its parameter of shape {shape} is also reached by the loss of task {names[i]}; "
                "what several tasks use belongs in shared"
            )
        lost = (reached.leaves | reached.hidden).items()
        lost = [p for key, p in lost if key not in known and key not in owner]
        lost = [p for p in lost if isinstance(p, Parameter)]
        if lost:
            raise ValueError(
                f"shared: the loss of task {names[i]} reaches {len(lost)} parameters that are neither in shared "
                f"nor in heads, such as one of shape {tuple(lost[0].shape)}; they would never be trained. "
                "Add them to one of the two, or freeze them with requires_grad_(False)"
            )
