"""Read the files of a run: nothing that blocks, nothing absurdly large, nothing but plain values. Write text."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json  # three times as fast as json.loads

from mtl.report.names import visible

MB = 10**6
LIMITS = {"run.json": 4 * MB, "config.yaml": MB, "summary.json": 4 * MB}  # a thousand times what runs write
LINE = 4 * MB  # of metrics.jsonl
VALUES, DEPTH = 50_000, 60  # of one file
LARGEST = 10**300  # of whole numbers: beyond, they are no floats


class Unreadable(Exception):
    """Why the folder of a run is left out, on one line."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises Unreadable."""
    return _read(file, lambda text: plain(from_json(text)))


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping. Raises Unreadable."""
    return _read(file, _config)


def read_rows(file: Path) -> Iterator[Any]:
    """The JSON value of each line; None for a line that is none. Raises Unreadable."""
    try:
        _regular(file)
        with file.open("rb") as lines:
            while line := lines.readline(LINE + 1):
                if len(line) > LINE:
                    raise Unreadable(f"{file.name}: a line is longer than {LINE // MB} MB")
                try:
                    yield from_json(line)
                except ValueError:
                    yield None
    except OSError as error:
        raise _unreadable(file, error) from None


def plain(value: Any, depth: int = 0, count: list[int] | None = None) -> Any:
    """A copy of a plain value, as in JSON and YAML: mappings, lists, texts, numbers, true, false, null.

    Texts are made `visible`, on one line.

    Raises:
        ValueError: something else is in it, it is nested too deeply, or aliases make too many values of few.
    """
    count = [0] if count is None else count
    count[0] += 1
    if count[0] > VALUES or depth > DEPTH:
        raise ValueError(f"more than {VALUES:,} values, or nested more than {DEPTH} deep")
    if isinstance(value, str):
        return visible(re.sub(r"\s*\n\s*", " ", value))
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("a number that no float holds")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, list):
        return [plain(v, depth + 1, count) for v in value]
    if isinstance(value, dict):
        if wrong := [k for k in value if not isinstance(k, (str, int))]:
            raise ValueError(f"{wrong[0]!r:.40} is no name")
        if len({isinstance(k, str) for k in value}) > 1:  # such names have no order
            raise ValueError("texts and numbers as the names of one mapping")
        return {visible(k) if isinstance(k, str) else k: plain(v, depth + 1, count) for k, v in value.items()}
    raise ValueError(f"a {type(value).__name__}")


def replace_text(file: Path, text: str) -> None:
    """Write a file in one step: a full disk leaves the one before. Raises OSError."""
    partial = file.with_name(file.name + ".tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        size = _regular(file)
        if size > LIMITS[file.name]:
            raise Unreadable(f"{file.name} has {size / MB:,.0f} MB; no run writes more than {LIMITS[file.name] // MB}")
        content = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(file, error) from None
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise Unreadable(f"{file.name}: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(content, dict):
        raise Unreadable(f"{file.name} is half-written")
    return content


def _regular(file: Path) -> int:
    """The size in bytes. A pipe or device is refused before it is opened, since reading it may never end."""
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable(f"{file.name} is no regular file")
    return found.st_size


def _unreadable(file: Path, error: OSError) -> Unreadable:
    return Unreadable(f"{file.name}{' is missing' if isinstance(error, FileNotFoundError) else f': {error.strerror}'}")


# Ten times as fast where libyaml is installed.
class _Yaml(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # pyrefly: ignore[invalid-inheritance]
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merging (<<) copies mappings, and a few aliases of aliases would fill the memory. Runs do not write it."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "<< is not allowed", key.start_mark)


def _config(text: str) -> dict[str, Any]:
    """Runs of one group have equal configs except for the seed, so each is parsed once."""
    parts = re.split(r"^seed: (\d+)\n", text, flags=re.MULTILINE)
    if len(parts) != 3:
        return plain(yaml.load(text, _Yaml))
    return {**_parsed(parts[0] + parts[2]), "seed": int(parts[1])}


@cache
def _parsed(text: str) -> dict[str, Any]:
    return plain(yaml.load(text, _Yaml))
