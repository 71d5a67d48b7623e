"""Checks the arguments of constructors that are called from Python: by their type hints, as in a config node."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import wraps
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from mtl.config.schema import adapter_of, check_size, complaint, explain, hints_of
from mtl.errors import ConfigError, one_line

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def checked(
    init: Callable[..., None],
    but: Collection[str] = (),
    after: Callable[[Any, Callable[..., None]], None] | None = None,
) -> Callable[..., None]:
    """Wrap an `__init__` so that it compares its arguments with their type hints before it runs.

    Args:
        init: the `__init__`.
        but: names of arguments that `init` checks by itself.
        after: called with the object and `init` when `init` has returned.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # a missing or unknown argument: the call below raises Python's own message
            given = {}
        defaults = {n: p.default for n, p in signature.parameters.items() if p.kind in NAMED and n not in but}
        # A default may be None although the hint says float. Passing the default explicitly must not be an error.
        found = {n: v for n, v in given.items() if n in defaults and v is not defaults[n]}
        if found:
            check_hinted(hints_of(init), found, init.__qualname__.removesuffix(".__init__").rpartition(".")[2])
        init(self, *args, **kwargs)
        if after is not None:
            after(self, init)

    return wrapper


def check_hinted(hints: Mapping[str, Any], values: Mapping[str, Any], owner: str) -> None:
    """Compare values that come from Python with type hints.

    Args:
        hints: the type hint of each argument.
        values: the value of each argument. Arrays and tensors count as the numbers they hold, sets and tuples as lists.
        owner: name of the class, for the message.

    Raises:
        ValueError: a value has another type or is out of range. The message names argument, value, allowed values and
            class.
    """
    for name, value in values.items():
        hint = hints.get(name)
        try:
            wrong = _complaint(hint, value, name)
        except ConfigError as error:  # a number too large for a tensor; a Python caller gets a ValueError
            raise ValueError(f"{error} ({owner})") from None
        if wrong and get_origin(hint) is Literal:
            wrong = f"is none of {', '.join(map(str, get_args(hint)))}"
        if wrong:
            raise ValueError(f"{name}: {_short(value)} {wrong} ({owner})")


def _complaint(hint: Any, value: Any, name: str) -> str:
    """What `value` must be instead; empty if it fits."""
    if (adapter := adapter_of(hint)) is None:
        return ""
    try:
        plain = _plain(value)
    except TypeError:  # an object that YAML cannot express, such as a module
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            return explain(error, value)
        return ""
    check_size(plain, name)
    wrong = complaint(hint, plain)
    if wrong and "isinstance" in wrong:  # the hint is a class; its instance was turned into a plain value above
        with suppress(ValidationError):
            adapter.validate_python(value)
            return ""
        return f"is not a {getattr(hint, '__name__', hint)}"
    return wrong


def _short(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has: numbers, strings, lists, mappings, None.

    Raises:
        TypeError: YAML cannot express it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):  # an array, a tensor, or one number of them
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Collection):
        return [_plain(item) for item in value]
    raise TypeError
