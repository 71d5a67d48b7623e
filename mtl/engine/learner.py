"""Training and evaluation of one run. Nothing in a step waits for the device; the host reads once per epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtl.archs.model import Model, Outputs
from mtl.data.batches import TrainingBatches
from mtl.data.columns import Batch
from mtl.engine.device import Execution
from mtl.engine.divergence import Alarm
from mtl.engine.pystate import PythonState, Unsavable
from mtl.engine.stages import Stage, stage_at
from mtl.engine.step import Losses, Step
from mtl.engine.switches import Info, Switches
from mtl.engine.trained import Idle, Watch
from mtl.errors import SetupError, one_line
from mtl.inspect.microscope import GradientObserver, Microscope
from mtl.losses import Statistics, Strategy
from mtl.losses.hooks import defines
from mtl.metrics.tally import Tally
from mtl.optim.schedules import Schedule
from mtl.parallel.processes import Processes
from mtl.random import seeded
from mtl.tasks import Task
from mtl.tracking.console import Progress

log = logging.getLogger("mtl")
STATISTICS = ("norm", "ratio", "cosine", "conflict", "magnitude")  # of `Info`: means over the epoch, as grad/…


@dataclass
class Pass(Losses):
    """A forward pass of the learner.

    Attributes:
        predictions: what each task's decoder returned, in fp32.
    """

    predictions: Sequence[Any] = ()


@dataclass
class Look:
    """One step under the microscope."""

    observer: GradientObserver
    learner: Learner
    batch: Batch

    def before(self, passes: Sequence[Pass]) -> None:
        predictions, losses = self.learner._whole(passes, self.batch)
        self.observer.before(predictions, losses, self.batch)

    def jacobian(self, jacobian: Tensor) -> None:
        self.observer.jacobian(jacobian)

    def after(self, weights: Tensor | None) -> None:
        self.observer.after(weights)


@dataclass
class Learner:
    """Everything that learns in a run, and the one epoch of it.

    Attributes:
        trainer: precision, layout, number of epochs.
        model: on the device.
        tasks: in the order of the model's predictions and of the strategy.
        strategy: combines the losses or gradients.
        optimizer: over the parameters of model and strategy; each group holds its full rate as "initial_lr".
        schedule: multiplies the groups' rates.
        device: of model and batches.
        seed: of the run.
        switches: variations of the step.
        microscope: which steps' gradients are looked at.
        processes: among which the backbone's work is divided; None is this one alone.
    """

    trainer: Execution
    model: Model
    tasks: list[Task]
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    device: torch.device
    seed: int
    switches: Switches = field(default_factory=Switches)
    microscope: Microscope = field(default_factory=Microscope)
    processes: Processes | None = None

    def __post_init__(self) -> None:
        self._python = PythonState(self.strategy, self.model, self.device)
        self._unsavable: str | None = None
        self._trained = False  # whether an epoch has moved the model
        self._idle: Idle | None = None  # why the latest one has not
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def alternates(self) -> bool:
        """Whether the tasks take turns, each with a step of its own."""
        return getattr(self.optimizer, "alternates", False)

    @property
    def combines(self) -> bool:
        """Whether a step takes the gradient of each task's loss."""
        return self.switches.combines(self.strategy, getattr(self.optimizer, "per_task", False))

    @property
    def one_jacobian(self) -> bool:
        """Whether a step takes exactly the Jacobian of the task losses for the parameters, on the whole batch."""
        strategy, switches = self.strategy, self.switches
        exact = strategy.samples == 1 and switches.transform == "none" and not switches.of_features(strategy)
        return exact and not self.alternates and self.combines

    @property
    def passes(self) -> int:
        """How much a step computes, in forward passes; look-aheads of the method are not counted."""
        tasks = len(self.tasks)
        if self.alternates:
            return 3 * tasks
        return 1 + 2 * (tasks if self.combines and not self.switches.of_features(self.strategy) else 1)

    def train_epoch(self, batches: TrainingBatches, epoch: int) -> dict[str, float]:
        """Train for one epoch, counted from 0; a function of the learner's state, the seed and `epoch`.

        Returns:
            the row of metrics.jsonl, without evaluation: losses and metrics of the training batches as they were
            passed, mean task weights, gradient statistics, learning rate, speed.
        """
        # Dropout and a user's own code draw from the global streams: reseeded, they too are functions of (seed, epoch).
        with seeded(self.seed, "dropout", epoch), self.trainer.flags():
            started, epochs, steps = time.perf_counter(), self.trainer.epochs, len(batches)
            if epoch == 0:
                self._python_state()  # says now if there is none to be saved
            self.strategy.epoch_start(epoch, epochs, self.seed)
            self.model.train()
            self.strategy.train()
            stage, first = stage_at(self.trainer.plan, epoch)
            counts = self._enter(stage, begins=0 < epoch == first)
            step, tally, partial = self.step(), Tally(self.device), any(t.name in batches.partial for t in self.tasks)
            observer = GradientObserver(self.microscope.samples, self.tasks, self.model,
                                        self.switches.transform == "log", self.one_jacobian, tally)  # fmt: skip
            watch = None if self._trained else Watch(self.model, self.optimizer, tally)
            progress = Progress(steps, f"epoch {epoch + 1}/{epochs}")
            progress.live &= self.processes is None or self.processes.leads
            alarm = Alarm([task.name for task in self.tasks], epoch, type(self.strategy).__name__)
            for i, batch in enumerate(batches.epoch(epoch)):
                if i == 0 or self.schedule.interval == "step":
                    self._set_rate(epoch - first + i / steps, stage.epochs)
                labelled = self._labelled(batch, counts) if partial or counts is not None else None
                look = Look(observer, self, batch) if self.microscope.looks(i) and observer.parameters else None
                info = step(self.forward(batch), _size(batch), labelled, look)
                losses = self._add_up(info, batch, tally)
                alarm.see(losses, info.norm, counts)
                if watch is not None:
                    watch.step()
                progress.update(i + 1, losses)
            if watch is not None:
                watch.finish()
            read = tally.read()
            progress.clear()
            if self.processes is not None:
                self.processes.compare(read, self.device)
            if watch is not None:
                self._idle = watch.cause(read)
                self._trained = self._idle is None
            seconds = time.perf_counter() - started
            return {
                **self._row("train", read),
                **self._of_steps(read, steps),
                **observer.figures(read),
                "lr": self.optimizer.param_groups[0]["lr"],
                "time/seconds": seconds,
                "time/images_per_second": batches.size / seconds,
            }

    @torch.no_grad()
    def _add_up(self, info: Info, batch: Batch, tally: Tally) -> Sequence[Tensor]:
        """Add one step to the epoch's sums; returns its losses.

        Names with a slash are the engine's: no task's name holds one.
        """
        predictions, losses = self._whole(info.passes, batch)
        counts = self._add_tasks(predictions, batch, tally)
        for task, loss, count in zip(self.tasks, losses, counts, strict=True):
            tally.add(f"{task.name}_loss", loss * count)
        for name in ("weights", *STATISTICS):
            if (value := getattr(info, name)) is not None:
                tally.add(f"step/{name}", value)
        return losses

    def _add_tasks(self, predictions: Sequence[Any], batch: Batch, tally: Tally) -> list[Tensor]:
        """Add a batch to the metrics of all tasks; returns how many labelled units each task has in it."""
        counts = [t.count(batch[t.column]) for t in self.tasks]
        tally.add("count", torch.stack(counts))
        for task, prediction in zip(self.tasks, predictions, strict=True):
            for i, metric in enumerate(task.metrics):
                tally.update(f"{task.name}/{i}", metric, prediction, batch[task.column])
        return counts

    def _of_steps(self, read: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        """Means over the epoch's steps: the tasks' weights and the gradients' statistics."""
        row = {}
        if "step/weights" in read:
            for task, weight in zip(self.tasks, read["step/weights"].tolist(), strict=True):
                row[f"weights/{task.name}"] = weight / steps
        for name in STATISTICS:
            if f"step/{name}" in read:
                row[f"grad/{name}"] = read[f"step/{name}"].item() / steps
        return row

    def _enter(self, stage: Stage, begins: bool) -> Tensor | None:
        """Let the stage's parameters learn; returns (T,) bool, the tasks that count, or None where all do.

        Args:
            begins: this is the stage's first epoch, and not the run's.
        """
        if len(self.trainer.plan) == 1 and stage == Stage(stage.epochs):
            return None
        learns = {id(p) for task in self.tasks if stage.learns(task.name) for p in self.model.own_parameters(task.name)}
        learns |= {id(p) for p in self.model.shared_parameters()} if stage.learns(None) else set()
        for p in self._trainable:
            p.requires_grad_(id(p) in learns)
        known = {id(p) for p in self._trainable}
        for module in self.model.modules():  # a frozen batch norm keeps its averages as well
            own = list(module.parameters(recurse=False))
            if hasattr(module, "track_running_stats") and own and all(id(p) in known - learns for p in own):
                module.eval()
        if begins:
            self.optimizer.state.clear()
        for i, (group, rate) in enumerate(zip(self.optimizer.param_groups, self._rates, strict=True)):
            group["initial_lr"] = stage.lr if stage.lr is not None and i == 0 else rate
        counts = [stage.counts(task.name) for task in self.tasks]
        return None if all(counts) else torch.tensor(counts, device=self.device)

    def _labelled(self, batch: Batch, counts: Tensor | None) -> Tensor:
        """(N, T) bool: which samples have a label of which task that counts."""
        # As one tensor, because a step may divide its batch into parts.
        labelled = torch.stack([t.labelled(batch[t.column]) for t in self.tasks], 1)
        return labelled if counts is None else labelled & counts

    def step(self) -> Step:
        """The update of this learner's parameters."""
        heads = [list(self.model.own_parameters(task.name)) for task in self.tasks]
        self.strategy.group = None  # the processes of a run have divided the batch by themselves
        return Step(
            self.strategy, self.optimizer, list(self.model.shared_parameters()), heads,
            switches=self.switches, model=self.model,
        )  # fmt: skip

    def _whole(self, passes: Sequence[Pass], batch: Batch) -> tuple[Sequence[Any], Sequence[Tensor]]:
        """Each task's predictions and loss on the whole batch, from the forward passes that a step was made of."""
        if len(passes) == 1:
            return passes[0].predictions, passes[0].values
        if getattr(self.optimizer, "alternates", False):  # each task's own turn
            return [p.predictions[k] for k, p in enumerate(passes)], [p.values[k] for k, p in enumerate(passes)]
        predictions = [torch.cat(parts) for parts in zip(*(p.predictions for p in passes), strict=True)]
        return predictions, self._losses(predictions, batch)

    def forward(self, batch: Batch) -> Callable[[slice], Pass]:
        """The function that computes the losses of a part of this batch."""

        def forward(part: slice) -> Pass:
            piece = {name: column[part] for name, column in batch.items()}
            outputs = self.predict(piece)
            return Pass(self._losses(outputs.predictions, piece), outputs.features, outputs.predictions)

        return forward

    def predict(self, batch: Batch) -> Outputs:
        """Each task's prediction in fp32, and the features at which sharing ends."""
        options: dict[str, Any] = {}
        if defines(self.strategy, "views") or self.switches.of_features(self.strategy):
            options["views"] = self._views
        if self.processes is not None:
            options["run"] = self.processes.forward
        with self.trainer.autocast(self.device):
            outputs = self.model(self.trainer.laid_out(batch), **options)
        return Outputs([_single(p) for p in outputs.predictions], outputs.features)

    def _views(self, features: Tensor) -> Sequence[Tensor]:
        """What each decoder sees of the features."""
        if torch.is_grad_enabled() and not features.requires_grad and self.switches.of_features(self.strategy):
            features.requires_grad_()  # a frozen backbone; the method still weighs by the features' gradients
        return self.strategy.views(features)

    def _losses(self, predictions: Sequence[Any], batch: Batch) -> list[Tensor]:
        return [t.loss(p, batch[t.column]) for t, p in zip(self.tasks, predictions, strict=True)]

    def epoch_end(self, row: dict[str, float]) -> None:
        """Tell the strategy how the epoch went: training losses, and scores on validation data where there is some.

        Raises:
            NothingTrained: the epoch has trained nothing, and no later one can be expected to.
        """
        if self._idle is not None:
            self._idle.judge(self.strategy.epoch, self.trainer.epochs)
        with seeded(self.seed, "epoch_end", self.strategy.epoch), self.trainer.flags():
            self._epoch_end(row)

    def _epoch_end(self, row: dict[str, float]) -> None:
        keys = [f"{t.name}_{t.scores[0].name}" for t in self.tasks]
        split = "val" if f"val/{keys[0]}" in row else "train"
        losses = torch.tensor([row[f"train/{t.name}_loss"] for t in self.tasks])
        scores = torch.tensor([row[f"{split}/{key}"] for key in keys])
        stage, _ = stage_at(self.trainer.plan, self.strategy.epoch)
        if absent := [i for i, task in enumerate(self.tasks) if not stage.counts(task.name)]:
            losses[absent], scores[absent] = math.nan, math.nan  # as for a task without any label
        higher = torch.tensor([t.scores[0].higher_is_better for t in self.tasks])
        self.strategy.epoch_end(Statistics(losses, scores, higher, percent=True))

    def evaluate(self, batches: Iterable, name: str) -> dict[str, float]:
        """Losses and metrics over all samples, as {"<name>/<task>_loss": …, "<name>/<task>_<metric>": …}."""
        with seeded(self.seed, "evaluate", name), self.trainer.flags():
            return self._evaluate(batches, name)

    @torch.inference_mode()
    def _evaluate(self, batches: Iterable[Batch], name: str) -> dict[str, float]:
        self.model.eval()
        tally = Tally(self.device)
        for batch in batches:
            predictions = self.predict(batch).predictions
            self._add_tasks(predictions, batch, tally)
            for task, prediction in zip(self.tasks, predictions, strict=True):
                tally.add(f"{task.name}_loss", task.criterion(prediction, batch[task.column]).sum())
        return self._row(name, tally.read())

    def _row(self, split: str, read: Mapping[str, Tensor]) -> dict[str, float]:
        """{"test/fine_loss": …, "test/fine_accuracy": …} from an epoch's sums; NaN where no sample had a label."""
        row = {}
        for task, count in zip(self.tasks, read["count"].tolist(), strict=True):
            total = read[f"{task.name}_loss"].item()
            row[f"{split}/{task.name}_loss"] = total / count if count else math.nan
            for i, metric in enumerate(task.metrics):
                values = metric.compute(read[f"{task.name}/{i}"])
                for score in metric.scores:
                    row[f"{split}/{task.name}_{score.name}"] = values[score.name]
        return row

    def _set_rate(self, progress: float, epochs: int) -> None:
        factor = self.schedule(progress, epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def state(self) -> dict:
        """All that decides the rest of the run, besides (seed, epoch): model, optimizer, strategy, a user's attributes.

        Where these cannot be saved, "unsavable" says why: the run goes on, but cannot be resumed.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "strategy": self.strategy.state_dict(),
        }
        if python := self._python_state():
            state["python"] = python
        if self._unsavable:
            state["unsavable"] = self._unsavable
        if not self._trained:
            state["untrained"] = True
        return state

    def load_state(self, state: dict) -> None:
        """Continue from `state`; its "epoch" is 0 where it is only handed to another process.

        Raises:
            SetupError: something of the state could not be saved, or belongs to other classes.
        """
        if (why := state.get("unsavable")) and state.get("epoch"):
            raise SetupError(
                f"the run cannot be resumed exactly: {why}; keep it in a buffer, a number, a list, a dict or a tensor, "
                "and delete the run's folder to start afresh"
            )
        if python := state.get("python"):
            try:  # before the rest: it makes the buffers and parameters that the first batch has made
                self._python.restore(python)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SetupError(f"last.pt does not fit the classes of this run: {one_line(error)}") from error
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.strategy.load_state_dict(state["strategy"])
        self._trained = bool(state.get("epoch")) and not state.get("untrained", False)

    def _python_state(self) -> dict | None:
        """What a user's own classes keep in attributes; None, and said once, if it cannot be saved."""
        try:
            return self._python.save()
        except Unsavable as error:
            if self._unsavable is None:
                self._unsavable = str(error)
                log.info(f"WARNING   {error}: this run cannot be resumed after an interruption")
            return None


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _single(prediction: Any) -> Any:
    """In single precision, in which losses are computed; a decoder may return something else than one tensor."""
    return prediction.float() if isinstance(prediction, Tensor) else prediction
