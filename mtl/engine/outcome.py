"""How a run ended, for the exit code and the grid's closing table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: finished, failed, diverged, damaged; or, if nothing was started: refused, running elsewhere, planned.
        code: exit code of the command.
        directory: the run's directory; empty if the run was refused.
        message: the error, if any.
        plan: the run's state and the time that is left (mtl.cli.plan), if nothing was to be trained.
    """

    status: str
    code: int
    directory: str = ""
    message: str = ""
    plan: dict[str, Any] | None = None
