"""Checks of arguments that type hints cannot express. Every error message begins with the argument's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, get_args


def integer(name: str, value: Any) -> int:
    """`value` as a Python integer. NumPy integers and one-element integer tensors are allowed.

    Raises:
        ValueError: it is not an integer; the message begins with `name`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r} is not an integer") from None


def task_names(tasks: int | Sequence[str]) -> tuple[str, ...]:
    """The names of the tasks. If only their number is given, the names are "0", "1", ….

    Raises:
        ValueError: `tasks` is neither a number nor a list of names, is empty, or has a name twice.
    """
    if isinstance(tasks, str):
        raise ValueError(f"tasks: {tasks!r} is one name; give a list of names, or their number")
    if not isinstance(tasks, Iterable) or getattr(tasks, "ndim", 1) == 0:
        try:
            tasks = range(integer("tasks", tasks))
        except ValueError as error:
            raise ValueError(f"tasks: {tasks!r:.60} is neither a whole number nor a list of names") from error
    names = tuple(map(str, tasks))
    if not names:
        raise ValueError("tasks: at least one task is needed")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: {', '.join(names)}; every task needs a name of its own")
    return names


def by_task(key: str, values: Mapping[str, float] | Sequence[float], names: Sequence[str]) -> list[float]:
    """One number for each task, given by name or in task order.

    Raises:
        ValueError: a task has no number, or a name is unknown.
    """
    if isinstance(values, Mapping):
        values = {str(name): value for name, value in values.items()}  # tasks=3 has names "0", "1", "2"
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"{key}: {unknown[0]!r} is no task; the tasks are {', '.join(names)}")
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{key}: none for {missing[0]!r}; one is needed for each of {', '.join(names)}")
        values = [values[name] for name in names]
    if len(values) != len(names):
        raise ValueError(f"{key}: {len(values)} given for {len(names)} tasks ({', '.join(names)})")
    return [float(value) for value in values]


def choose(name: str, value: str, options: Any) -> str:
    """Return `value` if the Literal type `options` allows it.

    Raises:
        ValueError: it does not; the message lists the options of the argument `name`.
    """
    if value not in get_args(options):
        raise ValueError(f"{name}: {value!r} is none of {', '.join(get_args(options))}")
    return value
