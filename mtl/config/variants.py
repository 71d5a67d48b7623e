"""What a run changes in its loss's option, in words for people: loss=cagrad loss.c=0.2 is c0.2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

SILENT = ("_target_", "file")  # the class and a loss's file are in the run's name already
LONGEST = 40  # characters


def variant(node: Mapping[str, Any], option: str | None, folder: Path) -> str:
    """The values that differ from the file of the chosen option, such as "ink" or "c0.2"; empty if none does.

    Args:
        node: of the config, as plain Python objects.
        option: that was chosen, if any.
        folder: of our options. A user's own option has no file there, so nothing is said about its values.
    """
    usual = _content(folder / f"{option}.yaml")
    if not usual:
        return ""
    words = _words({k: v for k, v in node.items() if k not in SILENT and v != usual.get(k)})
    text = re.sub(r"[^\w.+-]+", "_", "-".join(words))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _words(value)
        elif isinstance(value, bool):
            yield key if value else f"no_{key}"
        elif isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield key + "_".join(map(str, value))
        else:
            yield f"{key}{value}"


@cache
def _content(file: Path) -> dict[str, Any]:
    """The content of an option's file; empty if there is none."""
    return yaml.safe_load(file.read_text()) if file.is_file() else {}
