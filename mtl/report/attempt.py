"""One guard for the parts of a report: a fault of ours in one part must not cost the reader the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mtl.errors import UserError, one_line

T = TypeVar("T")


class Failures(list[str]):
    """A line for each part that could not be made.

    Attributes:
        tracebacks: of each, for whoever mends it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tracebacks: list[str] = []

    def add(self, others: Failures) -> None:
        """Add the failures of a part."""
        self += others
        self.tracebacks += others.tracebacks


def attempt(part: str, make: Callable[[], T], failed: Failures) -> T | None:
    """What `make` returns; None after an error of ours, which becomes a line in `failed`.

    Args:
        part: of the report, in words.

    Raises:
        UserError, OSError: they concern the whole report.
    """
    try:
        return make()
    except (UserError, OSError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        failed.append(f"{part}: {type(error).__name__}: {one_line(error)} ({where})")
        failed.tracebacks.append(f"{part}\n{traceback.format_exc()}")
        return None
