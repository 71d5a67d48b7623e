"""A point in the plane instead of a network, for the toy problem (data=toy)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl.tasks import Task


class Point(nn.Module):
    """Two trainable coordinates. They are the features (N, 2) of every image of a batch, whatever the image shows.

    Args:
        in_channels: ignored; every backbone is given it.
        start: initial coordinates.
    """

    out_features = 2

    def __init__(self, in_channels: int, start: tuple[float, float] = (9.0, 9.0)):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float32))

    def decoder(self, task: Task) -> nn.Module:
        """The point itself is the prediction of every task."""
        return nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, 1, 1) to features (N, 2).

        Raises:
            ValueError: the images have more than one pixel, so this is not the toy problem.
        """
        if images.shape[-2:] != (1, 1):
            raise ValueError("Point sees nothing of an image; it is for data=toy")
        return self.x.repeat(len(images), 1)  # the rows' gradients add up to the gradient at the point
