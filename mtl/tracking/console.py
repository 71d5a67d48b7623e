"""Lines for a person to read: tables, durations, one line for each epoch, a live line on a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any


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


class Fitted(str):
    """A line that can be said in fewer columns. A file gets the whole line."""

    fit: Callable[[int], str]

    def __new__(cls, text: str, fit: Callable[[int], str]) -> Fitted:
        line = super().__new__(cls, text)
        line.fit = fit
        return line


def wrapped(text: str, indent: int) -> Fitted:
    """`text`, which goes on below in further lines that are indented. Paths and commands are not broken."""

    def fit(columns: int) -> str:
        return textwrap.fill(
            text, max(columns, 2 * indent), subsequent_indent=" " * indent, break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip

    return Fitted(text, fit)


class Heading(Fitted):
    """A line of a run's header: what, and how it is. A grid's console says it again only where it differs."""

    key: str

    def __new__(cls, key: str, value: str) -> Heading:
        line = wrapped(f"{key:9s} {value}", 10)
        heading = super().__new__(cls, line, line.fit)
        heading.key = key
        return heading


def columns() -> int | None:
    """The width that a line may have: of COLUMNS, or of the terminal; None for a file, which takes any."""
    if (wish := os.environ.get("COLUMNS", "")).isdigit() and int(wish):
        return int(wish)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):  # no terminal, or closed
        return None


WIDE = 120  # columns of a table or of running text, where no terminal says how wide it is


def fold(text: str, width: int | None, keys: int = 1) -> str:
    """A table whose columns do not fit side by side as several tables, each with the first columns.

    Args:
        text: lines of a table of `table`, with other lines around it.
        width: of the terminal; None for no limit.
        keys: number of columns that say what a row is about.
    """
    lines = text.split("\n")
    rules = [line for line in lines if re.fullmatch(r"-+(  -+)+", line)]
    if width is None or len(rules) != 1 or len(rules[0]) <= width:
        return text
    spans = [match.span() for match in re.finditer("-+", rules[0])]
    blocks: list[list[tuple[int, int]]] = [[]]
    for span in spans[keys:]:
        if blocks[-1] and spans[keys - 1][1] + sum(2 + b - a for a, b in [*blocks[-1], span]) > width:
            blocks.append([])
        blocks[-1].append(span)
    first = next(i for i, line in enumerate(lines) if len(line) == len(rules[0]))  # above it stands a title
    folded = [
        "\n".join(
            "  ".join(line[a:b].ljust(b - a) for a, b in [*spans[:keys], *block]).rstrip() for line in lines[first:]
        )
        for block in blocks
    ]
    return "\n".join([*lines[:first], "\n\n".join(folded)])


def rate(per_second: float, noun: str) -> str:
    """Such as "1,234 img/s", or "1,234 samples/s" of data without images."""
    return f"{per_second:,.0f} {'img' if noun == 'image' else f'{noun}s'}/s"


def epoch_line(
    row: Mapping[str, float], tasks: Mapping[str, Sequence[Any]], epochs: int, remaining: float, noun: str = "image"
) -> Fitted:
    """One epoch on one line. More than four tasks are shown by their mean, the worst and the best of them.

    Args:
        row: as in metrics.jsonl.
        tasks: {task: (its main metric, that metric's unit, whether higher is better)}.
        epochs: of the whole run.
        remaining: seconds that are left.
        noun: what a sample of the data is called.
    """
    digits = len(str(epochs))
    splits = [name for name in ("train", "val", "test") if any(f"{name}/{task}_loss" in row for task in tasks)]
    start = f"epoch {int(row['epoch']):{digits}d}/{epochs}"

    def said(split: str, losses: bool, spread: bool = True) -> str:
        shown = {task: told for task, told in tasks.items() if f"{split}/{task}_loss" in row}
        if len(shown) > MANY:
            return f"{split} {_summary(row, split, shown, spread, named=losses)}"
        cells = []
        for task, told in shown.items():
            # A dash: without a label there is no loss, and F1 is undefined without a positive label.
            loss = [_known(row[f"{split}/{task}_loss"], ".3f")] if losses else []
            key = f"{split}/{task}_{told[0]}"  # some metrics are not measured in training
            value = [_known(row[key], ".4g", told[1])] if key in row else []
            if loss == value == ["–"]:
                value = []
            cells.append(" ".join([task, *loss, *value]))
        return f"{split} {', '.join(cells)}"

    weights = [row[f"weights/{task}"] for task in tasks if f"weights/{task}" in row]
    several = f"w {min(weights, default=0):.2f} to {max(weights, default=0):.2f}"
    ends = {
        "w": several if len(weights) > MANY else f"w {'/'.join(f'{w:.2f}' for w in weights)}" if weights else "",
        "lr": f"lr {row['lr']:.3g}",
        "speed": rate(row["time/images_per_second"], noun),
        "eta": f"ETA {duration(remaining)}" if remaining > 0 else "",
    }

    def line(splits: Sequence[str], losses: bool, *names: str, spread: bool = True) -> str:
        told = [said(s, losses, spread) for s in splits]
        return " | ".join(filter(None, [start, *told, *(ends[name] for name in names)]))

    def fit(width: int) -> str:
        kept = splits[1:] or splits  # the results on new data are what an epoch is looked at for
        ways = [
            (splits, True, "w", "lr", "speed", "eta"), (splits, True, "lr", "eta"), (kept, True, "w", "lr", "eta"),
            (kept, True, "eta"), (kept, False, "eta"), (kept[-1:], False, "eta"), (kept[-1:], False),
        ]  # fmt: skip
        lines = [*(line(*way) for way in ways), line(kept[-1:], False, spread=False)]
        return next((text for text in lines if len(text) <= width), f"{lines[-1][: width - 1]}…")

    return Fitted(line(splits, True, "w", "lr", "speed", "eta"), fit)


MANY = 4  # tasks that a line shows one by one


def _known(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if value == value else "–"


def _summary(
    row: Mapping[str, float], split: str, tasks: Mapping[str, Sequence[Any]], spread: bool, named: bool
) -> str:
    """The mean over the tasks, the worst and the best of them, for each metric that they have, in each of its units.

    Args:
        spread: whether the worst and the best are shown.
        named: whether their names are shown, too.
    """
    parts = []
    for metric, unit in dict.fromkeys((told[0], told[1]) for told in tasks.values()):
        keys = {t: f"{split}/{t}_{metric}" for t, told in tasks.items() if tuple(told[:2]) == (metric, unit)}
        values = {t: row[key] for t, key in keys.items() if key in row}
        if not values:  # such as average precision, which is not measured in training
            continue
        higher = next(told[2:] for told in tasks.values() if tuple(told[:2]) == (metric, unit)) != (False,)
        # Undefined values, such as F1 without a positive label, have no part in the mean.
        known = {task: value for task, value in values.items() if value == value}
        mean = f"{sum(known.values()) / len(known):.4g}{unit}" if known else "–"
        who = next(iter(values)) if len(values) == 1 else len(known) or len(values)
        text = f"{who} {metric} {mean}"
        if len(known) > 1 and spread:
            low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
            worst, best = (low, high) if higher else (high, low)
            text += (
                f" (worst {worst} {known[worst]:.4g}, best {best} {known[best]:.4g})"
                if named
                else (f" ({known[worst]:.4g} to {known[best]:.4g})")
            )
        parts.append(text)
    if not parts:
        losses = [loss for task in tasks if (loss := row[f"{split}/{task}_loss"]) == loss]
        parts = [f"mean loss {sum(losses) / len(losses):.3f}" if losses else "no label"]
    return ", ".join(parts)


class Console(logging.StreamHandler):
    """Prints log lines in the terminal's width, each on a line of its own: a live line is removed before.

    Of a run's header it leaves out the lines that the run before had as well. train.log has all of them.
    """

    def __init__(self, stream: Any = None):
        super().__init__(stream)
        self._headings: dict[str, str] = {}  # the last line of each key

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(heading := record.msg, Heading):
            if self._headings.get(heading.key) == heading:
                return
            self._headings[heading.key] = heading
        clear_line()
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        width = columns()
        fits = isinstance(record.msg, Fitted) and width is not None and len(record.msg) > width
        return record.msg.fit(width) if fits else super().format(record)


def clear_line() -> None:
    """Remove the live line, if there is one. After Ctrl-C, too, which the terminal shows as ^C behind it."""
    if Progress.drawn:
        Progress.drawn = False
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


class Progress:
    """One live line on a terminal. It prints nothing into a file, which it would fill."""

    # The process's own, not a run's: it has one terminal. `mtl.cli.launchers.enter` forbids the line where several
    # processes share it.
    allowed = True
    drawn = False

    def __init__(self, total: int, label: str):
        self.total, self.label = total, label
        self.live = self.allowed and sys.stderr.isatty()
        self.start = self.shown = time.perf_counter()
        self._losses: Any = None

    def update(self, done: int, losses: Sequence[Any] = ()) -> None:
        """Steps done so far; redrawn at most five times a second.

        Args:
            done: number of steps.
            losses: of the tasks in this step, () tensors. Their sum is shown as soon as it is known: no step waits.
        """
        now = time.perf_counter()
        if self.live and now - self.shown > 0.2:
            self.shown = now
            left = (now - self.start) / done * (self.total - done)
            line = f"{self.label}: step {done}/{self.total}{self._loss(losses)}, {duration(left)} left"
            width = columns()
            sys.stderr.write(f"\r\033[K{line if width is None else line[: width - 1]}")
            sys.stderr.flush()
            Progress.drawn = True

    def _loss(self, losses: Sequence[Any]) -> str:
        if not losses:
            return ""
        from mtl.losses.delayed import Delayed  # late: the console is there before torch

        if self._losses is None:
            self._losses, self._known = Delayed(), None
        total = sum(loss.detach() for loss in losses)
        known = total.item() if total.device.type == "cpu" else self._losses.read(total)
        self._known = self._known if known is None else known
        return "" if self._known is None else f", loss {self._known:.4g}"

    def clear(self) -> None:
        """Remove the line."""
        if self.live:
            clear_line()
