"""Tasks: each has labels, a loss and metrics."""

from mtl.tasks.base import Task
from mtl.tasks.dense import Depth, Disparity, Normals, Segmentation
from mtl.tasks.detection import Detection
from mtl.tasks.groups import alike
from mtl.tasks.labels import Classification, Regression

__all__ = [
    "Classification", "Depth", "Detection", "Disparity", "Normals", "Regression", "Segmentation", "Task", "alike",
]  # fmt: skip
