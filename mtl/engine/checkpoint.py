"""Checkpoint files. A kill at any moment leaves them intact, and opening one never runs code from it."""

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
    """Write `state` to `path` atomically: the old file stays until the new one is complete on disk.

    Raises:
        WriteError: the file cannot be written. No incomplete file is left.
    """
    # First to another name, then fsync, then rename. A rename is atomic, but without fsync a power cut could leave the
    # new name with an empty file.
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
                partial.unlink(missing_ok=True)  # a part of a file would keep a full disk full
            raise


def _write(state: dict[str, Any], file: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # after a disk error, closing torch's writer may raise a second error
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def link(source: Path, path: Path) -> None:
    """Make `path` the same file as `source`, atomically. With hard links the content is not written a second time.

    If `source` is later replaced by a new file, `path` keeps the old content.

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
            with suppress(OSError):  # if both names already are one file, the rename does nothing
                partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        SetupError: the file is damaged, or contains more than tensors and plain containers. Such content is not loaded.
    """
    check_regular(path)
    try:
        # torch.load does not compare checksums: it would load a weight with a flipped bit.
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
    except Exception as error:  # damaged zip files and pickles raise many kinds of errors
        raise SetupError(
            f"{path} is damaged or no checkpoint of this project; delete it to start the run afresh"
        ) from error
    return state
