"""Converts the arguments of a method's hooks to tensors of shape (T,). A loop may also give lists or dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from operator import index
from typing import Any

import torch
from torch import Tensor


def tidy(hook: str, call: dict[str, Any], strategy: Any) -> None:
    """Convert the arguments of a call of `hook`, in place.

    Args:
        hook: name of the hook.
        call: the arguments by name.
        strategy: the method.

    Raises:
        ValueError, TypeError: an argument has the wrong form; the message begins with the names of hook and argument.
    """
    names = strategy.names
    if "losses" in call:
        call["losses"] = vector(f"{hook}(losses)", call["losses"], names)
    if hook == "look_ahead" and callable(call.get("losses_of")):
        call["losses_of"] = _vectors(call["losses_of"], names)
    if call.get("present") is not None:
        device = call["losses"].device if "losses" in call else None
        call["present"] = vector(f"{hook}(present)", call["present"], names).to(device, torch.bool)
    if hook == "epoch_end" and "statistics" in call:
        call["statistics"] = _statistics(call["statistics"], names)
    if hook == "prepare" and "features" in call:
        call["features"] = _width(call["features"])
    if hook == "views" and "features" in call:
        check_features(strategy, call["features"])


def vector(what: str, value: Any, names: tuple[str, ...]) -> Tensor:
    """Convert to a tensor (T,).

    Args:
        what: names of hook and argument, for messages.
        value: a tensor (T,), T numbers or one-element tensors, or a mapping from task names to these.
        names: of the tasks.

    Raises:
        ValueError, TypeError: `value` has another form.
    """
    if isinstance(value, Mapping):
        by_name = {str(key): v for key, v in value.items()}
        if set(by_name) != set(names):
            raise ValueError(f"{what}: keys {', '.join(by_name)}; the strategy's tasks are {', '.join(names)}")
        value = [by_name[name] for name in names]
    if not isinstance(value, Tensor):
        value = _stacked(what, value, names)
    if value.shape != (len(names),):
        raise ValueError(
            f"{what}: shape {tuple(value.shape)}; one number for each of the {len(names)} tasks, "
            f"so shape ({len(names)},), is needed"
        )
    if value.is_complex():
        raise ValueError(f"{what}: dtype {value.dtype}; real numbers are needed")
    return value


def _stacked(what: str, value: Any, names: tuple[str, ...]) -> Tensor:
    try:
        parts = [torch.as_tensor(v) for v in value]
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise TypeError(f"{what}: a {kind}; one number for each of {', '.join(names)} is needed") from error
    if len(parts) != len(names) or any(part.numel() != 1 for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts[:8])
        raise ValueError(f"{what}: {len(parts)} values of shapes {shapes}; {len(names)} single numbers are needed")
    return torch.stack([part.reshape(()) for part in parts])


def _vectors(losses_of: Callable[[int], Any], names: tuple[str, ...]) -> Callable[[int], Tensor]:
    def wrapped(half: int) -> Tensor:
        return vector("look_ahead(losses_of)", losses_of(half), names)

    return wrapped


def _statistics(statistics: Any, names: tuple[str, ...]) -> Any:
    if not is_dataclass(statistics) or not hasattr(statistics, "losses"):
        kind = type(statistics).__name__
        raise TypeError(f"epoch_end(statistics): a {kind}; give mtl.losses.Statistics(losses=mean losses of the epoch)")
    known = {name: getattr(statistics, name) for name in ("losses", "scores", "higher_is_better")}
    tidied = {name: vector(f"Statistics({name})", v, names) for name, v in known.items() if v is not None}
    return replace(statistics, **tidied)


def _width(features: Any) -> int:
    try:
        width = index(features)
    except TypeError:
        width = 0
    if width < 1 or isinstance(features, bool):
        shown = repr(features) if isinstance(features, int | float) else f"a {type(features).__name__}"
        raise ValueError(f"prepare(features): {shown} is no width; give a whole number such as 512")
    return width


def check_features(strategy: Any, features: Any) -> None:
    """Check the features that a loop gives to a method.

    Raises:
        TypeError: `features` is not a tensor.
        ValueError: the method needs features of shape (N, F), and they have another one.
    """
    name = type(strategy).__name__
    need = f"{name} needs one tensor of shape (N, F), a row of F numbers for each sample"
    if not isinstance(features, Tensor):
        raise TypeError(f"features: a {type(features).__name__}; {need if strategy.flat else 'one tensor is needed'}")
    if strategy.flat and features.dim() != 2:
        raise ValueError(f"features: shape {tuple(features.shape)}; {need}. Pool or flatten the rest, e.g. .flatten(1)")
