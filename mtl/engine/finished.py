"""What the files of a finished run say: its objective for a search, and its story for a dashboard that missed it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl.config.identity import Identity
from mtl.engine.directory import RunDirectory
from mtl.tracking import RunInfo, Tracker, flatten


def objective(directory: str | Path) -> float | None:
    """The best validation figure of a finished run: of its first task's main metric, over epochs.

    Returns:
        None without validation data (`data.val_fraction=0`): a search that looked at test data would be dishonest.
    """
    chosen = json.loads(Path(directory, "summary.json").read_text()).get("selected")
    if not chosen:
        return None
    return next(row[chosen["by"]] for row in RunDirectory(Path(directory)).rows() if row["epoch"] == chosen["epoch"])


def repeat(tracker: Tracker, config: Mapping[str, Any], identity: Identity, directory: Path) -> None:
    """Tell `tracker` a finished run from its first epoch to its last."""
    summary, rows = json.loads((directory / "summary.json").read_text()), RunDirectory(directory).rows()
    best = dict(summary["higher_is_better"])
    if summary["selected"]:
        best |= {key.replace("test/", "val/", 1): higher for key, higher in best.items()}
    tracker.start(RunInfo(identity, directory, Path(config["output_root"]), flatten(config), best, rows))
    tracker.finish(flatten(summary), ok=True)
