"""The results of a run, from its rows: at the best epoch, at the last epoch, and at the one that validation chose."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtl.tasks import Task

Row = Mapping[str, float]


def metrics(tasks: Iterable[Task], split: str) -> dict[str, bool]:
    """{"test/fine_accuracy": True, …}: for each metric, whether higher is better. The main metric comes first."""
    return {f"{split}/{t.name}_{score.name}": score.higher_is_better for t in tasks for score in t.scores}


def owned(tasks: Iterable[Task]) -> dict[str, list[str]]:
    """{"fine": ["fine_accuracy"], …}: the metrics of each task.

    A report cannot find them from the names alone: a task "a" and a task "a_b" both have metrics that begin with "a_".
    """
    return {t.name: [f"{t.name}_{score.name}" for score in t.scores] for t in tasks}


def units(tasks: Iterable[Task]) -> dict[str, str]:
    """{"mu_mae": "D", …}: the units of the metrics that have one."""
    return {f"{t.name}_{score.name}": score.unit.strip() for t in tasks for score in t.scores if score.unit.strip()}


MEAN = "mean"  # val/mean: the mean over the tasks


@dataclass(frozen=True)
class Selection:
    """What chooses the best epoch.

    Attributes:
        by: its name, such as "val/fine_accuracy", or "val/mean".
        keys: the metrics whose mean it is; one for a single metric.
        higher: whether higher is better.
    """

    by: str
    keys: tuple[str, ...]
    higher: bool

    def value(self, row: Row) -> float:
        """The mean in one row. A value that is undefined, such as F1 without a positive label, has no part in it."""
        values = [row[key] for key in self.keys]
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


def selection(tasks: Iterable[Task], validated: bool, select: str) -> Selection:
    """What chooses best.pt: metrics on validation data if there are any, otherwise on test data.

    The latter is the protocol of the CIFAR-100 benchmark.

    Args:
        tasks: of the run.
        validated: whether there is validation data.
        select: "first" for the first task's main metric, "mean" for the mean of all tasks' main metrics.
    """
    split = "val" if validated else "test"
    main = {f"{split}/{task.name}_{task.scores[0].name}": task.scores[0].higher_is_better for task in tasks}
    return selection_of(main, select)


def selection_of(main: Mapping[str, bool], select: str) -> Selection:
    """The `Selection` from the tasks' main metrics, with whether higher is better."""
    first, higher = next(iter(main.items()))
    if select == MEAN:
        return Selection(f"{first.partition('/')[0]}/{MEAN}", tuple(main), higher)
    return Selection(first, (first,), higher)


def best(rows: Sequence[Row], chosen: Selection) -> Row:
    """The first row with the best value. NaN and infinity are never the best."""
    sign = 1 if chosen.higher else -1
    return max(rows, key=lambda row: sign * value if math.isfinite(value := chosen.value(row)) else -math.inf)


def summarise(rows: Sequence[Row], tests: Mapping[str, bool], chosen: Selection) -> dict[str, Any]:
    """The results of a run.

    Args:
        rows: the rows of metrics.jsonl; at least one.
        tests: for each test metric, whether higher is better.
        chosen: what chooses the best epoch.

    Raises:
        KeyError: a row lacks one of the metrics.
    """
    row = best(rows, chosen)
    tops = {key: best(rows, Selection(key, (key,), higher)) for key, higher in tests.items()}
    return {
        "epochs": len(rows),
        "best": {key: {"value": top[key], "epoch": top["epoch"]} for key, top in tops.items()},
        "last": {k: rows[-1][k] for k in tests},
        "higher_is_better": dict(tests),
        "selected": {"by": chosen.by, "epoch": row["epoch"], **{key: row[key] for key in tests}}
        if chosen.by.startswith("val/")
        else None,
        **({"select": MEAN} if chosen.by.endswith(f"/{MEAN}") else {}),
    }


def speed(rows: Sequence[Row]) -> dict[str, float]:
    """The seconds of all epochs, and the mean number of training images per second."""
    return {
        "seconds": sum(r["time/seconds"] for r in rows),
        "images_per_second": sum(r["time/images_per_second"] for r in rows) / len(rows),
    }


def forget_peak_memory(device: torch.device) -> None:
    """Reset the peak memory, which may be from an earlier run in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no Linux, or a container that forbids it: then the peak is the process's
            Path("/proc/self/clear_refs").write_text("5")  # 5 resets the peak and nothing else


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the tensors on a GPU; on a CPU the resident memory of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20  # from KiB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
