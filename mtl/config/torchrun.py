"""Size and rank of a process that torchrun started. Imports no torch, so that --help and refusals stay fast."""

from __future__ import annotations

import os


def size() -> int:
    """Number of processes that torchrun started for this run; 1 without torchrun."""
    # WORLD_SIZE alone is no proof: Slurm scripts often set it for other programs.
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0. Process 0 leads: only it writes files and prints."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def command() -> list[str]:
    """The words before `train.py` in a command that starts a run like this one: python, or torchrun and its options."""
    if size() == 1:
        return ["python"]
    here, nodes = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    return ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc-per-node={here}"]
