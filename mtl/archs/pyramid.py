"""From a classification network's maps of several sizes to one map, for tasks with labels of pixels.

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, after Lin et al., "Feature Pyramid Networks for Object
Detection", CVPR 2017: each map gets the same number of channels, and is added to the next larger one. Different from
the paper: the sum passes one convolution at a quarter of the images' size. All of this is shared by the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mtl.archs.maps import check_size, labels_pixels, layer, pooled
from mtl.tasks import Task

WIDTH = 128  # channels, as in the paper
STRIDE = 4  # image pixels along each axis for each pixel of the result


def dense(tasks: Sequence[Task]) -> bool:
    """Whether a task labels pixels, so that the backbone must return a map."""
    return any(labels_pixels(task) for task in tasks)


class Pyramid(nn.Module):
    """Maps of several sizes to one map (N, 128, H/4, W/4).

    Args:
        channels: of the maps, from the largest map to the smallest.
    """

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in channels)
        self.smooth = layer(WIDTH, WIDTH)

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        """
        Args:
            maps: from the largest to the smallest.
            images: (N, C, H, W), for the size.

        Raises:
            ValueError: height or width of the images is no multiple of 4.
        """
        check_size(images, STRIDE, "a network with dense tasks")
        total = self.lateral[-1](maps[-1])
        for lateral, map_ in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            total = lateral(map_) + _resized(total, map_.shape[2:])
        return self.smooth(_resized(total, [n // STRIDE for n in images.shape[2:]]))


def decoder(task: Task) -> nn.Module:
    """For a task with labels of pixels two convolutions, and bilinear enlargement; else a mean and a linear layer."""
    if not labels_pixels(task):
        return pooled(WIDTH, task.outputs)
    enlarge = nn.Upsample(scale_factor=STRIDE, mode="bilinear", align_corners=False)
    return nn.Sequential(*layer(WIDTH, WIDTH), nn.Conv2d(WIDTH, task.outputs, 1), enlarge)


def _resized(map_: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(map_.shape[2:]) == tuple(size):
        return map_
    return F.interpolate(map_, tuple(size), mode="bilinear", align_corners=False)
