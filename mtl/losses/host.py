"""Small problems are solved on the CPU, also if the gradients are on a GPU: `on_host`.

Example: the weights of UPGrad for 40 tasks take a hundred operations on (40, 40) numbers, and a search that stops at
convergence. A GPU needs several µs for each operation, however small, and cannot stop the search by itself. So it is
faster to wait for the device once, and to solve the problem here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run `function` on the CPU, wherever its tensors are. All of them are copied there at once.

    Args:
        function: takes tensors of T or T×T numbers or flags, all on one device, and other arguments. It returns a
            tensor or a tuple of tensors. They go to the device of the arguments, and there the host does not wait.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if all(tensor.is_cpu for tensor in given):
            return function(*args, **kwargs)
        here = dict(zip(map(id, given), fetched(given), strict=True))
        args = tuple(here.get(id(value), value) for value in args)
        found = function(*args, **{name: here.get(id(value), value) for name, value in kwargs.items()})
        device = given[0].device
        return tuple(_sent(one, device) for one in found) if isinstance(found, tuple) else _sent(found, device)

    return wrapper


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors` on the CPU. The host waits for the device once."""
    # `cat` converts all to the widest dtype among them, which changes no value.
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, tensors, strict=True)]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "mps" and tensor.dtype == torch.float64:  # which that device does not have
        tensor = tensor.float()
    return tensor.to(device, non_blocking=True)
