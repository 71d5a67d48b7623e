"""Where a run's figures go besides its own directory: nowhere (`Tracker`), W&B, or TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.config.identity import Identity


@dataclass(frozen=True)
class RunInfo:
    """What a tracker needs to know of a run.

    Attributes:
        identity: names, group and seed.
        directory: of this run.
        output_root: of all runs.
        config: the resolved config, flattened: {"loss.temperature": 2.0, …}.
        best: for each metric key whether higher is better.
        rows: of metrics.jsonl, of the epochs before a resumed run goes on.
    """

    identity: Identity
    directory: Path
    output_root: Path
    config: Mapping[str, Any]
    best: Mapping[str, bool]
    rows: Sequence[Mapping[str, float]] = ()


class Tracker:
    """Base and no-op. A tracker mirrors what metrics.jsonl holds; training never depends on it.

    Attributes:
        repeats: whether a run that is already finished is to be told once more.
    """

    repeats = False

    def start(self, info: RunInfo) -> str:
        """Open the run; return one line for the console's header, or an empty string."""
        return ""

    def log(self, row: Mapping[str, float]) -> None:
        """One row per epoch, with the key "epoch"."""

    def finish(self, summary: Mapping[str, Any], ok: bool) -> None:
        """Close the run, marked as failed unless `ok`."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: sweep and single runs stay comparable in a dashboard's table."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
