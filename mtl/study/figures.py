"""Figures of a study, readable in print."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # files only: a figure must not need a screen
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from mtl.study.grid import Cell


def learning_curves(cells: Sequence[Cell], file: Path) -> None:
    """Every test metric over epochs: each group's mean over seeds, in a band from its lowest to its highest."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.run["group"], []).append(cell)
    keys = list(dict.fromkeys(k for c in cells for k in c.summary["last"]))
    varying = [k for k in ("data", "arch", "loss") if k == "loss" or len({c.run[k] for c in cells}) > 1]
    figure, axes = plt.subplots(1, len(keys), figsize=(4.2 * len(keys), 3.4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], keys, strict=True):
        for members in groups.values():
            curves = [[row[key] for row in c.rows] for c in members if key in c.summary["last"]]
            if not curves:
                continue
            epochs = range(1, min(map(len, curves)) + 1)
            points = list(zip(*curves, strict=False))
            label = "/".join(members[0].run[k] for k in varying)
            (line,) = axis.plot(epochs, [statistics.fmean(p) for p in points], label=label, linewidth=1.5)
            if len(curves) > 1:
                low, high = [min(p) for p in points], [max(p) for p in points]
                axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="epoch", title=key.removeprefix("test/").replace("_", " ") + " (test)")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
