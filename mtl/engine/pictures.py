"""Pictures of a few fixed test samples over the epochs: image, truth and prediction of each task that can be drawn.

They are drawn after the epochs 1, 2, 4, 8, … and after the last one, between two epochs. They only look: weights,
generators and metrics stay as they are. What they look like is up to `Task.draw` and `Input.draw`.
"""

from __future__ import annotations

import copy
import logging
import os
import traceback
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.archs.restore import as_before
from mtl.config.source import place
from mtl.data.batches import EvaluationBatches, ready
from mtl.engine.learner import Learner
from mtl.errors import one_line
from mtl.random import seeded
from mtl.tasks import Task
from mtl.tracking.pictures import PictureGrid, encode, epochs, path_of

log = logging.getLogger("mtl")

LONGEST = 256  # of a picture's longer side; of larger ones every second, third, … row and column is shown


class Pictures:
    """Draws a run's pictures into its folder.

    Args:
        learner: `trainer.pictures` is the number of samples.
        test: the test data. The samples are spread evenly over it, so all runs on the same data show the same ones.
        directory: of the run.
    """

    def __init__(self, learner: Learner, test: EvaluationBatches, directory: Path):
        # Only this process draws, so it computes the whole backbone itself.
        self.learner = copy.copy(learner)
        self.learner.processes = None
        self.benchmark, self.directory = test.benchmark, directory
        drawn = any(type(task).draw is not Task.draw for task in learner.tasks)
        self.number = min(learner.trainer.pictures, test.size) if drawn else 0
        if self.number:
            index = torch.linspace(0, test.size - 1, self.number).round().long()
            rows = test.split.batch(index.to(next(iter(test.split.columns.values())).device))
            self.rows = {name: column.to(learner.device) for name, column in rows.items()}

    def forget(self, epoch: int) -> None:
        """Remove the pictures of epochs after `epoch`, which an earlier attempt of the run has left."""
        for later in epochs(self.directory):
            if later > epoch:
                with suppress(OSError):
                    path_of(self.directory, later).unlink()

    def draw(self, epoch: int, last: bool = False) -> None:
        """Write the pictures of an epoch, if they are due and not there yet.

        `last` says whether the run stops early after it, so that they are due.

        A failure costs the run its pictures and nothing else: one line says so. An example is an error in a user's
        own `draw`.
        """
        due = epoch > 0 and (epoch & (epoch - 1) == 0 or last or epoch == self.learner.trainer.epochs)
        file = path_of(self.directory, epoch)
        if not self.number or not due or os.path.lexists(file):
            return
        try:
            if sheet := self._sheet():
                _write(file, encode(sheet))
        except Exception as error:
            self.number = 0
            log.debug(traceback.format_exc())
            where = f" ({place(error)})" if place(error) else ""
            log.info(f"WARNING   no pictures: {type(error).__name__}: {one_line(error)}{where}; training goes on")

    def _sheet(self) -> PictureGrid | None:
        learner, images = self.learner, None
        for name, one in self.benchmark.inputs.items():
            images = one.draw(self.rows[name]) if images is None else images
        with as_before(learner.model), seeded(learner.seed, "pictures"), learner.trainer.flags(), torch.no_grad():
            learner.model.eval()
            batch = ready(self.benchmark, self.rows)
            predictions = learner.predict(batch).predictions
            found = [] if images is None else [("", "image", images)]
            for task, prediction in zip(learner.tasks, predictions, strict=True):
                if (drawn := task.draw(images, prediction, batch[task.column])) is not None:
                    kinds = zip(("truth", "prediction"), drawn, strict=True)
                    found += [(task.name, kind, _checked(task, colours)) for kind, colours in kinds]
        if all(kind == "image" for _, kind, _ in found):
            return None
        height, width = found[0][2].shape[1:3]
        step = -(-max(height, width) // LONGEST)
        tiles = [_resized(colours, -(-height // step), -(-width // step)) for _, _, colours in found]
        return PictureGrid(tuple((task, kind) for task, kind, _ in found), np.stack(tiles))


def _checked(task: Task, colours: Tensor) -> Tensor:
    if not isinstance(colours, Tensor) or colours.dtype != torch.uint8 or colours.ndim != 4 or colours.shape[3] != 3:
        shown = f"{tuple(colours.shape)} {colours.dtype}" if isinstance(colours, Tensor) else type(colours).__name__
        raise TypeError(f"{type(task).__name__}.draw gives {shown}; tensors (N, height, width, 3) uint8 are needed")
    return colours


def _resized(colours: Tensor, height: int, width: int) -> NDArray:
    """(N, height, width, 3) by the nearest point, since a mean of two classes' colours may be a third class's."""
    rows = torch.arange(height) * colours.shape[1] // height
    columns = torch.arange(width) * colours.shape[2] // width
    return colours.cpu()[:, rows][:, :, columns].numpy()


def _write(file: Path, content: bytes) -> None:
    """Write a file completely or not at all. Raises OSError."""
    partial = file.with_suffix(".tmp")
    file.parent.mkdir(exist_ok=True)
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
