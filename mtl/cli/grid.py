"""A grid's progress line, and its closing tables (strategy x test metric, mean ± std over seeds) and figure."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mtl.config import schema
from mtl.config.environment import activation
from mtl.config.program import program
from mtl.errors import UserError
from mtl.report import summaries
from mtl.report.names import visible
from mtl.report.protocols import benchmarks
from mtl.report.runs import Collection, load
from mtl.report.scores import Scores
from mtl.tracking.console import WIDE, columns, count, duration, fold

ELSEWHERE, POLL = "running elsewhere", 1.0  # a run's status; seconds between two looks at it


def progress(folder: Path) -> str:
    """One line on an unfinished grid: how many runs are done, running and failed, and about how much time is left.

    Args:
        folder: of the grid, with grid.json and a cell-*.json for each run that has begun.
    """
    grid, cells = json.loads((folder / "grid.json").read_text()), _outcomes(folder)
    total, begun = _total(folder, grid, len(cells)), cells
    if not grid.get("bases"):  # nobody knows how many single-task baselines there will be: they do not count
        total, begun = grid["cells"], _outcomes(folder, "cell-?????.json")
    counts = Counter(_kind(c) for c in begun)
    done = len(begun) - counts["running"]
    said = ", ".join(f"{counts[s]} {s}" for s in ("finished", "failed", "elsewhere", "running") if counts[s])
    # A run that was finished before took no time, so it does not help the estimate.
    took = [c["seconds"] for c in begun if c.get("seconds", 0) > 1]
    elapsed = time.time() - grid["started"]  # not positive where the clock was set back
    left = ""
    if total and took and done < total:
        at_once = max(1.0, sum(took) / elapsed) if elapsed > 0 else 1.0
        left = f", about {duration(statistics.fmean(took) * (total - done) / at_once)} left"
    return f"grid      {done} of {total or 'an open number of'} runs done ({said}){left}"


def _kind(outcome: dict[str, Any]) -> str:
    return "failed" if outcome["code"] else "elsewhere" if outcome["status"] == ELSEWHERE else outcome["status"]


def _total(folder: Path, grid: dict[str, Any], begun: int) -> int | None:
    """How many runs the grid has, its single-task baselines included; None if a sweeper decides that as it goes.

    Args:
        folder: of the grid.
        grid: the content of grid.json: the number of `cells`, and of `bases`: cells that differ beyond the method.
        begun: how many runs have begun. There cannot be less.
    """
    if not grid.get("cells"):
        return None
    # The notes of a cell's baselines are cell-00000-0.json, -1.json, …: one for each task.
    tasks = max((int(file.stem.rpartition("-")[2]) + 1 for file in folder.glob("cell-?????-*.json")), default=0)
    return max(begun, grid["cells"] + tasks * grid.get("bases", 0))


def summarise(folder: Path, kept: bool, interrupted: bool = False) -> tuple[int, bool]:
    """Print the table of a grid, draw its learning curves, suggest the next commands.

    Args:
        folder: of the grid.
        kept: whether the folder stays; a temporary one gets no figure.
        interrupted: by a signal, so that runs of other processes are not waited for.

    Returns:
        0 if every cell finished, else the largest exit code of a cell; and whether nobody needs the grid's record: it
        was a plan, or every cell was refused.
    """
    outcomes = _outcomes(folder)
    if plans := _told_apart([o for o in outcomes if o["plan"]]):
        from mtl.cli.plan import plan_table  # late: it can train, and so needs torch

        print(f"\n{fold(plan_table(plans), columns())}")
        return max(o["code"] for o in outcomes), True
    if not interrupted:
        _wait([Path(o["directory"]) for o in outcomes if o["status"] == ELSEWHERE])
    found = load([o["directory"] for o in outcomes if o["directory"] and Path(o["directory"]).is_dir()])
    outcomes = [_as_found(o, found) for o in outcomes]
    figures: list[Path] = []
    told: list[str] = []  # where W&B has the comparison
    beaten = False  # whether a strategy is better than single-task learning
    for benchmark in benchmarks(found.runs, found.stopped):
        for arch in benchmark.archs:
            scores = Scores(benchmark, arch)
            text = summaries.metrics_table(scores).fitted(columns() or WIDE)
            beaten |= "†" in text
            print(f"\n{text}")
            told += filter(None, [_tell_wandb(scores)])
        from mtl.report.figures.paper import draw  # late: matplotlib takes a second to import

        if kept:
            figures += draw(benchmark, folder, only=["learning-curves"])
    if found.runs:
        dagger = "; †: better than single-task learning" if beaten else ""
        print(f"test set, mean ± std over seeds; *: the best mean, which need not be a real difference{dagger}\n")
    for line in told:  # after the tables and their note
        print(line)
    for figure in figures:
        print(f"figure: {figure}")
    if (search := folder / "optimization_results.yaml").exists():  # of Hydra's Optuna sweeper
        best = yaml.safe_load(search.read_text())
        words = " ".join(f"{key}={value}" for key, value in best["best_params"].items())
        print(f"best validation value: {best['best_value']:.4g}, by {words}")
    failed = [o for o in outcomes if o["status"] != "finished"]
    for o in failed:
        print(f"{o['status']}: {o['command']}{': ' if o['message'] else ''}{o['message']}")
    _say_doubts(found, {Path(o["directory"]).resolve() for o in failed if o["directory"]})
    print(_closing(folder, outcomes))
    if found.runs:
        if line := activation():
            print(f"first:    {line}")
        root = found.runs[0].directory.parents[4]
        print(f"compare:  python -m mtl.report {root}   (Δm, ranks, differences by seed, a page with all figures)")
        if found.runs[0].info["data"] == "digits":
            start = shlex.join(program())
            print(f"next:     {start} trainer.epochs=10 data.limit_train=10000   (CIFAR-100, downloaded once)")
    nothing = all(o["status"] == "refused" for o in outcomes) or not kept
    return max((o["code"] for o in outcomes), default=0), nothing


def _tell_wandb(scores: Scores) -> str:
    """Report Δm and mean ranks as a W&B run, if there is something to compare and the runs are in W&B.

    Returns:
        a line for the console; empty if nothing was reported.
    """
    node = scores.groups[0].any.config["logger"] if scores.groups else {}
    node = node.get("wandb", node)
    if node.get("_target_") != "mtl.tracking.wandb.WandbTracker" or len(scores.groups) < 2:
        return ""
    ranks, rows = scores.mean_ranks("last"), {}
    for group in scores.groups:
        values = [v for v in scores.delta_m(group, "last").values() if math.isfinite(v)]
        found = {
            "delta_m": statistics.fmean(values) if values else math.nan,
            "mean_rank": ranks.get(group.label, math.nan),
        }
        rows[group.label] = {key: value for key, value in found.items() if math.isfinite(value)}
    tracker = schema.build(node, "logger")
    return tracker.compare(scores.groups[0].any.directory.parents[4], f"{scores.benchmark.name} {scores.arch}", rows)


def _told_apart(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plans; where names differ in the digest alone, the options that differ stand behind them."""
    words = [shlex.split(o["command"]) for o in outcomes]
    names = [o["plan"]["name"].rpartition("-")[0] for o in outcomes]
    plans = []
    for outcome, name, own in zip(outcomes, names, words, strict=True):
        others = [w for w, n in zip(words, names, strict=True) if n == name]
        differs = [w for w in own if not all(w in other for other in others)]
        plans.append({**outcome["plan"], "name": " ".join([outcome["plan"]["name"], *differs])})
    return plans


