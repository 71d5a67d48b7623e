"""The signature is the schema: a config node is checked against the callable that its `_target_` names.

An unknown key, a missing key, a wrong type and a value out of range each give one line. It has the full key, the
allowed values and the nearest one. Types and ranges come from the type hints (`int`, `Literal[...]`, `Annotated[float,
Gt(0)]`). So a class outside this repository is checked in the same way as ours. pydantic reads the hints. If it cannot
read a hint, that argument is not checked.
"""

from __future__ import annotations

import inspect
import json
import math
import pkgutil
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from mtl.config import identity
from mtl.config.source import blame
from mtl.errors import ConfigError, UserError, one_line, suggest

TARGET, MISSING = "_target_", "???"

# Ranges for PyTorch's optimizers. Their hints have none, and they accept a momentum of 5 or a weight decay of 1e9.
OPTIMIZER = {"momentum": Annotated[float, Ge(0), Lt(1)], "weight_decay": Annotated[float, Ge(0), Le(100)]}
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, 3.4e38  # the largest numbers of a tensor: int64, float32


def check(node: Any, path: str, supplied: Collection[str] = ()) -> None:
    """Compare a config node with its target's signature.

    Args:
        node: a mapping with a `_target_` and its arguments, as plain Python objects.
        path: dotted path of the node in the config, for the messages.
        supplied: arguments that the engine adds when it builds the object.

    Raises:
        ConfigError: the first fault that is found.
    """
    if not isinstance(node, Mapping) or TARGET not in node:
        raise ConfigError(f"{path}: expected a node with a _target_, not {node!r}")
    if node[TARGET] == MISSING:
        raise ConfigError(f"{path}.{TARGET}: required; set it to the path of a class, e.g. torch.optim.RMSprop")
    target = locate(node[TARGET], f"{path}.{TARGET}")
    check_arguments(target, {k: v for k, v in node.items() if k != TARGET}, path, supplied)


def check_arguments(target: Callable, arguments: Mapping, path: str, supplied: Collection[str] = ()) -> None:
    """Compare keyword arguments with the signature of `target`, and nested nodes with their own `_target_`.

    Arguments and errors are as in `check`.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a builtin may have no signature: nothing is known about its arguments
        return
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    ours = sorted(n for n in named if n not in supplied)
    hints = hints_of(target)
    prefix = f"{path}." if path else ""
    for key, value in arguments.items():
        # A constructor with **kwargs may take any key, so it cannot be checked.
        if key not in ours and not open_ended:
            near = _in_nodes(key, arguments, prefix) or suggest(key, ours)
            raise ConfigError(f"{prefix}{key}: unknown key; allowed: {', '.join(ours) or 'none'}{near}")
        if isinstance(value, Mapping) and TARGET in value:
            check(value, f"{prefix}{key}")
        elif _has_nodes(value):  # {name: node}, such as the parts of a union
            for name, node in value.items():
                check(node, f"{prefix}{key}.{name}")
        elif value != MISSING:
            check_size(value, f"{prefix}{key}")
            if wrong := complaint(hints.get(key), value):
                raise ConfigError(f"{prefix}{key}={_show(value)}: {wrong}")
    for name in ours:
        if arguments.get(name, named[name].default) in (MISSING, inspect.Parameter.empty):
            raise ConfigError(f"{prefix}{name}: required; set it with {prefix}{name}=VALUE")


def build(node: Mapping, path: str, **supplied: Any) -> Any:
    """Build the object that a checked node describes. An error in its constructor becomes a ConfigError."""
    target = locate(node[TARGET], f"{path}.{TARGET}")
    arguments = {k: _built(v, f"{path}.{k}") for k, v in node.items() if k != TARGET}
    try:
        return target(**arguments, **supplied)
    except UserError:
        raise
    except Exception as error:
        # Our constructors begin their messages with the wrong argument: "power: must be positive" in the node "loss"
        # becomes "loss.power: must be positive".
        separator = "." if str(error).partition(":")[0] in arguments else ": "
        raise ConfigError(f"{path}{separator}{_message(error)}{blame(error)}") from error


def _built(value: Any, path: str) -> Any:
    """A node's argument, in which each node is replaced by its object."""
    if isinstance(value, Mapping) and TARGET in value:
        return build(value, path)
    if _has_nodes(value):
        return {name: build(node, f"{path}.{name}") for name, node in value.items()}
    return value


def _has_nodes(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Mapping) and TARGET in one for one in value.values())


def _in_nodes(key: str, arguments: Mapping, prefix: str) -> str:
    """A question after the nodes one level deeper that have an argument `key`, such as a union's parts."""
    named = {f"{prefix}{k}.{name}": node for k, v in arguments.items() if _has_nodes(v) for name, node in v.items()}
    found = [f"{path}.{key}" for path, node in named.items() if isinstance(node, Mapping) and key in node]
    return f"; did you mean {' and '.join(found)}?" if found else ""


