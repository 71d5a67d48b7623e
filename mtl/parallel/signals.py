"""The signals that end a process, and a block in which they wait.

Example: a row of metrics.jsonl and its checkpoint belong together. A signal must not end the process between the two.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal


def ending() -> list[int]:
    """The signals that would end this process now. Ignored signals are left out: under nohup, SIGHUP is ignored."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def deferred() -> Iterator[None]:
    """Hold back the signals that end a process until the end of this block. The block should be short."""
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread only
        yield
        return
    waiting: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: waiting.append(number)) for s in ending()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            # None: the handler was set by C code and cannot be restored from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if waiting:
            signal.raise_signal(waiting[0])
