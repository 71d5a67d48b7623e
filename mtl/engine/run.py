"""One run in its directory, from a checked config to an outcome: build, train, save, report.

`prepare` builds a `Job`; `Job.execute` trains it. After every epoch a row goes to metrics.jsonl and a checkpoint to
last.pt, in this order. A run that was killed continues after its last checkpoint, with the same numbers.
"""

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
from mtl.data.base import Benchmark, build_benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.check import check_shapes, shapes
from mtl.engine import announce, checkpoint
from mtl.engine.build import NODES, assemble, open_batches
from mtl.engine.directory import RunDirectory, now
from mtl.engine.divergence import find, finite
from mtl.engine.files import START, Damaged, WriteError, digest, write_json
from mtl.engine.follow import Follower, hand_out
from mtl.engine.learner import Learner
from mtl.engine.outcome import Outcome
from mtl.engine.pictures import Pictures
from mtl.engine.replay import inspect, repeat
from mtl.engine.resume import mend_best, resume, state
from mtl.engine.stopping import ends, said, stops
from mtl.engine.summary import (
    Selection,
    best,
    forget_peak_memory,
    metrics,
    owned,
    peak_memory,
    selection,
    speed,
    summarise,
    units,
)
from mtl.errors import Diverged, SetupError, Terminated, UserError, one_line
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
    """Build one run. Its `execute` must be called inside this block, while the run's directory is locked.

    Yields a `Job`. A process that only helps (torchrun) gets a `Follower`. A run that is already finished is not built
    again: then its `Outcome` is yielded.

    Args:
        config: resolved and checked, as plain Python objects.
        choices: the option chosen in each config group, such as {"loss": "famo"}.
        identity: the run's name and group, and a hash of its config.
        command: the command line, for run.json and the footer.
        processes: the processes that share the work. Only the first one writes files and messages. None: there is only
            this process.

    Raises:
        Busy: another process is training this run.
        UserError: the run cannot be built; nothing was written. The config is wrong, for example, or data is missing.
    """
    path = identity.directory(config["output_root"])
    leads = processes is None or processes.leads
    done = RunDirectory(path).run if leads else {}
    # The folder's path follows from the config. Another name in its run.json means that somebody renamed a folder.
    if done.get("name", identity.name) != identity.name:
        raise Damaged(f"{path}/run.json belongs to another run, {done['name']}; restore it, or delete it")
    if done.get("status") == "finished":
        _look_again(config, identity, path, done)
        yield Outcome("finished", 0, str(path))
        return

    # Build everything before the directory is opened: a mistake in the config then leaves no folder behind.
    benchmark, learner = assemble(config, processes)
    check_shapes(done.get("inputs"), benchmark, path)
    tracker: Tracker = schema.build(config["logger"], "logger")
    with RunDirectory(path) if leads else nullcontext() as directory:
        # The first process may have to download the data. The others wait, and then find it on the disk.
        with nullcontext() if processes is None else processes.leader_first():
            train, evaluations = open_batches(benchmark, learner)
        if processes is not None:
            processes.connect(learner.device)
        if leads:
            yield Job(config, choices, identity, command, directory, benchmark, learner, train, evaluations, tracker)
        else:
            yield Follower(learner, train, evaluations, str(path))


def _look_again(config: Mapping[str, Any], identity: Identity, path: Path, done: Mapping[str, Any]) -> None:
    """Check the files of a finished run, and report it again if the tracker accepts repeats (Weights & Biases).

    Args:
        done: the content of run.json.
    """
    benchmark = None
    with suppress(UserError):  # the data may be missing: a finished run does not need it
        benchmark = build_benchmark(config["data"])
    if benchmark is not None:
        check_shapes(done.get("inputs"), benchmark, path)
    # A damaged summary is written anew, for which the model must be built. This machine may lack the run's GPU.
    on_cpu = {**config, "trainer": {**config["trainer"], "device": "cpu"}}
    epochs = done.get("stopped_early") or config["trainer"]["epochs"]
    inspect(RunDirectory(path), identity.name, epochs, lambda: assemble(on_cpu))
    log.info(f"{identity.title}: finished {done['finished']}, in {path} (delete that folder to run it again)")
    tracker: Tracker = schema.build(config["logger"], "logger")
    if tracker.repeats:
        repeat(tracker, config, identity, path)