def locate(name: Any, path: str) -> Callable:
    """Import the class or function that a `_target_` names.

    Raises:
        ConfigError: it has another name today, cannot be imported, or is not callable.
    """
    now = {old: new for new, old in identity.MOVED.items()}
    # A config that was saved before a class was moved: name the new path.
    if isinstance(name, str) and name in now:
        raise ConfigError(f"{path}={name}: is {now[name]} now")
    try:
        target = pkgutil.resolve_name(name)
    except Exception as error:  # importing a user's module can raise any error
        if isinstance(name, str) and len(name) > 200:
            raise ConfigError(f"{path}={_show(name)}: cannot be imported") from error
        if place := blame(error):
            raise ConfigError(f"{path}={name}: cannot be imported: {_message(error)}{place}") from error
        # Suggest the nearest name in the module that was meant, if that one can be imported.
        parent = str(name).rpartition(".")[0]
        try:
            candidates = [f"{parent}.{n}" for n in vars(pkgutil.resolve_name(parent)) if not n.startswith("_")]
        except Exception:
            candidates = []
        near = suggest(name, candidates)
        if not near and isinstance(error, ModuleNotFoundError) and error.name == str(name).partition(".")[0]:
            near = f"; put {error.name}.py into the folder where the command is typed, or its folder into PYTHONPATH"
        raise ConfigError(f"{path}={name}: cannot be imported ({one_line(error)}){near}") from error
    if not callable(target):
        raise ConfigError(f"{path}={name}: is not a class or function")
    return target


def _message(error: Exception) -> str:
    """The error's own text, with its type if the text alone says too little. Example: a KeyError's text is 'weight'."""
    plain = isinstance(error, (ValueError, TypeError, FileNotFoundError, RuntimeError)) and str(error)
    return one_line(error if plain else f"{type(error).__name__}: {error}")


def hints_of(target: Callable) -> dict[str, Any]:
    """The type hint of each argument of a class or function, with its range; empty if the hints cannot be read."""
    extra = OPTIMIZER if getattr(target, "__module__", "").startswith("torch.optim.") else {}
    # The hints of a class stand at its __init__. A dataclass has them on the class itself.
    if inspect.isclass(target) and not hasattr(target, "__dataclass_fields__"):
        target = target.__init__
    try:
        return typing.get_type_hints(target, include_extras=True) | extra
    except Exception:  # hints that only a type checker can resolve
        return extra


def complaint(hint: Any, value: Any) -> str:
    """The fault of a plain value, such as "must be greater than 0"; empty if the value fits the hint.

    Args:
        hint: type, choices or range. None, or a hint that pydantic cannot read, allows everything.
        value: a value from YAML: a number, a string, a list, a mapping or None.
    """
    if (adapter := adapter_of(hint)) is None:
        return ""
    try:
        # pydantic's JSON mode is strict about numbers and strings, but takes a list for a tuple. YAML has only lists.
        adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        return explain(error, value)
    return ""


def adapter_of(hint: Any) -> TypeAdapter | None:
    """pydantic's check for a type hint; None if there is no hint, or if pydantic cannot read it."""
    if hint is None:
        return None
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False))
    except (PydanticUserError, NameError, TypeError):
        return None


def check_size(value: Any, path: str) -> None:
    """Refuse numbers that are too large for a tensor, also inside lists and mappings.

    Raises:
        ConfigError: an integer does not fit into int64, or a real number is beyond float32.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            check_size(item, path)
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        digits = len(str(abs(value)))
        raise ConfigError(f"{path}: an integer of {digits} digits; it must fit into 64 bits (1e30 is a real number)")
    elif isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST_FLOAT:
        raise ConfigError(f"{path}={value}: a number must be within ±{LARGEST_FLOAT}, as float32 is")


def explain(error: ValidationError, value: Any) -> str:
    """pydantic's error in words, such as "must be greater than 0"."""
    errors = error.errors(include_url=False)
    # Every member of a union reports an error. "or null" is said once, at the end. Classes are left out, because their
    # instances cannot come from YAML.
    silent = ("none_required", "is_instance_of", "needs_python_object")
    useful = [e for e in errors if e["type"] not in silent] or errors
    lengths = {"missing": "a longer list", "too_long": "a shorter list"}
    texts = dict.fromkeys(lengths.get(e["type"], e["msg"].replace("Input should be ", "")) for e in useful)
    choices = " or ".join(e["ctx"]["expected"] for e in useful if e["type"] == "literal_error")
    allowed = [choice.strip(" '") for choice in choices.replace(" or ", ",").split(",")]
    none = " or null" if any(e["type"] == "none_required" for e in errors) else ""
    return f"must be {' or '.join(texts)}{none}{suggest(value, allowed) if isinstance(value, str) else ''}"


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"