def _closing(folder: Path, outcomes: list[dict[str, Any]]) -> str:
    """How many runs have finished, of all that were asked for, and what became of the others."""
    file = folder / "grid.json"
    total = (_total(folder, json.loads(file.read_text()), len(outcomes)) if file.exists() else None) or len(outcomes)
    counts = Counter(o["status"] for o in outcomes)
    finished = counts.pop("finished", 0)
    counts["not begun"] = total - len(outcomes)
    said = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    rest = "finds them and trains nothing" if finished == total else "runs what is missing"
    if counts["diverged"] == total - finished > 0:
        rest = "leaves what has diverged; study.diverged=again trains it"
    return f"{finished} of {total} runs finished{f' ({said})' if said else ''}; the same command again {rest}"


def _wait(directories: list[Path]) -> None:
    """Wait for runs of this grid at which other processes are at work, so that the table is whole."""
    from mtl.engine.directory import RunDirectory  # late: it needs torch

    def at_work(directory: Path) -> bool:
        with suppress(UserError):
            return RunDirectory(directory).busy and RunDirectory(directory).run.get("status") == "running"
        return False

    told = False
    with suppress(KeyboardInterrupt):  # the table without them
        while running := [d for d in directories if at_work(d)]:
            if not told:
                runs = count(len(running), "run")
                print(f"waiting   for {runs} of another process; Ctrl-C shows the table without", flush=True)
                told = True
            time.sleep(POLL)


def _say_doubts(found: Collection, said: set[Path], most: int = 5) -> None:
    """Print a line for each folder whose files are damaged or contradict each other, as in the report.

    Args:
        found: the grid's runs.
        said: folders that have their line already.
        most: lines of each kind.
    """
    for kind, entries in (("left out", found.damaged), ("contradiction in a run that counts", found.doubtful)):
        new = [(visible(str(path)), why.removeprefix("contradiction: ")) for path, why in entries
               if path.resolve() not in said]  # fmt: skip
        for path, why in new[:most]:
            print(f"{kind}: {path}: {why}")
        if len(new) > most:
            print(f"{kind}: {len(new) - most} more; python -m mtl.report lists them all")


def _as_found(outcome: dict[str, Any], found: Collection) -> dict[str, Any]:
    """The outcome as its run's files say it now: another process may have finished it, or its files are damaged."""
    directory = Path(outcome["directory"])
    here = any(run.directory.resolve() == directory.resolve() for run in found.runs)
    if outcome["status"] == ELSEWHERE and here:
        return {**outcome, "status": "finished", "code": 0, "message": ""}
    if outcome["status"] == "running":
        return {**outcome, "status": "interrupted"}
    if outcome["status"] != "finished" or here:
        return outcome
    reasons = {path.resolve(): reason for path, reason in found.damaged}
    reason = reasons.get(directory.resolve(), "its folder is gone or no longer says that it finished")
    cure = "delete that folder to run it again"
    return {**outcome, "status": "damaged", "code": 1, "message": f"{directory}: {reason}; {cure}"}


def _outcomes(folder: Path, pattern: str = "cell-*.json") -> list[dict[str, Any]]:
    """The notes of a grid's runs, one for each run: several cells may share a single-task baseline."""
    cells = [json.loads(file.read_text()) for file in sorted(folder.glob(pattern))]
    return list({c["directory"] or c["command"]: c for c in cells}.values())
