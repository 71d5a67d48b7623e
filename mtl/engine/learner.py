"""Training and evaluation of one run. Nothing in a step waits for the device; the host reads once per epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtl.archs.model import MultiTaskModel
from mtl.data.batches import TrainingBatches
from mtl.engine.device import Execution
from mtl.engine.pystate import PythonState, Unsavable
from mtl.engine.step import Losses, Step
from mtl.engine.switches import Switches
from mtl.engine.trained import Idle, Watch
from mtl.errors import SetupError, one_line
from mtl.inspect.microscope import GradientObserver, Microscope
from mtl.losses import Statistics, Strategy
from mtl.metrics.tally import Sums
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
        predictions: each task's (N, …), in fp32.
    """

    predictions: Sequence[Tensor] = ()


@dataclass
class Look:
    """One step under the microscope."""

    observer: GradientObserver
    learner: Learner
    targets: dict[str, Tensor]

    def before(self, passes: Sequence[Pass]) -> None:
        predictions, losses = self.learner._whole(passes, self.targets)
        self.observer.before(predictions, losses, self.targets)

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
        tasks: in the order of the model's heads and of the strategy.
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
    model: MultiTaskModel
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
        with seeded(self.seed, "dropout", epoch, device=self.device):
            return self._train_epoch(batches, epoch)

    def _train_epoch(self, batches: TrainingBatches, epoch: int) -> dict[str, float]:
        trainer, started = self.trainer, time.perf_counter()
        if epoch == 0:
            self._python_state()  # says now if there is none to be saved
        self.strategy.epoch_start(epoch, trainer.epochs, self.seed)
        self.model.train()
        self.strategy.train()
        step = self.step()
        partial = any(task.name in batches.partial for task in self.tasks)
        sums = Sums()  # names with a slash are the engine's: no task's name holds one
        log_losses = self.switches.transform == "log"
        observer = GradientObserver(
            self.microscope.samples, self.tasks, self.model, log_losses, self.one_jacobian, sums
        )
        watch = None if self._trained else Watch(self.model, self.optimizer, sums)
        progress = Progress(len(batches), f"epoch {epoch + 1}/{trainer.epochs}")
        progress.live &= self.processes is None or self.processes.leads

        for i, (images, targets) in enumerate(batches.epoch(epoch)):
            if i == 0 or self.schedule.interval == "step":
                self._set_rate(epoch + i / len(batches))
            counts = torch.stack([t.count(targets[t.name]) for t in self.tasks])
            # As one tensor, because a step may divide its batch into parts.
            labelled = torch.stack([t.labelled(targets[t.name]) for t in self.tasks], 1) if partial else None
            look = Look(observer, self, targets) if self.microscope.looks(i) else None
            info = step(self.forward(images, targets), len(images), labelled, look)

            with torch.no_grad():
                predictions, losses = self._whole(info.passes, targets)
                sums.add("count", counts)
                for t, p, loss, count in zip(self.tasks, predictions, losses, counts, strict=True):
                    sums.add(f"{t.name}_loss", loss * count)
                    for m in t.metrics:
                        sums.add(f"{t.name}_{m.name}", m.update(p, targets[t.name]))
                for name in ("weights", *STATISTICS):
                    if (value := getattr(info, name)) is not None:
                        sums.add(f"step/{name}", value)
            if watch is not None:
                watch.step()
            progress.update(i + 1)

        if watch is not None:
            watch.finish()
        read = sums.read()
        progress.clear()
        if self.processes is not None:
            self.processes.compare(read, self.device)
        if watch is not None:
            self._idle = watch.cause(read)
            self._trained = self._idle is None
        seconds = time.perf_counter() - started
        row = self._figures("train", read)
        for task, weight in zip(self.tasks, read.get("step/weights", ()), strict=False):
            row[f"weights/{task.name}"] = weight / len(batches)
        for name in STATISTICS:
            if f"step/{name}" in read:
                row[f"grad/{name}"] = read[f"step/{name}"][0] / len(batches)
        row.update(observer.figures(read))
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["time/seconds"] = seconds
        row["time/images_per_second"] = batches.size / seconds
        return row

    def step(self) -> Step:
        """The update of this learner's parameters."""
        heads = [list(self.model.head_parameters(task.name)) for task in self.tasks]
        self.strategy.group = None  # the processes of a run have divided the batch by themselves
        return Step(
            self.strategy, self.optimizer, list(self.model.shared_parameters()), heads,
            switches=self.switches, model=self.model,
        )  # fmt: skip

    def _whole(self, passes: Sequence[Pass], targets: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Each task's predictions and loss on the whole batch, from the forward passes that a step was made of."""
        if len(passes) == 1:
            return passes[0].predictions, passes[0].values
        if getattr(self.optimizer, "alternates", False):  # each task's own turn
            return [p.predictions[k] for k, p in enumerate(passes)], [p.values[k] for k, p in enumerate(passes)]
        predictions = [torch.cat(parts) for parts in zip(*(p.predictions for p in passes), strict=True)]
        return predictions, self._losses(predictions, targets)

    def forward(self, images: Tensor, targets: dict[str, Tensor]) -> Callable[[slice], Pass]:
        """The function that computes the losses of a part of this batch."""

        def forward(part: slice) -> Pass:
            predictions, features = self.predict(images[part])
            losses = self._losses(predictions, {name: y[part] for name, y in targets.items()})
            return Pass(losses, features, predictions)

        return forward

    def predict(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each task's prediction in fp32, and the features (N, F) that the heads started from."""
        with self.trainer.autocast(self.device):
            images, backbone = self.trainer.images(images), self.model.backbone
            features = backbone(images) if self.processes is None else self.processes.forward(backbone, images)
            if torch.is_grad_enabled() and not features.requires_grad and self.switches.of_features(self.strategy):
                features.requires_grad_()  # a frozen backbone; the method still weighs by the features' gradients
            predictions = self.model.predict(self.strategy.views(features))
        return [p.float() for p in predictions], features

    def _losses(self, predictions: list[Tensor], targets: dict[str, Tensor]) -> list[Tensor]:
        return [t.loss(p, targets[t.name]) for t, p in zip(self.tasks, predictions, strict=True)]

    def epoch_end(self, row: dict[str, float]) -> None:
        """Tell the strategy how the epoch went: training losses, and scores on validation data where there is some.

        Raises:
            NothingTrained: the epoch has trained nothing, and no later one can be expected to.
        """
        if self._idle is not None:
            self._idle.judge(self.strategy.epoch, self.trainer.epochs)
        with seeded(self.seed, "epoch_end", self.strategy.epoch, device=self.device):
            self._epoch_end(row)

    def _epoch_end(self, row: dict[str, float]) -> None:
        keys = [f"{t.name}_{t.metrics[0].name}" for t in self.tasks]
        split = "val" if f"val/{keys[0]}" in row else "train"
        losses = torch.tensor([row[f"train/{t.name}_loss"] for t in self.tasks])
        scores = torch.tensor([row[f"{split}/{key}"] for key in keys])
        higher = torch.tensor([t.metrics[0].higher_is_better for t in self.tasks])
        self.strategy.epoch_end(Statistics(losses, scores, higher, percent=True))

    def evaluate(self, batches: Iterable, name: str) -> dict[str, float]:
        """Losses and metrics over all samples, as {"<name>/<task>_loss": …, "<name>/<task>_<metric>": …}."""
        with seeded(self.seed, "evaluate", name, device=self.device):
            return self._evaluate(batches, name)

    @torch.inference_mode()
    def _evaluate(self, batches: Iterable, name: str) -> dict[str, float]:
        self.model.eval()
        sums = Sums()
        for images, targets in batches:
            predictions, _ = self.predict(images)
            sums.add("count", torch.stack([t.count(targets[t.name]) for t in self.tasks]))
            for t, p in zip(self.tasks, predictions, strict=True):
                sums.add(f"{t.name}_loss", t.criterion(p, targets[t.name]).sum())
                for m in t.metrics:
                    sums.add(f"{t.name}_{m.name}", m.update(p, targets[t.name]))
        return self._figures(name, sums.read())

    def _figures(self, name: str, read: dict[str, list[float]]) -> dict[str, float]:
        row = {}
        for task, count in zip(self.tasks, read["count"], strict=True):
            row[f"{name}/{task.name}_loss"] = read[f"{task.name}_loss"][0] / count if count else math.nan
            for m in task.metrics:
                key = f"{task.name}_{m.name}"
                row[f"{name}/{key}"] = m.compute(read[key], count) if count else math.nan
        return row

    def _set_rate(self, progress: float) -> None:
        factor = self.schedule(progress, self.trainer.epochs)
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
