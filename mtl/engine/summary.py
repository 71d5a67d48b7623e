"""The results of a run, from its rows: at the best epoch, at the last epoch, and at the one that validation chose."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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


def selector(tasks: Iterable[Task], validated: bool) -> tuple[str, bool]:
    """The metric that chooses best.pt: the first task's main metric, on validation data if there is any.

    Otherwise it is measured on test data, as in the protocol of the CIFAR-100 benchmark.

    Returns:
        the metric's key, and whether higher is better.
    """
    return next(iter(metrics(tasks, "val" if validated else "test").items()))


def best(rows: Sequence[Row], key: str, higher: bool) -> Row:
    """The first row with the best value of `key`. NaN and infinity are never the best."""
    sign = 1 if higher else -1
    return max(rows, key=lambda row: sign * row[key] if math.isfinite(row[key]) else -math.inf)


def summarise(rows: Sequence[Row], tests: Mapping[str, bool], key: str, higher: bool) -> dict[str, Any]:
    """The results of a run.

    Args:
        rows: the rows of metrics.jsonl; at least one.
        tests: for each test metric, whether higher is better.
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
