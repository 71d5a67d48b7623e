"""Several trackers at once: `logger=all` is W&B and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl.tracking import RunInfo, Tracker


class Together(Tracker):
    """Every tracker gets every row. What stops one of them does not stop the other."""

    def __init__(self, wandb: Tracker, tensorboard: Tracker):
        self.trackers = {"wandb": wandb, "tensorboard": tensorboard}

    @property
    def repeats(self) -> bool:
        """Whether one of them wants a finished run once more; then all get it."""
        return any(tracker.repeats for tracker in self.trackers.values())

    def start(self, info: RunInfo) -> str:
        told = {name: tracker.start(info) for name, tracker in self.trackers.items()}
        return "; ".join(f"{name}: {line}" for name, line in told.items() if line)

    def log(self, row: Mapping[str, float]) -> None:
        for tracker in self.trackers.values():
            tracker.log(row)

    def finish(self, summary: Mapping[str, Any], ok: bool) -> None:
        for tracker in self.trackers.values():
            tracker.finish(summary, ok)
