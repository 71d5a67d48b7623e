"""One run in its directory, from a checked config to an outcome: build, train, save, report."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
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
from mtl.engine.follow import Follower, hand_out
from mtl.engine.learner import Learner
from mtl.engine.outcome import Outcome
from mtl.engine.replay import inspect, repeat
from mtl.engine.resume import mend_best, resume, state
from mtl.engine.summary import best, forget_peak_memory, metrics, owned, peak_memory, selector, speed, summarise
from mtl.errors import Diverged, SetupError, Terminated, one_line
from mtl.parallel.processes import Processes
from mtl.parallel.signals import deferred
from mtl.tracking import RunInfo, Tracker, flatten
from mtl.tracking.console import count, epoch_line

log = logging.getLogger("mtl")


@contextmanager
def prepare(
    config: Mapping[str, Any],
    choices: Mapping[str, str],
    identity: Identity,
    command: str,
    processes: Processes | None = None,
) -> Iterator[Job | Follower | Outcome]:
    """Build one run, whose `execute` then trains it inside this block; or the outcome of a run that is already done.

    Args:
        config: resolved and checked, as plain Python objects.
        choices: the option chosen in each config group.
        identity: where the run belongs.
        command: the command line, for run.json and the footer.
        processes: that share the work. The first does all that is written and shown. None is this process alone.

    Raises:
        Busy: another process is at work on this run.
        UserError: the config, the machine or another process stands in the way; nothing was written.
    """
    path = identity.directory(config["output_root"])
    leads = processes is None or processes.leads
    done = RunDirectory(path).run if leads else {}
    if done.get("name", identity.name) != identity.name:
        raise Damaged(f"{path}/run.json belongs to another run, {done['name']}; restore it, or delete it")
    if done.get("status") == "finished":
        _look_again(config, identity, path, done["finished"])
        yield Outcome("finished", 0, str(path))
        return

    benchmark, learner = assemble(config, processes)
    tracker: Tracker = schema.build(config["logger"], "logger")
    with RunDirectory(path) if leads else nullcontext() as directory:
        with nullcontext() if processes is None else processes.leader_first():
            train, evaluations = open_batches(benchmark, learner)
        if processes is not None:
            processes.connect(learner.device)
        if leads:
            yield Job(config, choices, identity, command, directory, benchmark, learner, train, evaluations, tracker)
        else:
            yield Follower(learner, train, evaluations, str(path))


def _look_again(config: Mapping[str, Any], identity: Identity, path: Path, finished: str) -> None:
    """Inspect a finished run, and report it once more to a tracker that wants that."""
    on_cpu = {**config, "trainer": {**config["trainer"], "device": "cpu"}}  # the run's device may not be here
    inspect(RunDirectory(path), identity.name, config["trainer"]["epochs"], lambda: assemble(on_cpu))
    log.info(f"{identity.title}: finished {finished}, in {path} (delete that folder to run it again)")
    tracker: Tracker = schema.build(config["logger"], "logger")
    if tracker.repeats:
        repeat(tracker, config, identity, path)


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
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl: the epochs that are saved
    digest: bytes = START  # of these rows
    told: int = 0  # how many rows the tracker has
    begun: bool = False  # whether run.json says that the run is running
    failed: Outcome | None = None

    def execute(self) -> Outcome:
        """Train; the outcome is in run.json and in the return value. Interruptions are noted and passed on.

        Raises:
            SetupError: a file in the directory is damaged or cannot be written; the run has not begun.
        """
        learner, processes = self.learner, self.learner.processes
        forget_peak_memory(learner.device)
        self.rows, self.digest = resume(self.directory, self.identity.name, learner)
        self.told = len(self.rows)
        with self._ends():
            self._begin()
            with nullcontext() if processes is None else processes.guard(self._last_words):
                if processes is not None:
                    hand_out(learner, len(self.rows))
                for epoch in range(len(self.rows), learner.trainer.epochs):
                    started = time.perf_counter()
                    row = {"epoch": epoch + 1, **learner.train_epoch(self.train, epoch)}
                    self._refuse_divergence(row)
                    for name, batches in self.evaluations.items():
                        row.update(learner.evaluate(batches, name))
                    self._refuse_divergence(row)
                    learner.epoch_end(row)
                    row["time/seconds"] = time.perf_counter() - started
                    self._note(row)
            self._finish()
        if self.failed is not None:
            return self.failed
        announce.footer(self.summary(), len(self.rows), self.directory, self.command)
        return Outcome("finished", 0, str(self.directory.path))

    @contextmanager
    def _ends(self) -> Iterator[None]:
        """However the run ends inside this block, run.json and summary.json say so; an error becomes `failed`."""
        path = str(self.directory.path)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, Terminated):  # SystemExit: preempted under submitit or Ray
            if self.begun and not self.directory.finished:
                self._close("interrupted", "stopped by a signal")
                epochs = count(len(self.rows), "epoch")
                log.info(f"interrupted after {epochs}; the same command goes on from there: {self.command}")
            raise
        except Diverged as error:
            kept = " (last.pt holds the epoch before)" if self.rows else ""
            cure = "try a smaller optimizer.lr or schedule.warmup_epochs"
            self._fail("diverged", error.exit_code, f"{self.identity.name}: {error}{kept}; {cure}")
        except WriteError as error:
            if not self.begun:
                raise
            saved = f"epochs are saved: {len(self.rows)}; once that is mended the same command goes on"
            self._fail("failed", error.exit_code, f"{error}; {saved}")
        except Exception as error:
            if not self.begun and isinstance(error, SetupError):
                raise
            log.debug(traceback.format_exc())  # into train.log only
            where = f"{own}; " if (own := place(error)) and own not in str(error) else ""
            what = f"{type(error).__name__}: {one_line(error)}"
            self._fail("failed", 1, f"{what} ({where}traceback in {path}/train.log)")

    def _begin(self) -> None:
        """Say in run.json, to the tracker and on the console that the run begins or goes on."""
        directory, rows = self.directory, self.rows
        with deferred():
            directory.start(self.config, self._identity_fields(), self.learner.device)
            self.begun = True
            directory.truncate(rows)
        where = self.tracker.start(self._info())
        sizes = {"train": self.train.size, **{name: b.size for name, b in self.evaluations.items()}}
        announce.header(
            self.config, self.identity, self.benchmark, self.learner, sizes, len(self.train), str(directory.path),
            where, len(rows),
        )  # fmt: skip
        # A kill between the two files leaves best.pt one epoch behind last.pt.
        if rows and (problem := mend_best(directory, self.identity.name, rows, *self._selector)):
            log.info(f"WARNING   {problem}")

    def _note(self, row: dict[str, float]) -> None:
        """Save an epoch, then show it."""
        with deferred():
            self._save(row)
        self._tell()
        epochs = self.learner.trainer.epochs
        log.info(epoch_line(row, self._units(), epochs, row["time/seconds"] * (epochs - row["epoch"])))

    def _save(self, row: dict[str, float]) -> None:
        """Put an epoch on disk, then into `rows`."""
        # Row, then checkpoint: on resume, rows that no checkpoint knows are cut. best.pt is last.pt, linked.
        self.directory.append(row)
        known = digest([row], self.digest)
        checkpoint.save(state(row["epoch"], self.identity.name, known, self.learner), self.directory.last)
        self.digest = known
        self.rows.append(row)
        if best(self.rows, *self._selector) is row:
            checkpoint.link(self.directory.last, self.directory.best)

    def _tell(self) -> None:
        """Give the tracker the rows that it does not have yet."""
        for row in self.rows[self.told :]:
            self.tracker.log(row)
            self.told += 1

    def _refuse_divergence(self, row: Mapping[str, float]) -> None:
        evaluated = {
            name: b for name, b in self.evaluations.items() if f"{name}/{self.learner.tasks[0].name}_loss" in row
        }
        what = find(row, self.learner.tasks, evaluated, self.train.partial)
        if what is None and (not evaluated or finite(self.learner.model, self.learner.strategy)):
            return
        raise Diverged(f"{what or 'a weight became nan or inf'} in epoch {row['epoch']}")

    # -- selection and reports ----------------------------------------------------------------------------------------

    @property
    def _selector(self) -> tuple[str, bool]:
        return selector(self.learner.tasks, "val" in self.evaluations)

    def summary(self) -> dict[str, Any]:
        """The run's results: best over epochs (each metric on its own), last epoch, and chosen on validation data."""
        return {
            **summarise(self.rows, metrics(self.learner.tasks, "test"), *self._selector),
            "tasks": owned(self.learner.tasks),
            "parameters": count_parameters(self.learner.model),
            "macs": count_macs(self.learner.model, self.benchmark.one()),
            **speed(self.rows),
            "peak_memory_gib": peak_memory(self.learner.device),
        }

    def _finish(self) -> None:
        summary = {"status": "finished", **self.summary()}
        write_json(self.directory.summary, summary)
        self._tell()
        # After a signal in here the run counts as interrupted, and is reported again.
        self.tracker.finish(flatten(summary), ok=True)
        with deferred():
            self.directory.update(status="finished", error=None, finished=now(), metrics_digest=self.digest.hex())

    def _fail(self, status: str, code: int, message: str) -> None:
        self._close(status, message)
        self.failed = Outcome(status, code, str(self.directory.path), message)

    def _close(self, status: str, error: str) -> None:
        """Note how a run ended before its time, as far as its disk allows; never raises for a file."""
        summary = {"status": status, **(self.summary() if self.rows else {})}
        with deferred():
            with suppress(WriteError):
                self._last_words(status, error)
            with suppress(WriteError):
                write_json(self.directory.summary, summary)
        self._tell()
        self.tracker.finish(flatten(summary), ok=False)

    def _last_words(self, status: str, error: str) -> None:
        self.directory.update(status=status, error=error, finished=now())

    def _identity_fields(self) -> dict[str, Any]:
        names = {"name": self.identity.name, "group": self.identity.group}
        choices = {k: v for k, v in self.choices.items() if k in NODES}
        return {**asdict(self.identity), **names, "choices": choices, "command": self.command,
                "processes": torchrun.size(), "own": own_parts(self.config)}  # fmt: skip

    def _info(self) -> RunInfo:
        tasks = self.learner.tasks
        best = {**metrics(tasks, "test"), **(metrics(tasks, "val") if "val" in self.evaluations else {})}
        root = Path(self.config["output_root"])
        return RunInfo(self.identity, self.directory.path, root, flatten(self.config), best, tuple(self.rows))

    def _units(self) -> dict[str, tuple[str, str, bool]]:
        return {t.name: (t.scores[0].name, t.scores[0].unit, t.scores[0].higher_is_better) for t in self.learner.tasks}
