"""Arrays that are made once from many files, and memory-mapped from then on.

An array's name holds a digest of the files' names, sizes and times: other files make another array. Of several
processes one makes it, and the others wait. A process that is killed leaves no half array.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from mtl.errors import SetupError, one_line


def digest(files: Sequence[Path], *settings: object) -> str:
    """Of what can be seen without opening the files, and of the settings of the conversion."""
    marks = [*settings, *((f.name, s.st_size, s.st_mtime_ns) for f in files if (s := f.stat()))]
    return hashlib.sha256(repr((str(files[0].parent.resolve()), marks)).encode()).hexdigest()[:12]


def cached(target: Path, size: int, rows: Callable[[], Iterable[np.ndarray]], what: str) -> Tensor:
    """(size, …) the array at `target`, mapped: the one that is there, or one made now.

    Args:
        target: an .npy file; its folder is made.
        size: number of rows.
        rows: makes the rows, all of one shape and type.
        what: is read for that, such as "20 files of images", for a message.

    Raises:
        SetupError: the array cannot be written, or a row cannot be made.
    """
    if (array := _open(target, size)) is None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.parent / ".lock"):  # of several processes one writes it, the others wait and find it
                if (array := _open(target, size)) is None:
                    _write(target, size, rows, what)
                    array = _open(target, size)
        except OSError as error:
            raise SetupError(
                f"{target.resolve()} cannot be written ({one_line(error)}); "
                "set data.cache to a folder of your own with enough space"
            ) from error
    assert array is not None
    return torch.from_numpy(array)


def _open(target: Path, size: int) -> np.ndarray | None:
    """The array, mapped; None where there is none, or only a part of it."""
    try:
        # "c": what is written into it, which nobody does, stays in memory. torch warns of arrays that are read only.
        array = np.load(target, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if len(array) == size else None


def _write(target: Path, size: int, rows: Callable[[], Iterable[np.ndarray]], what: str) -> None:
    """Write all rows beside the target; the finished file arrives in one rename. The caller holds the lock."""
    for left in target.parent.glob(".part-*"):  # by a process that was killed: nobody else writes now
        left.unlink()
    print(f"reading {what} into {target}", flush=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
    try:
        # Not through a memory map, where a full disk would kill the process without a word.
        with os.fdopen(handle, "wb") as out:
            for i, row in enumerate(rows()):
                if i == 0:
                    header = {"descr": np.lib.format.dtype_to_descr(row.dtype), "fortran_order": False}
                    np.lib.format.write_array_header_1_0(out, {**header, "shape": (size, *row.shape)})
                out.write(np.ascontiguousarray(row).data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
