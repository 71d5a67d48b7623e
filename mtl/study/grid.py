"""The closing table and figure of a grid: strategy x test metric, mean ± standard deviation over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtl.tracking.console import table


@dataclass(frozen=True)
class Cell:
    """One finished run of a grid: run.json, summary.json and the rows of metrics.jsonl."""

    run: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, float]]


def summarise(files: Sequence[Path]) -> int:
    """Print the table of a grid, draw its learning curves, say what to do next.

    Args:
        files: cell-*.json of the grid.

    Returns:
        0 when every cell finished, else the largest exit code of a cell.
    """
    outcomes = [json.loads(f.read_text()) for f in files]
    finished = [_read(Path(o["directory"])) for o in outcomes if o["status"] == "finished"]
    if finished:
        print()
        print(results_table(finished))
        figure = files[0].parent / "curves.png"
        from mtl.study.figures import learning_curves  # late: matplotlib takes a second to import

        learning_curves(finished, figure)
        print(f"\nfigure: {figure}")
    if (search := files[0].parent / "optimization_results.yaml").exists():  # of Hydra's Optuna sweeper
        best = yaml.safe_load(search.read_text())
        found = " ".join(f"{key}={value}" for key, value in best["best_params"].items())
        print(f"best validation figure: {best['best_value']:.4g}, by {found}")
    failed = [o for o in outcomes if o["status"] != "finished"]
    for o in failed:
        print(f"{o['status']}: {o['command']}: {o['message']}")
    print(f"{len(finished)} of {len(outcomes)} runs finished; the same command again skips them and runs the others")
    if finished and finished[0].run["data"] == "digits":
        print("next: python train.py trainer.epochs=10 data.limit_train=10000   (CIFAR-100, downloaded once)")
    return max((o["code"] for o in outcomes), default=0)


def results_table(cells: Sequence[Cell]) -> str:
    """One row per group of runs that differ only in the seed; last epoch and best epoch of every test metric."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.run["group"], []).append(cell)
    varying = [k for k in ("data", "arch") if len({c.run[k] for c in cells}) > 1]
    several = len({(c.run["data"], c.run["arch"], c.run["loss"]) for c in cells}) < len(groups)
    keys = list(dict.fromkeys(k for c in cells for k in c.summary["last"]))
    header = ["strategy", *varying, *(["config"] if several else []), "seeds"]
    for key in keys:
        header += [f"{key.removeprefix('test/')}", "(best)"]
    body = []
    for members in groups.values():
        run = members[0].run
        row = [run["loss"], *(run[k] for k in varying), *([run["digest"]] if several else []), str(len(members))]
        for key in keys:
            row.append(_spread([c.summary["last"][key] for c in members if key in c.summary["last"]]))
            row.append(_spread([c.summary["best"][key]["value"] for c in members if key in c.summary["best"]]))
        body.append(row)
    return "test set, last epoch and best over epochs, mean ± std over seeds\n" + table(header, body)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) >= 10 else 4
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _read(directory: Path) -> Cell:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    run, summary = (json.loads((directory / name).read_text()) for name in ("run.json", "summary.json"))
    return Cell(run, summary, rows)
