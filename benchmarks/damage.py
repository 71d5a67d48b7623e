"""Kinds of damage to a file, for benchmarks/faults.py."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

FILES = ("last.pt", "best.pt", "metrics.jsonl", "run.json", "summary.json", "config.yaml", "train.log")


def alone(path: Path) -> bytes:
    """The bytes of a file, after separating it from its hard links. The damage then hits this name only."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return data


def flip(path: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(alone(path))
    at = rng.randrange(len(data) // 10, len(data) * 9 // 10)
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zeros(path: Path, other: Path, rng: random.Random) -> None:
    data = alone(path)
    at = rng.randrange(len(data) // 2)
    path.write_bytes(data[:at] + bytes(min(4096, len(data) - at)) + data[at + 4096 :])


def instead(make: Callable[[Path, Path], Any]) -> Callable[[Path, Path, random.Random], None]:
    """A damage that replaces a file by something else."""

    def damage(path: Path, other: Path, rng: random.Random) -> None:
        path.rename(path.with_name("old"))
        make(path, other if other != path else path.with_name("old"))
        path.with_name("old").unlink()

    return damage


def written(content: bytes) -> Callable[[Path, Path, random.Random], None]:
    return instead(lambda path, other: path.write_bytes(content))


def cut(path: Path, other: Path, rng: random.Random) -> None:
    data = alone(path)
    path.write_bytes(data[: rng.randrange(1, len(data))])


def change_field(path: Path, other: Path, rng: random.Random) -> str:
    """Give one field of a YAML or JSON file an odd value."""
    if path.suffix not in (".json", ".yaml"):
        return flip(path, other, rng) or "bit"
    tree = yaml.safe_load(path.read_text())
    node, keys = tree, []
    while isinstance(node, dict) and node and (not keys or rng.random() < 0.6):
        parent, key = node, rng.choice(sorted(node))
        node = node[key]
        keys.append(key)
    odd = rng.choice([None, 0, -1, 1e308, float("nan"), "", "x", 'a "b', [], [1], {}, {"a": []}, True, "x" * 9999])
    parent[key] = odd
    path.write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree, sort_keys=False))
    return f"{'.'.join(keys)}={str(odd)[:20]!r}"


DAMAGE: dict[str, Callable[[Path, Path, random.Random], Any]] = {
    "missing": lambda path, other, rng: path.unlink(),
    "empty": written(b""),
    "text": written(b"hello\n"),
    "null": written(b"null\n"),
    "a list": written(b"[1, 2]\n"),
    "a word": written(b'"x"\n'),
    "not UTF-8": written(b"\xff\xfe\x00\n"),
    "deep": written(b"[" * 50_000 + b"]" * 50_000 + b"\n"),
    "cut": cut,
    "a bit": flip,
    "zeros": zeros,
    "of another run": instead(lambda path, other: shutil.copy(other, path)),
    "a folder": instead(lambda path, other: path.mkdir()),
    "a FIFO": instead(lambda path, other: os.mkfifo(path)),
}
