"""From a config to a finished run: check, identify, build, train, note the outcome."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtl.archs.model import count_macs, count_parameters
from mtl.config import schema, torchrun
from mtl.config.identity import Identity, own_parts
from mtl.config.source import place
from mtl.data.base import Benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine import announce, checkpoint
from mtl.engine.build import NODES, assemble, open_batches
from mtl.engine.directory import RunDirectory, now
from mtl.engine.divergence import find, finite
from mtl.engine.files import START, Damaged, WriteError, digest, write_json
from mtl.engine.follow import follow, hand_out
from mtl.engine.learner import Learner
from mtl.engine.replay import inspect, repeat
from mtl.engine.resume import mend_best, resume, state
from mtl.engine.summary import best, metrics, owned, peak_memory, selector, speed, summarise
from mtl.errors import Diverged, SetupError, Terminated, one_line
from mtl.parallel.processes import Processes
from mtl.parallel.signals import deferred
from mtl.tracking import RunInfo, Tracker, flatten
from mtl.tracking.console import epoch_line

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: finished, failed, diverged; or, where nothing was started: refused, running elsewhere, planned.
        code: exit code.
        directory: of the run; empty when refused.
        message: the error, if any.
        plan: what a run would be (mtl.cli.plan), where nothing was to be trained.
    """

    status: str
    code: int
    directory: str = ""
    message: str = ""
    plan: dict[str, Any] | None = None


def run(
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    identity: Identity,
    command: str,
    processes: Processes | None = None,
) -> Outcome:
    """Execute one run, or say that it is already done.

    Args:
        config: resolved and checked, as plain Python objects.
        choices: the option chosen in each config group.
        identity: where it belongs.
        command: the command line, for run.json and the footer.
        processes: that share the work, of which the first does all that is written and shown; None is this one alone.

    Raises:
        UserError: the config, the machine or another process stands in the way; nothing was written.
    """
    path = identity.directory(config["output_root"])
    leads = processes is None or processes.leads
    done = RunDirectory(path).run if leads else {}
    if done.get("name", identity.name) != identity.name:
        raise Damaged(f"{path}/run.json is that of another run, {done['name']}; restore it, or delete it")
    if done.get("status") == "finished":
        on_cpu = {**config, "trainer": {**config["trainer"], "device": "cpu"}}  # the run's device may not be here
        inspect(RunDirectory(path), identity.name, config["trainer"]["epochs"], lambda: assemble(on_cpu))
        log.info(f"{identity.name}: finished {done['finished']}, in {path} (delete that folder to run it again)")
        tracker: Tracker = schema.build(config["logger"], "logger")
        if tracker.repeats:
            repeat(tracker, config, identity, path)
        return Outcome("finished", 0, str(path))

    benchmark, learner = assemble(config, processes)
    tracker: Tracker = schema.build(config["logger"], "logger")
    with RunDirectory(path) if leads else nullcontext() as directory:
        with nullcontext() if processes is None else processes.leader_first():
            train, evaluations = open_batches(benchmark, learner)
        if processes is not None:
            processes.connect(learner.device)
            if not leads:
                follow(learner, train, evaluations)
                return Outcome("finished", 0, str(path))
        job = Job(config, choices, identity, command, directory, benchmark, learner, train, evaluations, tracker)
        return job.execute()


