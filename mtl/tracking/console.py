"""Lines for a person to read: tables, durations, one line for each epoch, a live line on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress


def legible() -> None:
    """A terminal that lacks a letter shows its code from now on, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not what Python opened
            stream.reconfigure(errors="backslashreplace")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (str(c) for c in cells)
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def count(number: int, noun: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """75 → '1m15s', 4000 → '1h06m'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def epoch_line(row: Mapping[str, float], tasks: Mapping[str, tuple[str, str]], epochs: int, remaining: float) -> str:
    """One epoch on one line.

    Args:
        row: as in metrics.jsonl.
        tasks: {task: (its main metric, that metric's unit)}.
        epochs: of the whole run.
        remaining: seconds that are left.
    """
    digits = len(str(epochs))
    parts = [f"epoch {int(row['epoch']):{digits}d}/{epochs}"]
    for prefix in ("train", "val", "test"):
        cells = [
            f"{task} {row[f'{prefix}/{task}_loss']:.3f} {row[f'{prefix}/{task}_{metric}']:.4g}{unit}"
            for task, (metric, unit) in tasks.items()
            if f"{prefix}/{task}_loss" in row
        ]
        if cells:
            parts.append(f"{prefix} " + ", ".join(cells))
    if weights := [f"{row[f'weights/{task}']:.2f}" for task in tasks if f"weights/{task}" in row]:
        parts.append("w " + "/".join(weights))
    parts.append(f"lr {row['lr']:.3g}")
    parts.append(f"{row['time/images_per_second']:,.0f} img/s")
    if remaining > 0:
        parts.append(f"ETA {duration(remaining)}")
    return " | ".join(parts)


class Progress:
    """One live line on a terminal. It prints nothing into a file, which it would fill."""

    # The process's own, not a run's: `mtl.cli.launchers.enter` forbids it where several processes share the terminal.
    allowed = True

    def __init__(self, total: int, label: str):
        self.total, self.label = total, label
        self.live = self.allowed and sys.stderr.isatty()
        self.start = self.shown = time.perf_counter()

    def update(self, done: int) -> None:
        """Steps done so far; redrawn at most five times a second."""
        now = time.perf_counter()
        if self.live and now - self.shown > 0.2:
            self.shown = now
            left = (now - self.start) / done * (self.total - done)
            sys.stderr.write(f"\r\033[K{self.label}: step {done}/{self.total}, {duration(left)} left")
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self.live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
