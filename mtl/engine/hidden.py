"""Parameters that the graph does not show, because a custom autograd function calls backward inside its own backward.

Reversible blocks, deep equilibrium models and some kinds of checkpointing do so. What they add to `.grad` belongs to
the loss whose backward pass is running.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

DEPTH = 4  # modules are searched in nested lists, partials and closures down to this depth


def custom(node: Any) -> bool:
    """Whether a node of the graph is a user's own torch.autograd.Function."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def behind(node: Any) -> list[Parameter]:
    """The trainable parameters that a custom function may use in its backward.

    They are searched in its context, in its backward's closure, and in the global names of its backward's code.
    """
    held = [*vars(node).values()]
    function = getattr(type(node), "_forward_cls", None)
    if function is not None:
        code = function.backward
        held.append(code)
        names = getattr(getattr(code, "__code__", None), "co_names", ())
        held.extend(code.__globals__[name] for name in names if name in code.__globals__)
    found = {id(p): p for value in held for p in _within(value, DEPTH) if p.requires_grad}
    return list(found.values())


def _within(value: Any, depth: int) -> Iterator[Parameter]:
    if isinstance(value, Parameter):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif depth:
        for part in _parts(value):
            yield from _within(part, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    return ()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False


class Aside:
    """Removes `.grad` inside this block and puts it back afterwards. So what a backward pass adds to it can be seen.

    Args:
        parameters: the parameters whose `.grad` is removed.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self._kept = [(p, p.grad) for p in parameters]

    def __enter__(self) -> Aside:
        for p, _ in self._kept:
            p.grad = None
        return self

    def take(self) -> dict[int, Tensor]:
        """The gradients that were added since the last call, by the parameter's id."""
        found = {id(p): p.grad for p, _ in self._kept if p.grad is not None}
        for p, _ in self._kept if found else ():
            p.grad = None
        return found

    def __exit__(self, *error: object) -> None:
        for p, grad in self._kept:
            p.grad = grad
