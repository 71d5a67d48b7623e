"""The signals that end a process. They can wait: none falls between two files that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, kill, a closed terminal


def ending() -> list[int]:
    """The signals that would end this process now. One that it ignores is not among them: nohup ignores SIGHUP."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def deferred() -> Iterator[None]:
    """The signals that end a process take effect at the end of this block, which should be short."""
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread only
        yield
        return
    waiting: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: waiting.append(number)) for s in ending()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if waiting:
            signal.raise_signal(waiting[0])
