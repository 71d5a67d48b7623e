"""TensorBoard event files in <run directory>/tensorboard: `tensorboard --logdir outputs` compares all runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.config.errors import SetupError
from mtl.tracking import RunInfo, Tracker


class TensorBoardTracker(Tracker):
    """One scalar curve per key, over epochs.

    Raises:
        mtl.config.errors.SetupError: the package tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SetupError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from error
        self._writer_class, self._writer = SummaryWriter, None

    def start(self, info: RunInfo) -> str:
        self._writer = self._writer_class(str(info.directory / "tensorboard"))
        return f"tensorboard --logdir {info.output_root}"

    def log(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, int(row["epoch"]))
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any], ok: bool) -> None:
        if self._writer is not None:
            self._writer.close()
