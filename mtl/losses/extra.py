"""The part of a strategy's `state_dict` that is neither parameter nor buffer, such as the epoch, packed into a tensor.

Why a tensor: many loops compute with every entry of a `state_dict`. They convert it to fp16, or average it over copies
of a model. The packed tensor survives both.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor

SIZE = 8192  # length of the tensor; the same for all states, so that two of them can be averaged


def pack(content: dict[str, Any]) -> Tensor:
    """(k · 8192,) float32: the bytes of `content` as numbers from 0 to 255, which every float dtype holds exactly."""
    packed = zlib.compress(json.dumps(content).encode())
    values = torch.zeros(-(-len(packed) // SIZE) * SIZE)
    values[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    return values


def unpack(values: Tensor) -> dict[str, Any]:
    """The inverse of `pack`, also after a change of dtype.

    Raises:
        ValueError: the values were changed after packing.
    """
    # States of older versions are plain text in uint8; it begins with "{".
    try:
        data = _whole(values) if values.is_floating_point() else bytes(values.tolist())
        return json.loads(data if data[:1] == b"{" else zlib.decompressobj().decompress(data))
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(
            "state_dict: the entry _extra_state was changed; copy it from the newest state_dict instead of averaging it"
        ) from error


def _whole(values: Tensor) -> bytes:
    """Round to bytes. After averaging equal states, values are off by a rounding error.

    Raises:
        ValueError: a value is not close to an integer from 0 to 255.
    """
    values = values.detach().to("cpu", torch.float64)
    near = (values - values.round()).abs() < 0.01  # False for NaN
    return bytes(torch.where(near, values.round(), -1).to(torch.int64).tolist())
