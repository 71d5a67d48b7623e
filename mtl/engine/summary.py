"""What the rows of a run come to: the best epoch, the last one, and the one that validation data choose."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from mtl.tasks import Task

Row = Mapping[str, float]


def metrics(tasks: Iterable[Task], split: str) -> dict[str, bool]:
    """{"test/fine_accuracy": higher is better, …}, the main one first."""
    return {f"{split}/{t.name}_{score.name}": score.higher_is_better for t in tasks for score in t.scores}


def owned(tasks: Iterable[Task]) -> dict[str, list[str]]:
    """{"fine": ["fine_accuracy"], …}: which metrics are whose; one task's name may begin with another's."""
    return {t.name: [f"{t.name}_{score.name}" for score in t.scores] for t in tasks}


def selector(tasks: Iterable[Task], validated: bool) -> tuple[str, bool]:
    """What chooses best.pt: the first task's main metric on validation data, or, by the protocol, on test data.

    Returns:
        its key, and whether higher is better.
    """
    return next(iter(metrics(tasks, "val" if validated else "test").items()))


def best(rows: Sequence[Row], key: str, higher: bool) -> Row:
    """The first row with the best value of `key`; a value that is not a number is never the best."""
    sign = 1 if higher else -1
    return max(rows, key=lambda row: sign * row[key] if math.isfinite(row[key]) else -math.inf)


def summarise(rows: Sequence[Row], tests: Mapping[str, bool], key: str, higher: bool) -> dict[str, Any]:
    """The results of a run.

    Args:
        rows: of metrics.jsonl, at least one.
        tests: for each test metric whether higher is better.
        key, higher: as `selector` returns them.

    Raises:
        KeyError: a row lacks one of the metrics.
    """
    chosen = best(rows, key, higher)
    return {
        "epochs": len(rows),
        "best": {k: {"value": (row := best(rows, k, h))[k], "epoch": row["epoch"]} for k, h in tests.items()},
        "last": {k: rows[-1][k] for k in tests},
        "higher_is_better": dict(tests),
        "selected": {"by": key, "epoch": chosen["epoch"], **{k: chosen[k] for k in tests}}
        if key.startswith("val/")
        else None,
    }


def speed(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of all epochs, and training images a second on average."""
    return {
        "seconds": sum(r["time/seconds"] for r in rows),
        "images_per_second": sum(r["time/images_per_second"] for r in rows) / len(rows),
    }


def forget_peak_memory(device: torch.device) -> None:
    """From here on the peak of a GPU is this run's, not that of an earlier run in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """GiB at most in use so far: of the GPU, or of this whole process on a CPU, earlier runs in it included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
