"""What a method may leave out of a signature: it takes the arguments that it reads, and is given these alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from mtl.losses.negative import host

# The arguments that a function of a method may take by name, after its first one.
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
        TypeError: it needs an argument that nobody gives it.
    """
    rest = list(signature(function).parameters.values())[2:]  # after `self` and the argument that is always given
    known = {p.name for p in rest if p.kind in NAMED} & {*OPTIONAL[hook]}
    if unknown := [p.name for p in rest if p.default is p.empty and p.kind in NAMED and p.name not in known]:
        may = ", ".join(OPTIONAL[hook])
        raise TypeError(f"{function.__qualname__}: its argument `{unknown[0]}` is unknown; it may take {may}")
    return frozenset(OPTIONAL[hook]) if any(p.kind is Parameter.VAR_KEYWORD for p in rest) else frozenset(known)


def taken(strategy: Any, hook: str, **given: Any) -> dict[str, Any]:
    """Those of the `given` arguments that the method's function `hook` takes."""
    names = _names(getattr(type(strategy), hook), hook)
    return {name: value for name, value in given.items() if name in names}


def check(strategy: Any) -> None:
    """Raises:
    TypeError: a function of the method needs an argument that nobody gives it.
    """
    for hook in (getattr(strategy, "rule", "regulariser"), "regulariser", "head_gradients"):
        _names(getattr(type(strategy), hook), hook)


def check_present(strategy: Any, hook: str, present: Tensor | None) -> None:
    """Refuse a batch without labels of a task where the method cannot know of it.

    Args:
        present: (T,) bool, as the caller gave it. On a GPU it cannot be read, so that it may mark an absent task.

    Raises:
        ValueError: the method's function `hook` does not take `present`, and a task may be absent.
    """
    if present is None or "present" in _names(getattr(type(strategy), hook), hook):
        return
    refuse_absent(strategy, hook, present)


def refuse_absent(strategy: Any, hook: str, present: Tensor) -> None:
    """Raises:
    ValueError: a task is absent, or may be, as a GPU's flags are not read.
    """
    known = host(present)
    gone = strategy.names if known is None else [n for n, here in zip(strategy.names, known, strict=True) if not here]
    if not gone:
        return
    what = f"a batch lacks labels of task {gone[0]}" if known is not None else "a batch may lack labels of a task"
    raise ValueError(
        f"present: {what}, and {type(strategy).__name__}.{hook} takes no argument `present` that would say so; "
        f"give it one, and leave absent tasks out of every sum and mean"
    )
