"""TensorBoard event files in <run directory>/tensorboard: `tensorboard --logdir outputs` compares all runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mtl.errors import SetupError, one_line
from mtl.tracking import RunInfo, Tracker, pictures

log = logging.getLogger("mtl")


class TensorBoardTracker(Tracker):
    """One curve over epochs for each key.

    Raises:
        mtl.errors.SetupError: the package tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SetupError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from error
        self._writer_class, self._writer = SummaryWriter, None

    def start(self, info: RunInfo) -> str:
        # A kill may have kept the last rows out of an earlier file. So all rows are written again, and `purge_step`
        # makes readers drop the earlier ones.
        folder = info.directory / "tensorboard"
        self._info = info
        with self._harmless():
            self._writer = self._writer_class(str(folder), purge_step=1 if folder.exists() else None)
            text = "\n".join(f"    {key}: {value}" for key, value in info.config.items())  # indented: as it stands
            self._writer.add_text("config", text)
            for row in info.rows:
                self._add(row)
        if self._writer is None:
            return "not available; training goes on without it"
        return f"tensorboard --logdir {info.output_root}"

    def log(self, row: Mapping[str, float]) -> None:
        if self._writer is not None:
            with self._harmless():
                self._add(row)
                self._writer.flush()

    def finish(self, summary: Mapping[str, Any], ok: bool) -> None:
        if self._writer is not None:
            with self._harmless():
                self._compare(summary)
                self._writer.close()
            self._writer = None

    def _compare(self, summary: Mapping[str, Any]) -> None:
        """A row in the tab HPARAMS: the config, the number of trained epochs, the best and last test metrics."""
        from torch.utils.tensorboard.summary import hparams

        info = self._info
        config = {**info.config, "data": info.identity.data, "arch": info.identity.arch, "loss": info.identity.loss}
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.items()}
        found = {k.removesuffix(".value").replace(".", "/"): v for k, v in summary.items()
                 if k == "epochs" or k.startswith("last.") or re.fullmatch(r"best\..*\.value", k)}  # fmt: skip
        # `add_hparams` would write to a folder of its own, which counts as another run.
        for part in hparams(plain, found):
            self._writer.file_writer.add_summary(part)
        for key, value in found.items():
            self._writer.add_scalar(key, value)

    def _add(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, int(row["epoch"]))
        if sheet := pictures.of(self._info.directory, int(row["epoch"])):
            self._writer.add_image("pictures", sheet.page, int(row["epoch"]), dataformats="HWC")

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, a folder that is gone: metrics.jsonl holds everything anyway
            log.warning(f"TensorBoard stopped ({type(error).__name__}: {one_line(error)}); training goes on without it")
            self._writer = None
