"""What torchrun tells a process it has started. Imports no torch: help and refusals need it as well."""

from __future__ import annotations

import os


def size() -> int:
    """Number of processes that torchrun started for this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this is; 0 leads: it alone writes files and prints."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def command() -> list[str]:
    """The words before `train.py` that start a run like this one."""
    if size() == 1:
        return ["python"]
    here, nodes = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc-per-node={here}"]
