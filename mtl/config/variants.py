"""What a run changes in the options that it has chosen, in words for people: loss=cagrad loss.c=0.2 is c0.2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

# The nodes that a grid compares. Data and epochs are the same for all of its runs.
NODES = ("arch", "loss", "optimizer", "schedule", "step")
NAMED = ("optimizer", "schedule")  # their options are not in a run's name otherwise
SILENT = ("_target_", "file")  # the class and a loss's file are in the name already
LONGEST = 60  # characters


def variant(config: Mapping[str, Any], choices: Mapping[str, str], conf: Path) -> str:
    """The values that differ from the files of the chosen options, such as "ink" or "c0.2-lr0.05"; empty if none does.

    Args:
        config: resolved, as plain Python objects.
        choices: the option chosen in each config group.
        conf: the folder of our options. A user's own option has no file there, so nothing is said about its values.
    """
    usual, words = _defaults(conf), []
    for group in NODES:
        option, node = choices.get(group), config.get(group)
        if not option or not isinstance(node, Mapping):
            continue
        if group in NAMED and option != usual.get(group):
            words.append(option)
        if listed := _node(conf / group / f"{option}.yaml"):
            words += _words({k: v for k, v in node.items() if k not in SILENT and v != listed.get(k)})
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
def _defaults(conf: Path) -> dict[str, str]:
    listed = yaml.safe_load((conf / "config.yaml").read_text())["defaults"]
    return {key: option for entry in listed if isinstance(entry, dict) for key, option in entry.items()}


@cache
def _node(file: Path) -> dict[str, Any]:
    """The content of an option's file, with the files of its group that it builds on; empty if there is none."""
    if not file.is_file():
        return {}
    content = yaml.safe_load(file.read_text())
    bases = [base for base in content.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    return {k: v for part in (*(_node(file.with_name(f"{base}.yaml")) for base in bases), content)
            for k, v in part.items()}  # fmt: skip
