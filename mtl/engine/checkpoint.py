"""Checkpoints that a kill at any moment leaves intact, and that open without running code."""

from __future__ import annotations

import os
import shutil
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mtl.engine.files import check_regular, writing
from mtl.errors import SetupError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path` in one atomic step: the old file stays until the new one is complete on disk.

    Raises:
        WriteError: the file cannot be written; nothing half-written stays behind.
    """
    partial = path.with_suffix(".tmp")
    with writing(path):
        try:
            partial.unlink(missing_ok=True)
            with partial.open("wb") as f:
                _write(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)  # it would keep a full disk full
            raise


def _write(state: dict[str, Any], file: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch's own writer may fail once more while it closes after the disk's error
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source` is now, atomically; costs no second write where hard links exist.

    Raises:
        WriteError: the file cannot be written.
    """
    partial = path.with_suffix(".tmp")
    with writing(path):
        try:
            partial.unlink(missing_ok=True)
            try:
                os.link(source, partial)
            except OSError:
                shutil.copyfile(source, partial)
            os.replace(partial, path)
        finally:
            with suppress(OSError):  # two names of one file: then the rename does nothing
                partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        SetupError: the file is damaged, or holds anything but tensors and plain containers (which is never run).
    """
    check_regular(path)
    try:
        # torch.load does not compare the checksums, so it takes a flipped bit for a weight.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # every reader of zip files and pickles has its own errors for damaged ones
        raise SetupError(
            f"{path} is damaged or no checkpoint of this project; delete it to start the run afresh"
        ) from error
    return state
