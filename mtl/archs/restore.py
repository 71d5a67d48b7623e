"""Run a network on trial, and restore it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mtl.random import kept


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """After this block, the model's modes, parameters, buffers and all global generators are as they were before it.

    One exception: a lazy module keeps the parameters and buffers that its first forward pass has created.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    tensors = [*model.parameters(), *(b for _, named in buffers for b in named.values() if b is not None)]
    # A lazy parameter has no values yet, so there is nothing to copy.
    values = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]
    try:
        with kept():
            yield
    finally:
        for module, training in modes:
            module.training = training
        # A forward pass may replace a buffer by a new tensor, so the old tensors are put back, and then their values.
        for module, named in buffers:
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
