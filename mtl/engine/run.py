"""From a config to a finished run: check, identify, build, train, note the outcome."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from mtl.archs.check import ArchError, as_before, check_model
from mtl.archs.model import MultiTaskModel, count_macs, count_parameters
from mtl.config import schema, torchrun
from mtl.config.errors import ConfigError, Diverged, SetupError, Terminated, one_line
from mtl.config.identity import Identity, own_parts
from mtl.config.source import blame, place
from mtl.data.base import Benchmark, build_benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches, move
from mtl.data.check import check_tasks, few
from mtl.engine import checkpoint, words
from mtl.engine.backward import Switches
from mtl.engine.directory import RunDirectory, now
from mtl.engine.distributed import Processes
from mtl.engine.divergence import find, finite
from mtl.engine.files import START, Damaged, WriteError, digest, write_json
from mtl.engine.finished import inspect, repeat
from mtl.engine.follow import follow, hand_out
from mtl.engine.microscope import Microscope
from mtl.engine.resume import mend_best, resume, state
from mtl.engine.signals import deferred
from mtl.engine.summary import best, metrics, owned, peak_memory, selector, speed, summarise
from mtl.engine.trainer import Learner, Trainer
from mtl.losses import Equal, Strategy
from mtl.losses.hooks import defines
from mtl.random import seeded, stream
from mtl.tasks import Task
from mtl.tracking import RunInfo, Tracker, flatten
from mtl.tracking.console import epoch_line

log = logging.getLogger("mtl")

# The nodes of a config, and what the engine adds to each when it builds it.
NODES: dict[str, tuple[str, ...]] = {
    "data": (),
    "arch": ("in_channels",),
    "loss": ("tasks",),
    "optimizer": ("params",),
    "schedule": (),
    "step": (),
    "microscope": (),
    "trainer": (),
    "logger": (),
    "study": (),
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: finished, failed, diverged; or, where nothing was started: refused, running elsewhere, planned.
        code: exit code.
        directory: of the run; empty when refused.
        message: the error, if any.
        plan: what a run would be (mtl.study.plan), where nothing was to be trained.
    """

    status: str
    code: int
    directory: str = ""
    message: str = ""
    plan: dict[str, Any] | None = None


def _root(seed: Annotated[int, Ge(0)], output_root: str, data: dict, arch: dict, loss: dict, optimizer: dict,
          schedule: dict, step: dict, microscope: dict, trainer: dict, logger: dict, study: dict) -> None:  # fmt: skip
    """The signature of a config's top level."""


def check(config: Mapping[str, Any]) -> None:
    """Compare the whole config with the signatures of what it builds.

    Raises:
        ConfigError: at the first thing that is wrong; nothing has been built or written.
    """
    if isinstance(root := config.get("output_root"), str) and not root.strip():  # the report takes it for damage
        raise ConfigError(f"output_root={root!r}: must name a folder; output_root=. is the current one")
    schema.check_arguments(_root, {key: {} if key in NODES else value for key, value in config.items()}, "")
    for name, supplied in NODES.items():
        schema.check(config.get(name), name, supplied)


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


def assemble(config: Mapping[str, Any], processes: Processes | None = None) -> tuple[Benchmark, Learner]:
    """Build what a checked config describes, all but its data and its tracker.

    Raises:
        UserError: two nodes do not fit each other, or the machine has no such device.
    """
    # A user's own class may draw from the global generators: each is built under a stream of its own.
    with seeded(config["seed"], "data"):
        benchmark = build_benchmark(config["data"])
    with seeded(config["seed"], "loss"):
        strategy: Strategy = schema.build(config["loss"], "loss", tasks=[t.name for t in benchmark.tasks])
    if benchmark.batch_size < parts(strategy):
        name = type(strategy).__name__
        raise ConfigError(
            f"data.batch_size={benchmark.batch_size}: {name} divides a batch into {parts(strategy)} parts, none "
            f"of which may be empty; use {parts(strategy)} or more, and {2 * parts(strategy)} or more with batch norm"
        )
    # A strategy may train fewer tasks than there are (loss=single): the others then do not exist in this run.
    tasks = [task for task in benchmark.tasks if task.name in strategy.names]
    trainer: Trainer = schema.build(config["trainer"], "trainer")
    switches: Switches = schema.build(config["step"], "step")
    try:
        switches.check(strategy)
    except ValueError as error:
        raise ConfigError(f"step.{error}") from error
    if (warmup := config["schedule"].get("warmup_epochs", 0)) >= trainer.epochs:
        raise ConfigError(f"schedule.warmup_epochs={warmup}: must be less than trainer.epochs={trainer.epochs}")
    if processes is not None:
        trainer = replace(trainer, device=processes.device(trainer.device))
    device = trainer.open_device()
    learner = build_learner(config, benchmark, tasks, strategy, trainer, device, switches)
    if processes is not None:
        images = torch.randn(2, *benchmark.image_shape, generator=torch.Generator().manual_seed(0))
        processes.check(learner.model.backbone, images.to(device))
        learner.processes = processes
    return benchmark, learner


