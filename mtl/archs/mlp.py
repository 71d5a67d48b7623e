"""A multi-layer perceptron, for tables and other columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU on all inputs of the data, flattened and put side by side: (N, …), … to (N, width).

    Args:
        in_shapes: the shape of a sample of each input.
        width: of all layers.
        depth: number of layers; 0 gives the inputs to the decoders, so that the model is linear.
        dropout: probability, after each layer.
    """

    def __init__(
        self,
        in_shapes: Mapping[str, Sequence[int]],
        width: Annotated[int, Ge(1)] = 256,
        depth: Annotated[int, Ge(0)] = 2,
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ):
        super().__init__()
        self.inputs = tuple(in_shapes)
        size = sum(math.prod(shape) for shape in in_shapes.values())
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(width if i else size, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        self.body = nn.Sequential(*layers)
        self.out_features = width if depth else size

    def forward(self, *columns: Tensor) -> Tensor:
        return self.body(torch.cat([column.flatten(1) for column in columns], dim=1))
