"""Checks what a method's own functions have returned, before a step uses it. No check waits for a GPU.

A wrong shape may broadcast, or fail far from the author's line. So each error names that line.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from mtl.config.source import definition
from mtl.losses.base import HeadGradients, JacobianAggregation, Strategy


def total(strategy: Strategy, found: Any) -> Tensor:
    """The one differentiable number that `forward` must return.

    Raises:
        ValueError: it returned something else.
    """
    if not isinstance(found, Tensor) or found.numel() != 1:
        _refuse(strategy, "forward", found, "one differentiable number is needed, such as a sum")
    return found


def weights(strategy: Strategy, found: Any) -> Tensor:
    """The (T,) task weights that `weights` must return.

    Raises:
        ValueError: it returned something else.
    """
    if not isinstance(found, Tensor) or found.shape != (strategy.tasks,):
        tasks = f"({strategy.tasks},), one number for each task"
        _refuse(strategy, "weights", found, f"a tensor of shape {tasks}, is needed")
    return found


def merged(strategy: JacobianAggregation, found: Any, jacobian: Tensor) -> tuple[Tensor, Tensor | None]:
    """The direction (P,) that `aggregate` must return, and the weights (T,) that it may return beside it.

    Args:
        found: what it returned.
        jacobian: (T, P) what it was given.

    Raises:
        ValueError: it returned something else.
    """
    direction, weighed = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    size = jacobian.shape[1]
    if not isinstance(direction, Tensor) or direction.shape != (size,):
        _refuse(strategy, "aggregate", direction, f"a direction of shape ({size},), as long as a row, is needed")
    if weighed is not None and (not isinstance(weighed, Tensor) or weighed.shape != (strategy.tasks,)):
        _refuse(strategy, "aggregate", weighed, f"weights beside a direction have the shape ({strategy.tasks},)")
    return direction, weighed


def regulariser(strategy: Strategy, found: Any) -> Tensor | None:
    """The number or None that `regulariser` must return.

    Raises:
        ValueError: it returned something else.
    """
    if found is not None and (not isinstance(found, Tensor) or found.numel() != 1):
        _refuse(strategy, "regulariser", found, "one number or None is needed")
    return found


def head_gradients(strategy: Strategy, found: Any, own: HeadGradients) -> HeadGradients:
    """The gradients that `head_gradients` must return, in the form of `own`.

    Raises:
        ValueError: it returned something else.
    """
    same = isinstance(found, list | tuple) and [len(head) for head in found] == [len(head) for head in own]
    if not same:
        _refuse(
            strategy, "head_gradients", found, "a list for each head, with one gradient for each parameter, is needed"
        )
    return found


def _refuse(strategy: Strategy, hook: str, found: Any, needed: str) -> NoReturn:
    shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    if found is None:
        shown = "nothing (is there a `return`?)"
    where = definition(getattr(type(strategy), hook))
    raise ValueError(f"{type(strategy).__name__}.{hook} returned {shown}; {needed} (defined in {where})")