def open_batches(benchmark: Benchmark, learner: Learner) -> tuple[TrainingBatches, dict[str, EvaluationBatches]]:
    """Load the data: training batches, and one set of evaluation batches for each other split.

    Raises:
        UserError: the data is missing or wrong, or a task's loss or metrics do not work on it.
    """
    with seeded(learner.seed, "load"):
        strategy, splits = learner.strategy, benchmark.splits()
    smallest = 2 * parts(strategy)
    if len(splits["train"]) < smallest:
        raise ConfigError(f"data: {len(splits['train'])} training samples; batch norm needs at least {smallest}")
    train = TrainingBatches(splits["train"], benchmark, learner.device, learner.seed, smallest)
    for split in splits.values():
        samples = move(few(split, learner.tasks), learner.device)
        with as_before(learner.model), torch.no_grad():
            predictions = learner.model.eval()(train.normalise(samples.images))
            check_tasks(learner.tasks, predictions, samples.targets)
    evaluations = {n: EvaluationBatches(s, benchmark, learner.device) for n, s in splits.items() if n != "train"}
    return train, evaluations


def parts(strategy: Strategy) -> int:
    """How many parts a step divides its batch into."""
    return max(strategy.samples, 2 if defines(strategy, "look_ahead") else 1)


def build_learner(
    config: Mapping[str, Any],
    benchmark: Benchmark,
    tasks: list[Task],
    strategy: Strategy,
    trainer: Trainer,
    device: torch.device,
    switches: Switches | None = None,
) -> Learner:
    """Model and optimizer of a checked config, on the device; the initial weights are a function of the seed.

    Raises:
        ConfigError: the architecture does not fit the images or the microscope the batches, or the optimizer refuses
            its arguments.
        SetupError: nothing in the model can be trained.
    """
    microscope: Microscope = schema.build(config["microscope"], "microscope")
    try:
        microscope.check(benchmark.batch_size, [t.name for t in tasks])
    except ValueError as error:
        raise ConfigError(f"microscope.{error}") from error
    seed, schedule = config["seed"], schema.build(config["schedule"], "schedule")
    with seeded(seed, "init"):
        model = _build_model(config, benchmark, tasks, trainer, max(1, min(2, benchmark.batch_size // parts(strategy))))
        if defines(strategy, "views") and not all(list(model.head_parameters(t.name)) for t in tasks):
            name = type(strategy).__name__
            raise ConfigError(f"loss: {name} turns what the heads see, and these have no parameters to follow it with")
        strategy.prepare(model.backbone.out_features)
    if not any(p.requires_grad for p in model.parameters()):
        raise SetupError("arch: every parameter of the model is frozen (requires_grad=False); nothing would be trained")
    model, strategy = trainer.place(model, device), strategy.to(device)
    groups = [{"params": list(model.parameters())}]
    if own := list(strategy.parameters()):
        # The method's parameters train at their own rate and without decay, unless its config follows the optimizer.
        settings = {"lr": strategy.lr, "weight_decay": strategy.weight_decay}
        groups.append({"params": own, **{k: v for k, v in settings.items() if v is not None}})
    with seeded(seed, "optimizer"):
        optimizer = schema.build(config["optimizer"], "optimizer", params=groups)
    switches = switches or Switches()
    if getattr(optimizer, "alternates", False) and (type(strategy) is not Equal or switches != Switches()):
        raise ConfigError(
            "optimizer=mtl_io: the tasks take turns, nothing is left to weigh; use loss=equal and no step.*"
        )
    if getattr(optimizer, "per_task", False):
        try:
            switches.check_per_task(strategy)
        except ValueError as error:
            raise ConfigError(f"optimizer=adatask: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Learner(trainer, model, tasks, strategy, optimizer, schedule, device, seed, switches, microscope)


def _build_model(config, benchmark: Benchmark, tasks: list[Task], trainer: Trainer, size: int) -> MultiTaskModel:
    """The model, tried out on `size` random images."""
    backbone = schema.build(config["arch"], "arch", in_channels=benchmark.image_shape[0])
    images = torch.randn(size, *benchmark.image_shape, generator=stream(0, "arch_check"))
    try:
        model = MultiTaskModel(backbone, tasks)
        count_macs(model, benchmark.image_shape)
        check_model(model, trainer.images(images.contiguous(memory_format=torch.channels_last)))
    except ArchError as error:
        raise ConfigError(f"arch: {error}") from error
    except Exception as error:  # whatever a user's own module raises
        shape, kind = "x".join(map(str, benchmark.image_shape)), type(error).__name__
        what = one_line(error) if isinstance(error, ValueError | RuntimeError) else f"{kind}: {one_line(error)}"
        raise ConfigError(f"arch: does not fit the images of data ({shape}): {what}{blame(error)}") from error
    return model


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
            words.header(
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
            log.debug(traceback.format_exc())  # into train.log only
            where = f"{own}; " if (own := place(error)) and own not in str(error) else ""
            message = f"{type(error).__name__}: {one_line(error)} ({where}traceback in {path}/train.log)"
            self._close("failed", rows, message)
            return Outcome("failed", 1, path, message)
        words.footer(self.summary(rows), len(rows), directory, self.command)
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
        if what is None and (not evaluated or finite(self.learner)):
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
            "macs": count_macs(self.learner.model, self.benchmark.image_shape),
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
        return {t.name: (t.metrics[0].name, t.metrics[0].unit) for t in self.learner.tasks}
