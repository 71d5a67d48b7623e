"""A finished run: check its files, read the value that a search optimises, report it again to a dashboard."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtl.archs.model import count_macs, count_parameters
from mtl.config.identity import Identity
from mtl.data.base import Benchmark
from mtl.engine.directory import RunDirectory
from mtl.engine.files import CURE, Damaged, digest, plain, read_json, write_json
from mtl.engine.learner import Learner
from mtl.engine.resume import mend_best, problem_of
from mtl.engine.summary import MEAN, Selection, best, metrics, owned, selection, selection_of, speed, summarise, units
from mtl.errors import UserError
from mtl.tracking import RunInfo, Tracker, flatten

log = logging.getLogger("mtl")


def inspect(directory: RunDirectory, name: str, epochs: int, build: Callable[[], tuple[Benchmark, Learner]]) -> None:
    """Check that the files of a finished run are intact. If its summary is damaged, write it anew.

    Args:
        directory: the run's directory.
        name: the run's name.
        epochs: number of epochs that it has trained.
        build: builds the run's benchmark and learner, which are needed only to write a summary.

    Raises:
        SetupError: the metrics are damaged or changed, or the summary cannot be written.
    """
    rows = directory.rows()
    if len(rows) != epochs:
        raise Damaged(f"{directory.metrics} holds {len(rows)} epochs of a finished run of {epochs}; {CURE}")
    if directory.run.get("metrics_digest") not in (None, digest(rows).hex()):  # runs of older versions have no digest
        raise Damaged(f"{directory.metrics} was edited after the run had finished, or is of another run; {CURE}")
    # The rows are the truth; the summary follows from them. Only model size and metrics' directions need the model.
    if (summary := _summary(directory)) is None or not _agrees(summary, rows):
        with directory:
            benchmark, learner = build()
            validated = "val" in _splits(rows[0])
            tests, chosen = metrics(learner.tasks, "test"), selection(learner.tasks, validated, benchmark.select)
            try:
                content = {"status": "finished", **summarise(rows, tests, chosen), **speed(rows)}
            except KeyError as error:
                raise Damaged(f"{directory.metrics} is damaged: a row lacks {error}; {CURE}") from error
            content["parameters"] = count_parameters(learner.model)
            content |= {"tasks": owned(learner.tasks), "units": units(learner.tasks)}
            content["macs"] = count_macs(learner.model, benchmark.one())
            write_json(directory.summary, content)
        log.info(f"{name}: summary.json was damaged; written anew from metrics.jsonl, without the peak memory")
    for problem in (problem_of(directory.last, name, epochs), _best(directory, name, rows)):
        if problem:
            log.info(f"WARNING   {name}: {problem}")


def _splits(row: Mapping[str, float]) -> set[str]:
    return {key.partition("/")[0] for key in row}


def _summary(directory: RunDirectory) -> dict[str, Any] | None:
    try:
        return read_json(directory.summary)
    except (FileNotFoundError, json.JSONDecodeError, Damaged):
        return None


def _agrees(summary: Mapping[str, Any], rows: list[dict[str, float]]) -> bool:
    """Whether a summary agrees with the rows."""
    try:
        expected = {"status": "finished", **summarise(rows, summary["higher_is_better"], chosen_by(summary))}
        return all(plain(summary[key]) == plain(value) for key, value in expected.items())
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration):
        return False


def chosen_by(summary: Mapping[str, Any]) -> Selection:
    """What chose best.pt."""
    selected, tests = summary["selected"], summary["higher_is_better"]
    if summary.get("select") == MEAN:
        return selection_of(_main(summary, "val" if selected else "test"), MEAN)
    if not selected:
        return selection_of(tests, "first")
    by = selected["by"]
    return Selection(by, (by,), tests[by.replace("val/", "test/", 1)])


def _main(summary: Mapping[str, Any], split: str) -> dict[str, bool]:
    """The main metric of each task, with whether higher is better."""
    return {
        f"{split}/{names[0]}": summary["higher_is_better"][f"test/{names[0]}"] for names in summary["tasks"].values()
    }


def _best(directory: RunDirectory, name: str, rows: list[dict[str, float]]) -> str:
    """Mend best.pt if that is possible; return what is wrong with it, or an empty string."""
    chosen = chosen_by(read_json(directory.summary))
    if not (problem := problem_of(directory.best, name, best(rows, chosen)["epoch"])):
        return ""
    try:
        with directory:
            return mend_best(directory, name, rows, chosen)
    except (UserError, OSError):  # the folder is another user's, or another process is using it
        return problem


def objective(directory: str | Path) -> float | None:
    """The value that a hyperparameter search optimises: what chooses the best epoch, on validation data.

    Args:
        directory: directory of a finished run.

    Returns:
        None without validation data (`data.val_fraction=0`): a search must not choose by test data.

    Raises:
        SetupError: the summary is damaged.
    """
    folder = RunDirectory(Path(directory))
    try:
        summary = read_json(folder.summary)
        if not (selected := summary.get("selected")):
            return None
        return next(chosen_by(summary).value(row) for row in folder.rows() if row["epoch"] == selected["epoch"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise Damaged(f"{folder.summary} is damaged; the run's command writes it anew") from error


def repeat(tracker: Tracker, config: Mapping[str, Any], identity: Identity, directory: Path) -> None:
    """Report all epochs of a finished run to `tracker`, for example to a dashboard that was offline."""
    summary, rows = read_json(directory / "summary.json"), RunDirectory(directory).rows()
    best = dict(summary["higher_is_better"])
    if summary["selected"]:
        best |= {key.replace("test/", "val/", 1): higher for key, higher in best.items()}
    tracker.start(RunInfo(identity, directory, Path(config["output_root"]), flatten(config), best, rows))
    tracker.finish(flatten(summary), ok=True)
