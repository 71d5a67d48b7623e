"""What a strategy's `state_dict` holds besides parameters and buffers, as a tensor that survives usual treatment."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor

SIZE = 8192  # entries, so that two states can be added whatever they hold; a random stream takes about 3700


def pack(content: dict[str, Any]) -> Tensor:
    """(k · 8192,) float32, the bytes of `content` as whole numbers from 0 to 255, which any floating dtype can hold."""
    packed = zlib.compress(json.dumps(content).encode())
    values = torch.zeros(-(-len(packed) // SIZE) * SIZE)
    values[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    return values


def unpack(values: Tensor) -> dict[str, Any]:
    """The content of `pack`'s tensor, also after a change of its dtype; also of older states, plain text in uint8.

    Raises:
        ValueError: the values are no longer those that were packed.
    """
    try:
        data = _whole(values) if values.is_floating_point() else bytes(values.tolist())
        return json.loads(data if data[:1] == b"{" else zlib.decompressobj().decompress(data))
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(
            "state_dict: the entry _extra_state was changed; copy it from the newest state_dict instead of averaging it"
        ) from error


def _whole(values: Tensor) -> bytes:
    """The nearest bytes: an average of equal states is off by a rounding error.

    Raises:
        ValueError: one of the values is far from any.
    """
    values = values.detach().to("cpu", torch.float64)
    near = (values - values.round()).abs() < 0.01  # False for NaN
    return bytes(torch.where(near, values.round(), -1).to(torch.int64).tolist())
