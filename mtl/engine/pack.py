"""Packs nested lists and dicts into one text and a list of tensors. A list may occur twice, or contain itself.

A pickle would do this as well, but its bytes depend on which equal strings and numbers are the same object. Here, two
checkpoints of the same state have the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

Packed = dict[str, Any]  # {"text": (N,) uint8, "tensors": [Tensor, …]}


def pack(tree: Any) -> Packed:
    """Pack a tree of lists, dicts with text keys, numbers, texts, None, bytes and tensors."""
    tensors: list[Tensor] = []
    lists: list[list] = []
    numbers: dict[int, int] = {}  # number of each list in `lists`, by its id

    def cell(value: Any) -> Any:
        if isinstance(value, bytes):
            tensors.append(_of_bytes(value))
            return {"bytes": len(tensors) - 1}
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, list):
            if id(value) not in numbers:
                numbers[id(value)] = len(lists)
                lists.append(value)
            return {"list": numbers[id(value)]}
        return {"dict": {k: cell(v) for k, v in value.items()}} if isinstance(value, dict) else value

    top, rows = cell(tree), []
    for row in lists:  # the list grows in this loop: `cell` appends the lists that it finds
        rows.append([cell(value) for value in row])
    return {"text": _of_bytes(json.dumps([top, rows]).encode()), "tensors": tensors}


def unpack(packed: Packed) -> Any:
    """The inverse of `pack`."""
    top, rows = json.loads(_to_bytes(packed["text"]))
    lists: list[list] = [[] for _ in rows]

    def value(cell: Any) -> Any:
        if not isinstance(cell, dict):
            return cell
        ((kind, content),) = cell.items()
        if kind == "dict":
            return {k: value(v) for k, v in content.items()}
        if kind == "list":
            return lists[content]
        tensor = packed["tensors"][content]
        return tensor if kind == "tensor" else _to_bytes(tensor)

    # All lists exist, empty, before they are filled: so a list can contain itself.
    for result, row in zip(lists, rows, strict=True):
        result.extend(map(value, row))
    return value(top)


def _of_bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.array(bytearray(content), dtype=np.uint8))


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
