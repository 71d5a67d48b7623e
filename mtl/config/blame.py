"""Errors in a user's own class: one line that names the user's file and line."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtl.config.errors import UserError, one_line

PACKAGE = Path(__file__).parents[1]
LIBRARIES = tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class UserCodeError(UserError):
    """A user's own class raised an exception, or does what cannot be right."""


def is_users(file: str | None) -> bool:
    """Whether a source file belongs to neither this package, nor Python, nor an installed library."""
    if not file or file.startswith("<"):
        return False
    path = Path(file).absolute()
    return not any(path.is_relative_to(folder) for folder in (PACKAGE, *LIBRARIES))


def users_line(error: BaseException) -> str | None:
    """`file:line` of the innermost frame in a user's file that `error` has passed; None if it has passed none."""
    if isinstance(error, SyntaxError) and is_users(error.filename):
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def definition(thing: Any) -> str:
    """`file:line` where a class or function is defined; its name if there is no source."""
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", repr(thing))


@contextmanager
def blamed() -> Iterator[None]:
    """An exception that comes out of a user's own code leaves this block as a UserCodeError with file and line."""
    try:
        yield
    except Exception as error:
        # Our own exceptions may pass a user's frames, too: a collective in a user's backbone breaks off, for one.
        if type(error).__module__.partition(".")[0] == "mtl" or (where := users_line(error)) is None:
            raise
        raise UserCodeError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