@dataclass
class Job:
    """One run in its directory: resume from a checkpoint if there is one, train to the end, keep the files consistent.

    The attributes up to `tracker` are the parts that `prepare` has built. The others follow the run's progress.
    """

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
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl: one for each saved epoch
    digest: bytes = START  # of these rows; a checkpoint holds it, so that an edited metrics.jsonl is noticed
    tracked: int = 0  # how many rows the tracker has received
    begun: bool = False  # whether run.json already has the status "running"
    pictures: Pictures = field(init=False)
    failed: Outcome | None = None  # set by `_ends` if an error ended the run

    def execute(self) -> Outcome:
        """Train the run to its end.

        Returns:
            the outcome, which run.json also holds. A run that diverges or fails does not raise: its outcome says so.

        Raises:
            SetupError: before the first epoch, a file in the directory is damaged or cannot be written.
            KeyboardInterrupt, SystemExit, Terminated: the run was interrupted. run.json has the status "interrupted".
        """
        learner, processes = self.learner, self.learner.processes
        forget_peak_memory(learner.device)
        self.rows, self.digest = resume(self.directory, self.identity.name, learner)
        self.tracked = len(self.rows)  # a resumed run's tracker already has these rows
        self.pictures = Pictures(learner, self.evaluations["test"], self.directory.path)
        with self._ends():
            self._begin()
            with nullcontext() if processes is None else processes.guard(self._last_words):
                # The other processes get the weights and the first epoch from this one: only it has read last.pt.
                if processes is not None:
                    hand_out(learner, len(self.rows))
                # A run that was killed right after its last epoch has nothing left to train.
                while (epoch := len(self.rows)) < learner.trainer.epochs and not ends(learner, self._stops()):
                    started = time.perf_counter()
                    row = {"epoch": epoch + 1, **learner.train_epoch(self.train, epoch)}
                    self._refuse_divergence(row)  # before the evaluation, which would only take time
                    for name, batches in self.evaluations.items():
                        row.update(learner.evaluate(batches, name))
                    self._refuse_divergence(row)  # again: a metric on evaluation data or a weight may be NaN
                    # Methods such as DWA update their weights here, before the checkpoint.
                    learner.epoch_end(row, last=self._stops(row))
                    row["time/seconds"] = time.perf_counter() - started
                    self._note(row)
            self._finish()
        if self.failed is not None:
            return self.failed
        announce.footer(
            self.summary(), len(self.rows), self.directory, self.command, self.benchmark.noun, self.learner.tasks
        )
        return Outcome("finished", 0, str(self.directory.path))

    @contextmanager
    def _ends(self) -> Iterator[None]:
        """Note in run.json and summary.json how the run ends, if it ends early. An error is stored in `failed`.

        An exception is passed on in two cases: an interruption, and a `SetupError` before the run has begun.
        """
        path = str(self.directory.path)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, Terminated):  # SystemExit: preempted under submitit or Ray
            # A signal may also come after the run was marked as finished; then nothing is left to note.
            if self.begun and not self.directory.finished:
                self._close("interrupted", "stopped by a signal")
                epochs = count(len(self.rows), "epoch")
                log.info(f"interrupted after {epochs}; the same command goes on from there: {self.command}")
            raise
        except Diverged as error:
            kept = " (last.pt holds the epoch before)" if self.rows else ""
            self._fail("diverged", error.exit_code, f"{self.identity.name}: {error}{kept}; {error.cure}")
        except WriteError as error:
            if not self.begun:
                raise
            saved = f"epochs are saved: {len(self.rows)}; once that is mended the same command goes on"
            self._fail("failed", error.exit_code, f"{error}; {saved}")  # such as a full disk
        except Exception as error:
            if not self.begun and isinstance(error, SetupError):
                raise
            # The console shows one line, with file and line if the error is in a user's own class. train.log has all.
            log.debug(traceback.format_exc())
            where = f"{own}; " if (own := place(error)) and own not in str(error) else ""
            what = f"{type(error).__name__}: {one_line(error)}"
            self._fail("failed", 1, f"{what} ({where}traceback in {path}/train.log)")

    def _begin(self) -> None:
        """Report in run.json, to the tracker and on the console that the run begins or continues."""
        directory, rows = self.directory, self.rows
        with deferred():  # a signal waits until these files agree with each other
            directory.start(self.config, self._identity_fields(), self.learner.device)
            self.begun = True
            directory.truncate(rows)  # rows beyond the checkpoint are trained again
            self.pictures.forget(len(rows))
        self.pictures.draw(len(rows), self._stops())  # a kill after the checkpoint and before its pictures lost them
        where = self.tracker.start(self._info())
        splits = {"train": self.train.split, **{name: b.split for name, b in self.evaluations.items()}}
        announce.header(
            self.config, self.identity, self.benchmark, self.learner, splits, self.train.labels, len(self.train),
            str(directory.path), where, len(rows),
        )  # fmt: skip
        # A kill after last.pt was written and before best.pt was leaves best.pt one epoch behind.
        if rows and (problem := mend_best(directory, self.identity.name, rows, self._selection)):
            log.info(f"WARNING   {problem}")

    def _note(self, row: dict[str, float]) -> None:
        """Save an epoch, then report it."""
        with deferred():  # a signal that arrives while the row and the checkpoint are written waits until both are
            self._save(row)
        self.pictures.draw(row["epoch"], self._stops())
        self._track()
        epochs = self.learner.trainer.epochs
        remaining = row["time/seconds"] * (epochs - row["epoch"])
        log.info(epoch_line(row, self._units(), epochs, remaining, self.benchmark.noun))

    def _save(self, row: dict[str, float]) -> None:
        """Put an epoch on disk, then into `rows`."""
        # First the row, then the checkpoint. After a kill in between, the row is cut off and the epoch trained again.
        # In the other order a row would be missing, which nothing could restore.
        self.directory.append(row)
        known = digest([row], self.digest)
        checkpoint.save(state(row["epoch"], self.identity.name, known, self.learner), self.directory.last)
        self.digest = known
        self.rows.append(row)
        if best(self.rows, self._selection) is row:
            checkpoint.link(self.directory.last, self.directory.best)  # a hard link: the weights are not written twice

    def _track(self) -> None:
        """Send the tracker the rows that it does not have yet."""
        for row in self.rows[self.tracked :]:
            self.tracker.log(row)
            self.tracked += 1

    def _refuse_divergence(self, row: Mapping[str, float]) -> None:
        """End the run if a loss, a metric, the gradient or a weight is NaN or infinite.

        Args:
            row: the epoch's values so far: after training, or also after the evaluation of some splits.

        Raises:
            Diverged: the message names the first such value.
        """
        # Only splits that are in the row already. A task without labels in a split has a NaN that is no divergence.
        evaluated = {
            name: b for name, b in self.evaluations.items() if f"{name}/{self.learner.tasks[0].name}_loss" in row
        }
        # The weights are checked once per epoch, after the evaluation: this makes the host wait for the device.
        what = find(row, self.learner.tasks, evaluated, self.train.partial)
        if what is None and (not evaluated or finite(self.learner.model, self.learner.strategy)):
            return
        raise Diverged(f"{what or 'a weight became nan or inf'} in epoch {row['epoch']}")

    # -- selection and reports ----------------------------------------------------------------------------------------

    @property
    def _selection(self) -> Selection:
        """What chooses best.pt."""
        return selection(self.learner.tasks, "val" in self.evaluations, self.benchmark.select)

    def _stops(self, *rows: Mapping[str, float]) -> bool:
        """Whether the run stops early, after its saved epochs and `rows`."""
        return stops([*self.rows, *rows], self.learner.trainer, self._selection)

    def summary(self) -> dict[str, Any]:
        """The run's results, for summary.json.

        Each test metric at its own best epoch, at the last epoch, and at the epoch that validation data chose (if any).
        Then the model's size, the speed and the peak memory.
        """
        return {
            **summarise(self.rows, metrics(self.learner.tasks, "test"), self._selection),
            "tasks": owned(self.learner.tasks),
            "units": units(self.learner.tasks),
            "parameters": count_parameters(self.learner.model),
            "macs": count_macs(self.learner.model, self.benchmark.one()),
            **speed(self.rows),
            "peak_memory_gib": peak_memory(self.learner.device),
        }

    def _finish(self) -> None:
        """Write summary.json, close the tracker, and mark the run as finished. The mark comes last."""
        early = {}
        if (patience := self.learner.trainer.patience) is not None and self._stops():
            early["stopped_early"] = len(self.rows)
            log.info(said(self.rows, patience, self._selection))
        summary = {"status": "finished", **self.summary()}
        write_json(self.directory.summary, summary)
        self._track()
        # If a signal stops the run here, it counts as interrupted. The next attempt reports it again.
        self.tracker.finish(flatten(summary), ok=True)
        with deferred():
            known = {"metrics_digest": self.digest.hex(), **early}
            self.directory.update(status="finished", error=None, finished=now(), **known)

    def _fail(self, status: str, code: int, message: str) -> None:
        """Note an error in the files, and keep it as the outcome: the runs of a grid after this one go on."""
        self._close(status, message)
        self.failed = Outcome(status, code, str(self.directory.path), message)

    def _close(self, status: str, error: str) -> None:
        """Note how a run ended early. A file that cannot be written is skipped: the disk may be the reason."""
        summary = {"status": status, **(self.summary() if self.rows else {})}
        # Each file by itself: if one cannot be written, the other one may still be.
        with deferred():
            with suppress(WriteError):
                self._last_words(status, error)
            with suppress(WriteError):
                write_json(self.directory.summary, summary)
        self._track()
        self.tracker.finish(flatten(summary), ok=False)

    def _last_words(self, status: str, error: str) -> None:
        # Also called from another thread (`Processes.guard`), if this process hangs because another one has ended.
        self.directory.update(status=status, error=error, finished=now())

    def _identity_fields(self) -> dict[str, Any]:
        """The fields of run.json that describe the run; reports read them."""
        names = {"name": self.identity.name, "group": self.identity.group}
        choices = {k: v for k, v in self.choices.items() if k in NODES}
        facts = self.benchmark.facts()
        return {**asdict(self.identity), **names, "choices": choices, "command": self.command,
                "processes": torchrun.size(), "own": own_parts(self.config),
                "inputs": shapes(self.benchmark), **({"facts": facts} if facts else {})}  # fmt: skip

    def _info(self) -> RunInfo:
        """What a tracker needs to know at the start: names, config, metrics, and the rows of a resumed run."""
        tasks = self.learner.tasks
        best = {**metrics(tasks, "test"), **(metrics(tasks, "val") if "val" in self.evaluations else {})}
        root = Path(self.config["output_root"])
        return RunInfo(self.identity, self.directory.path, root, flatten(self.config), best, tuple(self.rows))

    def _units(self) -> dict[str, tuple[str, str, bool]]:
        """For each task, name, unit and direction of its main metric, for the epoch's line on the console."""
        return {t.name: (t.scores[0].name, t.scores[0].unit, t.scores[0].higher_is_better) for t in self.learner.tasks}
