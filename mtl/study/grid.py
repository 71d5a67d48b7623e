"""The closing table and figure of a grid: strategy x test metric, mean ± standard deviation over seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtl.config.errors import remove_empty
from mtl.tracking.console import duration, table


@dataclass(frozen=True)
class Cell:
    """One finished run of a grid: run.json, summary.json and the rows of metrics.jsonl."""

    run: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, float]]


def progress(folder: Path) -> str:
    """One line on a grid that is under way: done, running, failed, and about how much longer.

    Args:
        folder: of the grid, with grid.json and a cell-*.json for each run that has begun.
    """
    # Without the single-task baselines that precede a cell: how many of those there will be is not known before.
    grid, cells = json.loads((folder / "grid.json").read_text()), _outcomes(folder, "cell-?????.json")
    counts = Counter("failed" if c["code"] else c["status"] for c in cells)
    done = len(cells) - counts["running"]
    said = ", ".join(f"{counts[s]} {s}" for s in ("finished", "failed", "running") if counts[s])
    # What was there before took no time and says nothing of what is to come.
    took = [c["seconds"] for c in cells if c.get("seconds", 0) > 1]
    elapsed = time.time() - grid["started"]
    left = ""
    if grid["cells"] and took and done < grid["cells"]:
        at_once = max(1.0, sum(took) / elapsed)
        left = f", about {duration(statistics.fmean(took) * (grid['cells'] - done) / at_once)} left"
    return f"grid      {done} of {grid['cells'] or 'an open number of'} runs done ({said}){left}"


def summarise(folder: Path) -> int:
    """Print the table of a grid, draw its learning curves, say what to do next.

    Args:
        folder: of the grid.

    Returns:
        0 when every cell finished, else the largest exit code of a cell.
    """
    outcomes = _outcomes(folder)
    if plans := [o["plan"] for o in outcomes if o["plan"]]:
        from mtl.study.plan import plan_table  # late: it can train, and so needs torch

        print(f"\n{plan_table(plans)}")
        shutil.rmtree(folder)  # a plan leaves nothing behind
        remove_empty(folder.parents)
        return max(o["code"] for o in outcomes)
    finished = [_read(Path(o["directory"])) for o in outcomes if o["status"] == "finished"]
    if finished:
        print()
        print(results_table(finished))
        figure = folder / "curves.png"
        from mtl.study.figures import learning_curves  # late: matplotlib takes a second to import

        learning_curves(finished, figure)
        print(f"\nfigure: {figure}")
    if (search := folder / "optimization_results.yaml").exists():  # of Hydra's Optuna sweeper
        best = yaml.safe_load(search.read_text())
        found = " ".join(f"{key}={value}" for key, value in best["best_params"].items())
        print(f"best validation figure: {best['best_value']:.4g}, by {found}")
    failed = [o for o in outcomes if o["status"] != "finished"]
    for o in failed:
        status = "interrupted" if o["status"] == "running" else o["status"]
        print(f"{status}: {o['command']}{': ' if o['message'] else ''}{o['message']}")
    print(f"{len(finished)} of {len(outcomes)} runs finished; the same command again skips them and runs the others")
    if finished and finished[0].run["data"] == "digits":
        print("next: python train.py trainer.epochs=10 data.limit_train=10000   (CIFAR-100, downloaded once)")
    return max((o["code"] for o in outcomes), default=0)


def _outcomes(folder: Path, pattern: str = "cell-*.json") -> list[dict[str, Any]]:
    """What is noted of every run of a grid, each run once: several cells may share a single-task baseline."""
    cells = [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]
    return list({c["directory"] or c["command"]: c for c in cells}.values())


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
