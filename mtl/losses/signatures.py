"""Optional arguments of a method's functions: a method gets only the arguments that its signature names.

Example: `def weights(self, gramian)` and `def weights(self, gramian, losses)` are both right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from mtl.losses.negative import host

# For each function of a method: the arguments that it may take by name, after the first one.
OPTIONAL = {
    "forward": ("present",),
    "weights": ("present", "losses"),
    "aggregate": ("present", "losses", "features"),
    "regulariser": ("features", "present"),
    "head_gradients": ("weights", "losses", "features", "heads"),
}
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@lru_cache(maxsize=1024)
def _names(function: Callable[..., Any], hook: str) -> frozenset[str]:
    """The names in `OPTIONAL[hook]` that `function` takes.

    Raises:
        TypeError: it has another argument without a default.
    """
    rest = list(signature(function).parameters.values())[2:]  # after `self` and the argument that is always given
    known = {p.name for p in rest if p.kind in NAMED} & {*OPTIONAL[hook]}
    if unknown := [p.name for p in rest if p.default is p.empty and p.kind in NAMED and p.name not in known]:
        may = ", ".join(OPTIONAL[hook])
        raise TypeError(f"{function.__qualname__}: its argument `{unknown[0]}` is unknown; it may take {may}")
    return frozenset(OPTIONAL[hook]) if any(p.kind is Parameter.VAR_KEYWORD for p in rest) else frozenset(known)


def required(strategy: Any, hook: str, name: str) -> bool:
    """Whether the method's function `hook` has an argument `name` without a default."""
    parameter = signature(getattr(type(strategy), hook)).parameters.get(name)
    return parameter is not None and parameter.default is Parameter.empty


def taken(strategy: Any, hook: str, **given: Any) -> dict[str, Any]:
    """Select from the `given` arguments the ones that the method's function `hook` takes."""
    names = _names(getattr(type(strategy), hook), hook)
    return {name: value for name, value in given.items() if name in names}


def check(strategy: Any) -> None:
    """Check the signatures of the method's functions, when it is constructed.

    Raises:
        TypeError: a function has an argument that is not in `OPTIONAL` and has no default.
    """
    for hook in (getattr(strategy, "rule", "regulariser"), "regulariser", "head_gradients"):
        _names(getattr(type(strategy), hook), hook)


def check_present(strategy: Any, hook: str, present: Tensor | None) -> None:
    """Refuse a batch that lacks a task's labels, if the method does not take `present` and would count a loss of 0.

    Args:
        strategy: the method.
        hook: name of its function.
        present: (T,) bool, as the caller gave it. On a GPU it is not read, so any task may be absent.

    Raises:
        ValueError: the function does not take `present`, and a task is or may be absent.
    """
    if present is None or "present" in _names(getattr(type(strategy), hook), hook):
        return
    refuse_absent(strategy, hook, present)


def refuse_absent(strategy: Any, hook: str, present: Tensor) -> None:
    """Refuse absent tasks.

    Raises:
        ValueError: a task is absent. On a GPU, where flags are not read: any `present` is given.
    """
    known = host(present)
    gone = strategy.names if known is None else [n for n, here in zip(strategy.names, known, strict=True) if not here]
    if not gone:
        return
    what = f"a batch lacks labels of task {gone[0]}" if known is not None else "a batch may lack labels of a task"
    raise ValueError(
        f"present: {what}, and {type(strategy).__name__}.{hook} takes no argument `present`; "
        f"add it, and leave absent tasks out of every sum and mean"
    )
