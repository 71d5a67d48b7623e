"""Reads and writes the small files of a run's directory.

A file is written completely or not at all. Every kind of damage to a file gives an error message of one line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtl.errors import SetupError

CURE = "restore it, or delete the run's folder to start the run afresh"
START = bytes(32)  # the digest of no rows


class Damaged(SetupError):
    """The content of a run's file is not what this project has written."""


class WriteError(SetupError):
    """A file of a run cannot be written: full disk, folder deleted or moved, no permission."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError in this block into a WriteError that names the file and its folder."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or type(error).__name__
        raise WriteError(f"cannot write {path.name} in {path.parent}: {cause}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically. No incomplete file is left.

    Raises:
        WriteError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            partial.unlink(missing_ok=True)  # a leftover could be a link or a FIFO, which blocks whoever opens it
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            # On a full disk there is no room for a second file. If the new text fits into the old file's blocks, it is
            # written there. So a run can still note why it has failed.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not _fits(text, path):
                raise
            with path.open("r+", encoding="utf-8") as f:
                f.write(text)
                f.truncate()


def _fits(text: str, path: Path) -> bool:
    """Whether the blocks that the file already has on disk have room for `text`."""
    return path.is_file() and len(text.encode()) <= path.stat().st_blocks * 512


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically. NaN and infinity become null, because JSON has no such numbers."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        json.JSONDecodeError: the text is incomplete, as after a power cut.
        Damaged: the content is something other than a JSON object.
        SetupError: it is not a regular file, or cannot be read.
    """
    data = read_regular(path)
    try:
        content = json.loads(data.decode())  # decoded here, because json would guess the encoding of bytes
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deeply
        raise Damaged(f"{path} is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise Damaged(f"{path} is damaged: it holds {_short(content)}, no JSON object")
    return content


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. (Reading a FIFO or a device might block for ever.)

    Raises:
        FileNotFoundError: there is no such file.
        SetupError: it is not a regular file, or cannot be read.
    """
    try:
        check_regular(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a parent folder in its path is a file
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}") from error


def check_regular(path: Path) -> None:
    """Check that `path` is a regular file, or does not exist.

    Raises:
        SetupError: `path` is a folder, a FIFO, a device, or a link to nothing.
    """
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise SetupError(f"{path} is no regular file; move it away")


# -- rows of metrics.jsonl --------------------------------------------------------------------------------------------


def dump_row(row: Mapping[str, float]) -> str:
    """One line of metrics.jsonl, without the line end. NaN and infinity become null."""
    return json.dumps(plain(row), allow_nan=False)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, with null as NaN. An incomplete last line, as after a kill, is left out.

    Raises:
        SetupError: it is not a regular file, or line number k is not the row of epoch k.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except FileNotFoundError:
        return []
    while lines and not lines[-1]:
        lines.pop()
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                break
            row = None
        if not _is_row(row, number):
            raise Damaged(f"{path} is damaged: line {number} is not the row of epoch {number}; {CURE}")
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def _is_row(row: Any, number: int) -> bool:
    if not isinstance(row, dict) or type(row.get("epoch")) is not int or row["epoch"] != number:
        return False
    return all(value is None or type(value) in (int, float) for value in row.values())


def digest(rows: Sequence[Mapping[str, float]], before: bytes = START) -> bytes:
    """A running hash over rows: continues from the digest `before` of the earlier rows.

    Times are left out, because they differ between runs with otherwise equal results.
    """
    for row in rows:
        timeless = {key: value for key, value in row.items() if not key.startswith("time/")}
        before = hashlib.sha256(before + dump_row(timeless).encode()).digest()
    return before


def plain(value: Any) -> Any:
    """Convert `value` for JSON: NaN and infinity become None, tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _short(content: Any) -> str:
    text = json.dumps(content)
    return text if len(text) <= 20 else f"{text[:20]}…"
