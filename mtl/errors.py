"""Errors that are the user's to mend: one line, no traceback, and an exit code that tells whose move it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """One line: what, where, allowed values, nearest match."""

    exit_code = 1


class ConfigError(UserError):
    """The command or the config is wrong: exit code 2."""

    exit_code = 2


class SetupError(UserError):
    """The machine is: missing or damaged data, a folder that cannot be written, a device that is not there. Code 1."""


class Diverged(UserError):
    """Training left the finite numbers: exit code 1, status "diverged"."""


class Busy(UserError):
    """Another process works on this very run: exit code 1."""


class Terminated(BaseException):
    """SIGTERM, or SIGHUP of a closed terminal: the run in progress notes that it was interrupted, the grid stops."""

    def __init__(self, code: int = 143):
        super().__init__(code)
        self.code = code


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove `folders`, innermost first, up to the first that holds something: a refused run leaves nothing behind."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine has too little memory; PyTorch says so in a RuntimeError."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def one_line(text: object) -> str:
    """`text` on one line."""
    return " ".join(str(text).split())


def suggest(word: str, allowed: Iterable[str]) -> str:
    """'; did you mean X?' for the allowed word nearest to `word`, 'X or Y' for equally near ones, or nothing."""
    if not word:
        return ""
    matches = difflib.get_close_matches(str(word), list(allowed), n=3, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, match, str(word)).ratio() for match in matches]
    nearest = sorted(m for m, ratio in zip(matches, likeness, strict=True) if ratio == max(likeness))
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
