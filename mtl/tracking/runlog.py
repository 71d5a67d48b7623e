"""train.log: every run's own lines, also where a process has several runs under way."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from pathlib import Path

# The log of the run that this thread or task is at work on.
_current: ContextVar[RunLog | None] = ContextVar("run log", default=None)


class RunLog(logging.FileHandler):
    """Takes what is logged between `begin` and `end`, except other runs' lines.

    A line of a thread that no run has begun in, such as a library's own, goes to all runs.

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
    """Whether a record, which is being logged now, is a run's own line and so stands in its train.log."""
    return _current.get() is not None
