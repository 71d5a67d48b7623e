"""Checkpoints that a kill at any moment leaves intact, and that open without running code."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from mtl.config.errors import SetupError


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
    partial.unlink(missing_ok=True)  # two names of one file: then the rename does nothing


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        SetupError: the file is damaged, or holds anything but tensors and plain containers (which is never run).
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SetupError(
            f"{path} is damaged or no checkpoint of this project; delete it to start the run afresh"
        ) from error
