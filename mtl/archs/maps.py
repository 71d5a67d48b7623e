"""What the architectures for maps have in common."""

from __future__ import annotations

from torch import Tensor, nn

from mtl.tasks import Task


def labels_pixels(task: Task) -> bool:
    """Whether the task has a map of labels. Otherwise it has one label for the whole image, or boxes."""
    return task.moves.dense


def pooled(channels: int, outputs: int) -> nn.Sequential:
    """A decoder for a task with one label for the whole image: the mean over the map, then a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


def layer(inputs: int, outputs: int, kernel: int = 3, bias: bool = False) -> nn.Sequential:
    """Convolution of the same size, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def check_size(images: Tensor, multiple: int, name: str) -> None:
    """Raises:
    ValueError: height or width of the images (N, C, H, W) is no multiple of `multiple`.
    """
    height, width = images.shape[2:]
    if height % multiple or width % multiple:
        needed = f"images whose height and width are multiples of {multiple}"
        raise ValueError(f"{name} needs {needed}, not {height}x{width}")


def check_least(images: Tensor, least: int, name: str) -> None:
    """Raises:
    ValueError: height or width of the images (N, C, H, W) is less than `least`, too small for the poolings.
    """
    height, width = images.shape[2:]
    if min(height, width) < least:
        raise ValueError(f"{name} needs images of at least {least}x{least}, not {height}x{width}")
