"""Errors that the user can mend: one line, no traceback, and an exit code.

Exit code 2 means that the command or the config is wrong. 1 means that a run failed or the machine is at fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Base class. The message is one line: what is wrong and where, the allowed values, and the nearest one."""

    exit_code = 1


class ConfigError(UserError):
    """The command or the config is wrong: exit code 2."""

    exit_code = 2


class SetupError(UserError):
    """The machine is at fault: missing or damaged data, a read-only folder, no such device. Exit code 1."""


class Diverged(UserError):
    """A loss or metric became NaN or infinite: exit code 1, status "diverged".

    Args:
        message: what became what, and where.
        cure: what to try.
    """

    def __init__(self, message: str, cure: str = "try a smaller optimizer.lr or schedule.warmup_epochs"):
        super().__init__(message)
        self.cure = cure


class Busy(UserError):
    """Another process is training this run already: exit code 1."""


# A BaseException, like KeyboardInterrupt: `except Exception` in a user's code must not swallow it.
class Terminated(BaseException):
    """SIGTERM, or SIGHUP of a closed terminal. The current run notes that it was interrupted, and the grid stops.

    Args:
        code: exit code, 128 plus the number of the signal.
    """

    def __init__(self, code: int = 143):
        super().__init__(code)
        self.code = code


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove empty `folders`, innermost first, up to the first that is not empty. A refused run leaves no trace."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine has too little memory."""
    # PyTorch raises a plain RuntimeError on a CPU; only its text says that memory ran out.
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def one_line(text: object) -> str:
    """`text` with all line breaks and runs of spaces replaced by one space."""
    return " ".join(str(text).split())


def suggest(word: str, allowed: Iterable[str]) -> str:
    """The end of an error message: "; did you mean X?", where X is the allowed word nearest to `word`.

    Equally near words give "X or Y". If no word is near, the result is empty.
    """
    if not word:
        return ""
    matches = difflib.get_close_matches(str(word), list(allowed), n=3, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, match, str(word)).ratio() for match in matches]
    nearest = sorted(m for m, ratio in zip(matches, likeness, strict=True) if ratio == max(likeness))
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