@dataclass
class Job:
    """One run in its directory: resume if there is something to resume, train to the end, keep every file in order."""

    config: Mapping[str, Any]
    choices: Mapping[str, str]
    identity: Identity
    command: str
    directory: RunDirectory
    benchmark: Benchmark
    learner: Learner
    train: TrainingBatches
    evaluations: dict[str, EvaluationBatches]
    tracker: Tracker
    digest: bytes = START  # of the rows that are saved
    told: int = 0  # rows that the tracker has

    def execute(self) -> Outcome:
        """Train; the outcome is in run.json and in the return value. Interruptions are noted and passed on.

        Raises:
            SetupError: a file in the directory is damaged or cannot be written; the run has not begun.
        """
        directory, path, processes = self.directory, str(self.directory.path), self.learner.processes
        rows, self.digest = resume(directory, self.identity.name, self.learner)
        self.told, begun = len(rows), False
        try:
            with deferred():
                directory.start(self.config, self._identity_fields(), self.learner.device)
                begun = True
                directory.truncate(rows)
            where = self.tracker.start(self._info(rows))
            sizes = {"train": self.train.size, **{name: b.size for name, b in self.evaluations.items()}}
            announce.header(
                self.config, self.identity, self.benchmark, self.learner, sizes, len(self.train), path, where, len(rows)
            )
            # A kill between the two files leaves best.pt one epoch behind last.pt.
            if rows and (problem := mend_best(directory, self.identity.name, rows, *self._selector)):
                log.info(f"WARNING   {problem}")
            with nullcontext() if processes is None else processes.guard(self._last_words):
                self._train(rows)
            self._finish(rows)
        except (KeyboardInterrupt, SystemExit, Terminated):  # SystemExit: preempted under submitit or Ray
            if begun and not directory.finished:
                self._close("interrupted", rows, "stopped by a signal")
                log.info(f"interrupted after {len(rows)} epochs; the same command goes on from there: {self.command}")
            raise
        except Diverged as error:
            self._close("diverged", rows, str(error))
            return Outcome("diverged", error.exit_code, path, str(error))
        except WriteError as error:
            if not begun:
                raise
            message = f"{error}; {len(rows)} epochs are saved, and once that is mended the same command goes on"
            self._close("failed", rows, message)
            return Outcome("failed", error.exit_code, path, message)
        except Exception as error:
            if not begun and isinstance(error, SetupError):
                raise
            log.debug(traceback.format_exc())  # into train.log only
            where = f"{own}; " if (own := place(error)) and own not in str(error) else ""
            message = f"{type(error).__name__}: {one_line(error)} ({where}traceback in {path}/train.log)"
            self._close("failed", rows, message)
            return Outcome("failed", 1, path, message)
        announce.footer(self.summary(rows), len(rows), directory, self.command)
        return Outcome("finished", 0, path)

    def _train(self, rows: list[dict[str, float]]) -> None:
        epochs, units = self.learner.trainer.epochs, self._units()
        if self.learner.processes is not None:
            hand_out(self.learner, len(rows))
        for epoch in range(len(rows), epochs):
            started = time.perf_counter()
            row = {"epoch": epoch + 1, **self.learner.train_epoch(self.train, epoch)}
            self._refuse_divergence(row)
            for name, batches in self.evaluations.items():
                row.update(self.learner.evaluate(batches, name))
            self._refuse_divergence(row)
            self.learner.epoch_end(row)
            row["time/seconds"] = time.perf_counter() - started
            with deferred():
                self._save(row, rows)
            self._tell(rows)
            remaining = row["time/seconds"] * (epochs - epoch - 1)
            log.info(epoch_line(row, units, epochs, remaining))

    def _save(self, row: dict[str, float], rows: list[dict[str, float]]) -> None:
        """Put an epoch on disk, then into `rows`."""
        # Row, then checkpoint: on resume, rows that no checkpoint knows are cut. best.pt is last.pt, linked.
        self.directory.append(row)
        known = digest([row], self.digest)
        checkpoint.save(state(row["epoch"], self.identity.name, known, self.learner), self.directory.last)
        self.digest = known
        rows.append(row)
        if best(rows, *self._selector) is row:
            checkpoint.link(self.directory.last, self.directory.best)

    def _tell(self, rows: list[dict[str, float]]) -> None:
        """Give the tracker the rows that it has not been given yet."""
        for row in rows[self.told :]:
            self.tracker.log(row)
            self.told += 1

    def _refuse_divergence(self, row: Mapping[str, float]) -> None:
        evaluated = {
            name: b for name, b in self.evaluations.items() if f"{name}/{self.learner.tasks[0].name}_loss" in row
        }
        what = find(row, self.learner.tasks, evaluated, self.train.partial)
        if what is None and (not evaluated or finite(self.learner.model, self.learner.strategy)):
            return
        kept = " (last.pt holds the epoch before)" if row["epoch"] > 1 else ""
        raise Diverged(
            f"{self.identity.name}: {what or 'a weight became nan or inf'} in epoch {row['epoch']}{kept}; "
            "try a smaller optimizer.lr or schedule.warmup_epochs"
        )

    # -- what is chosen and reported ----------------------------------------------------------------------------------

    @property
    def _selector(self) -> tuple[str, bool]:
        return selector(self.learner.tasks, "val" in self.evaluations)

    def summary(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        """The run's figures: best over epochs (each metric on its own), last epoch, and chosen on validation data."""
        return {
            **summarise(rows, metrics(self.learner.tasks, "test"), *self._selector),
            "tasks": owned(self.learner.tasks),
            "parameters": count_parameters(self.learner.model),
            "macs": count_macs(self.learner.model, self.benchmark.one()),
            **speed(rows),
            "peak_memory_gib": peak_memory(self.learner.device),
        }

    def _finish(self, rows: list[dict[str, float]]) -> None:
        summary = {"status": "finished", **self.summary(rows)}
        write_json(self.directory.summary, summary)
        self._tell(rows)
        self.tracker.finish(flatten(summary), ok=True)  # a signal in here leaves an interrupted run, told again later
        with deferred():
            self.directory.update(status="finished", error=None, finished=now(), metrics_digest=self.digest.hex())

    def _close(self, status: str, rows: list[dict[str, float]], error: str) -> None:
        """Note how a run ended before its time, as far as its disk allows; never raises for a file."""
        summary = {"status": status, **(self.summary(rows) if rows else {})}
        with deferred():
            with suppress(WriteError):
                self._last_words(status, error)
            with suppress(WriteError):
                write_json(self.directory.summary, summary)
        self._tell(rows)
        self.tracker.finish(flatten(summary), ok=False)

    def _last_words(self, status: str, error: str) -> None:
        self.directory.update(status=status, error=error, finished=now())

    def _identity_fields(self) -> dict[str, Any]:
        names = {"name": self.identity.name, "group": self.identity.group}
        choices = {k: v for k, v in self.choices.items() if k in NODES}
        return {**asdict(self.identity), **names, "choices": choices, "command": self.command,
                "processes": torchrun.size(), "own": own_parts(self.config)}  # fmt: skip

    def _info(self, rows: list[dict[str, float]]) -> RunInfo:
        tasks = self.learner.tasks
        best = {**metrics(tasks, "test"), **(metrics(tasks, "val") if "val" in self.evaluations else {})}
        root = Path(self.config["output_root"])
        return RunInfo(self.identity, self.directory.path, root, flatten(self.config), best, tuple(rows))

    def _units(self) -> dict[str, tuple[str, str]]:
        return {t.name: (t.scores[0].name, t.scores[0].unit) for t in self.learner.tasks}
