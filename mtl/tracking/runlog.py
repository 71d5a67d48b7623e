"""train.log holds one run's own lines, also if a process works on several runs."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from pathlib import Path

# The log of the run that this thread works on.
_current: ContextVar[RunLog | None] = ContextVar("run log", default=None)


class RunLog(logging.FileHandler):
    """Writes all lines between `begin` and `end`, except other runs' lines.

    A line goes to all runs if no run has begun in its thread: a library's own thread, say.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, file: Path):
        super().__init__(file)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.addFilter(lambda record: _current.get() in (None, self))

    def begin(self) -> None:
        """From here on this thread's lines are this run's."""
        self._before = _current.get()
        _current.set(self)
        logging.getLogger("mtl").addHandler(self)

    def end(self) -> None:
        """Close the file. Raises OSError where its disk is full or gone."""
        logging.getLogger("mtl").removeHandler(self)
        if _current.get() is self:
            _current.set(self._before)
        self.close()


def of_a_run(record: logging.LogRecord) -> bool:
    """Whether a record that is logged now is a run's own line, and so part of its train.log."""
    return _current.get() is not None
