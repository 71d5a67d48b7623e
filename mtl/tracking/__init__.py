"""Trackers: they send a run's metrics to W&B or TensorBoard. The base class `Tracker` sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.config.identity import Identity


@dataclass(frozen=True)
class RunInfo:
    """A run as a tracker needs to know it.

    Attributes:
        identity: names, group and seed.
        directory: of this run.
        output_root: of all runs.
        config: the resolved config, flattened: {"loss.temperature": 2.0, …}.
        best: whether higher is better, for each metric's key.
        rows: of metrics.jsonl: the epochs that a resumed run has behind it.
    """

    identity: Identity
    directory: Path
    output_root: Path
    config: Mapping[str, Any]
    best: Mapping[str, bool]
    rows: Sequence[Mapping[str, float]] = ()


class Tracker:
    """Base class; does nothing. A tracker mirrors metrics.jsonl; training never depends on it.

    Attributes:
        repeats: whether a run that is already finished is reported once more.
    """

    repeats = False

    def start(self, info: RunInfo) -> str:
        """Open the run; return one line for the console's header, or an empty string."""
        return ""

    def log(self, row: Mapping[str, float]) -> None:
        """One row per epoch, with the key "epoch". The epoch's pictures, if any, are in the run's folder by then."""

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
