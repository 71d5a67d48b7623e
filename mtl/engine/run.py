"""From a config to a finished run: check, identify, build, train, note the outcome."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from mtl.archs.model import MultiTaskModel, count_macs, count_parameters
from mtl.config import schema, torchrun
from mtl.config.blame import blamed
from mtl.config.cli import Terminated
from mtl.config.errors import ConfigError, Diverged, SetupError, one_line
from mtl.config.identity import Identity
from mtl.data.base import Benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine import checkpoint, words
from mtl.engine.backward import Switches
from mtl.engine.directory import RunDirectory, now, write_json
from mtl.engine.distributed import Processes
from mtl.engine.finished import repeat
from mtl.engine.microscope import Microscope
from mtl.engine.trainer import Learner, Trainer, defines
from mtl.losses import Equal, Strategy
from mtl.random import seeded
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
    if done.get("status") == "finished":
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
                processes.follow(learner, train, evaluations)
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
        benchmark: Benchmark = schema.build(config["data"], "data")
    with seeded(config["seed"], "loss"):
        strategy: Strategy = schema.build(config["loss"], "loss", tasks=[t.name for t in benchmark.tasks])
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
        processes.check(learner.model.backbone)
        learner.processes = processes
    return benchmark, learner


def open_batches(benchmark: Benchmark, learner: Learner) -> tuple[TrainingBatches, dict[str, EvaluationBatches]]:
    """Load the data: training batches, and one set of evaluation batches for each other split."""
    with seeded(learner.seed, "load"), blamed():
        strategy, splits = learner.strategy, benchmark.splits()
    smallest = 2 * max(strategy.samples, 2 if defines(strategy, "look_ahead") else 1)
    if len(splits["train"]) < smallest:
        raise ConfigError(f"data: {len(splits['train'])} training samples; batch norm needs at least {smallest}")
    train = TrainingBatches(splits["train"], benchmark, learner.device, learner.seed, smallest)
    evaluations = {n: EvaluationBatches(s, benchmark, learner.device) for n, s in splits.items() if n != "train"}
    return train, evaluations


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
        backbone = schema.build(config["arch"], "arch", in_channels=benchmark.image_shape[0])
        try:
            model = MultiTaskModel(backbone, tasks)
            count_macs(model, benchmark.image_shape)
        except (ValueError, RuntimeError) as error:
            shape = "x".join(map(str, benchmark.image_shape))
            raise ConfigError(f"arch: does not fit the images of data ({shape}): {one_line(error)}") from error
        if defines(strategy, "views") and not all(list(model.head_parameters(t.name)) for t in tasks):
            name = type(strategy).__name__
            raise ConfigError(f"loss: {name} turns what the heads see, and these have no parameters to follow it with")
        strategy.prepare(backbone.out_features)
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

    def execute(self) -> Outcome:
        """Train; the outcome is in run.json and in the return value. Interruptions are noted and passed on."""
        directory, path, processes = self.directory, str(self.directory.path), self.learner.processes
        rows = self._resume()
        directory.start(self.config, self._identity_fields(), self.learner.device)
        where = self.tracker.start(self._info(rows))
        words.header(self, where, len(rows))
        try:
            with nullcontext() if processes is None else processes.guard(self._last_words):
                self._train(rows)
        except (KeyboardInterrupt, SystemExit, Terminated):  # SystemExit: preempted under submitit or Ray
            self._close("interrupted", rows, "stopped by a signal")
            log.info(f"interrupted after {len(rows)} epochs; the same command goes on from there: {self.command}")
            raise
        except Diverged as error:
            self._close("diverged", rows, str(error))
            return Outcome("diverged", error.exit_code, path, str(error))
        except Exception as error:
            log.debug(traceback.format_exc())  # into train.log only
            message = f"{type(error).__name__}: {one_line(error)} (traceback in {path}/train.log)"
            self._close("failed", rows, message)
            return Outcome("failed", 1, path, message)
        self._close("finished", rows, None)
        words.footer(self, rows)
        return Outcome("finished", 0, path)

    def _resume(self) -> list[dict[str, float]]:
        if not self.directory.last.exists():
            return self.directory.truncate(0)
        state = checkpoint.load(self.directory.last)
        self.learner.load_state(state)
        rows = self.directory.truncate(state["epoch"])
        if [row["epoch"] for row in rows] != list(range(1, state["epoch"] + 1)):
            raise SetupError(
                f"{self.directory.metrics} lacks rows that last.pt (after epoch {state['epoch']}) has seen; "
                "delete last.pt to start the run afresh"
            )
        # A kill between the two files leaves best.pt one epoch behind last.pt.
        if self._is_best(rows):
            checkpoint.link(self.directory.last, self.directory.best)
        return rows

    def _train(self, rows: list[dict[str, float]]) -> None:
        epochs, units = self.learner.trainer.epochs, self._units()
        if self.learner.processes is not None:
            self.learner.processes.hand_out(self.learner, len(rows))
        for epoch in range(len(rows), epochs):
            started = time.perf_counter()
            row = {"epoch": epoch + 1, **self.learner.train_epoch(self.train, epoch)}
            self._refuse_divergence(row)
            for name, batches in self.evaluations.items():
                row.update(self.learner.evaluate(batches, name))
            self.learner.epoch_end(row)
            row["time/seconds"] = time.perf_counter() - started
            rows.append(row)
            # Row, then checkpoint: on resume, rows that no checkpoint knows are cut. best.pt is last.pt, linked.
            self.directory.append(row)
            checkpoint.save({"epoch": epoch + 1, **self.learner.state()}, self.directory.last)
            if self._is_best(rows):
                checkpoint.link(self.directory.last, self.directory.best)
            self.tracker.log(row)
            remaining = row["time/seconds"] * (epochs - epoch - 1)
            log.info(epoch_line(row, units, epochs, remaining))

    def _refuse_divergence(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            if not math.isfinite(value) and (key == "grad/norm" or self._has_labels(key)):
                what = key.removeprefix("train/").replace("_", " ").replace("grad/norm", "gradient norm")
                kept = " (last.pt holds the epoch before)" if row["epoch"] > 1 else ""
                raise Diverged(
                    f"{self.identity.name}: {what} became {value} in epoch {row['epoch']}{kept}; "
                    "try a smaller optimizer.lr or schedule.warmup_epochs"
                )

    def _has_labels(self, key: str) -> bool:
        return any(key == f"train/{t.name}_loss" and not t.partial for t in self.learner.tasks)

    # -- what is chosen and reported ----------------------------------------------------------------------------------

    def _metrics(self, split: str) -> dict[str, bool]:
        """{"test/fine_accuracy": higher is better, …}, the main one first."""
        return {f"{split}/{t.name}_{m.name}": m.higher_is_better for t in self.learner.tasks for m in t.metrics}

    @property
    def _selector(self) -> tuple[str, bool]:
        """What chooses best.pt: the first task's main metric on validation data, or, by the protocol, on test data."""
        return next(iter(self._metrics("val" if "val" in self.evaluations else "test").items()))

    def _is_best(self, rows: list[dict[str, float]]) -> bool:
        key, higher = self._selector
        return bool(rows) and _best(rows, key, higher) is rows[-1]

    def summary(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        """The run's figures: best over epochs (each metric on its own), last epoch, and chosen on validation data."""
        tests, (key, higher) = self._metrics("test"), self._selector
        chosen = _best(rows, key, higher)
        return {
            "epochs": len(rows),
            "best": {k: {"value": (row := _best(rows, k, h))[k], "epoch": row["epoch"]} for k, h in tests.items()},
            "last": {k: rows[-1][k] for k in tests},
            "higher_is_better": tests,
            "selected": {"by": key, "epoch": chosen["epoch"], **{k: chosen[k] for k in tests}}
            if key.startswith("val/")
            else None,
            "parameters": count_parameters(self.learner.model),
            "macs": count_macs(self.learner.model, self.benchmark.image_shape),
            "seconds": sum(r["time/seconds"] for r in rows),
            "images_per_second": sum(r["time/images_per_second"] for r in rows) / len(rows),
            "peak_memory_gib": _peak_memory(self.learner.device),
        }

    def _close(self, status: str, rows: list[dict[str, float]], error: str | None) -> None:
        summary = {"status": status, **(self.summary(rows) if rows else {})}
        write_json(self.directory.summary, summary)
        self.tracker.finish(flatten(summary), ok=status == "finished")
        self.directory.update(status=status, error=error, finished=now())

    def _last_words(self, status: str, error: str) -> None:
        self.directory.update(status=status, error=error, finished=now())

    def _identity_fields(self) -> dict[str, Any]:
        names = {"name": self.identity.name, "group": self.identity.group}
        choices = {k: v for k, v in self.choices.items() if k in NODES}
        return {
            **asdict(self.identity), **names, "choices": choices, "command": self.command, "processes": torchrun.size()
        }  # fmt: skip

    def _info(self, rows: list[dict[str, float]]) -> RunInfo:
        best = {**self._metrics("test"), **(self._metrics("val") if "val" in self.evaluations else {})}
        root = Path(self.config["output_root"])
        return RunInfo(self.identity, self.directory.path, root, flatten(self.config), best, tuple(rows))

    def _units(self) -> dict[str, tuple[str, str]]:
        return {t.name: (t.metrics[0].name, t.metrics[0].unit) for t in self.learner.tasks}


def _best(rows: list[dict[str, float]], key: str, higher: bool) -> dict[str, float]:
    """The first row with the best value of `key`; a value that is not a number is never the best."""
    sign = 1 if higher else -1
    return max(rows, key=lambda row: sign * row[key] if math.isfinite(row[key]) else -math.inf)


def _peak_memory(device: torch.device) -> float:
    """GiB at most in use so far: of the GPU, or of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
