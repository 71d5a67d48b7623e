"""Checkpoints that a kill at any moment leaves intact, and that open without running code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` in one atomic step: the old file stays until the new one is complete on disk."""
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source` is now, atomically; costs no second write where hard links exist."""
    partial = path.with_suffix(".tmp")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; refuses anything but tensors and plain containers."""
    return torch.load(path, map_location="cpu", weights_only=True)
