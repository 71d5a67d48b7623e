"""JSON files that a process replaces while it works, and that others can read even after it was killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write(file: Path, content: Any) -> None:
    """Replace a JSON file in one step: a reader sees the old or the new content, never a part."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace a text file in one step."""
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, file)


def read(file: Path) -> Any:
    """The value of a .json file; None if it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def read_lines(file: Path) -> list[Any]:
    """The values of a file with one JSON value per line, up to a line that a killed process left half-written."""
    result = []
    try:
        for line in file.read_text().splitlines():
            result.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return result
