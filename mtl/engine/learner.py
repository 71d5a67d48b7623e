"""Training and evaluation of one run.

A step's path: `train_epoch` → `Step` → `forward` (below) → `gradients`, `accumulate` → the optimizer. Sums stay on the
device as tensors, and the host reads them once per epoch (`Tally.read`). Only methods that solve a small problem on the
CPU wait for the device in a step (`mtl.losses.host`).
"""

from __future__ import annotations

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
from mtl.engine.saved import Saved
from mtl.engine.stages import Stage, freeze, stage_at
from mtl.engine.step import Losses, Step
from mtl.engine.switches import Info, Switches
from mtl.engine.trained import Idle, Watch, say_unweighed
from mtl.inspect.microscope import GradientObserver, Microscope
from mtl.losses import Statistics, Strategy
from mtl.losses.hooks import defines
from mtl.metrics.tally import Tally
from mtl.optim.schedules import Schedule
from mtl.parallel.processes import Processes
from mtl.random import seeded
from mtl.tasks import Task
from mtl.tasks.groups import Groups, Units
from mtl.tasks.predictions import Predictions, each
from mtl.tracking.console import Progress

STATISTICS = ("norm", "ratio", "cosine", "conflict", "magnitude")  # fields of `Info`; reported as grad/<name>


@dataclass
class Pass(Losses):
    """The result of one forward pass, with predictions for the metrics.

    Attributes:
        predictions: the output of each task's decoder, in fp32.
    """

    predictions: Sequence[Any] = ()


@dataclass
class Look:
    """One step under the microscope: passes the step's tensors on to the observer, with the batch that it needs."""

    observer: GradientObserver
    learner: Learner
    batch: Batch
    units: Units

    def before(self, passes: Sequence[Pass]) -> None:
        predictions, losses = self.learner._whole(passes, self.batch, self.units)
        self.observer.before(predictions, losses, self.batch)

    def jacobian(self, jacobian: Tensor) -> None:
        self.observer.jacobian(jacobian)

    def after(self, weights: Tensor | None) -> None:
        self.observer.after(weights)


@dataclass
class Learner:
    """Everything that learns in a run (model, method, optimizer), with the functions that train and evaluate it.

    Attributes:
        trainer: precision, memory layout, number of epochs.
        model: on the device.
        tasks: in the order of the model's predictions and of the strategy.
        strategy: the method; combines the losses or gradients.
        optimizer: holds the parameters of model and strategy. Each group keeps its rate before the schedule as
            "initial_lr".
        schedule: the factor of the learning rates at each moment.
        device: of model and batches.
        seed: of the run.
        switches: variations of the step.
        microscope: decides in which steps the gradients are measured.
        processes: the processes that divide the network's work; None if this is the only process.
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
        self._groups = Groups(self.tasks)
        self._saved = Saved(self.model, self.optimizer, self.strategy, self.device)
        self._trained = False  # whether any epoch so far has changed the model
        self._idle: Idle | None = None  # why the latest epoch has not changed it
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def alternates(self) -> bool:
        """Whether the tasks take turns, each with a step of its own."""
        return getattr(self.optimizer, "alternates", False)

    @property
    def combines(self) -> bool:
        """Whether a step computes the gradient of each task's loss separately."""
        return self.switches.combines(self.strategy, getattr(self.optimizer, "per_task", False))

    @property
    def one_jacobian(self) -> bool:
        """Whether the step takes the Jacobian of the task losses for the parameters, on the whole batch.

        The microscope then reuses it, instead of computing it a second time.
        """
        strategy, switches = self.strategy, self.switches
        exact = strategy.samples == 1 and switches.transform == "none" and not switches.of_features(strategy)
        exact = exact and switches.chunks == 1
        return exact and not self.alternates and self.combines

    @property
    def passes(self) -> int:
        """The cost of a step, in forward passes. The method's look-aheads are not counted."""
        # The usual estimate: a backward pass costs two forward passes. A method on features needs one pass through the
        # backbone, as loss weighting does; its T passes through the heads alone are cheap.
        tasks = len(self.tasks)
        if self.alternates:
            return 3 * tasks
        if not self.combines or self.switches.of_features(self.strategy):
            return 3
        chunks = self.switches.chunks
        return 1 + 2 * (tasks if chunks == 1 else tasks * (chunks + 3) // 4 + 1)

    def train_epoch(self, batches: TrainingBatches, epoch: int) -> dict[str, float]:
        """Train for one epoch. The result depends only on the learner's state, the seed and `epoch`.

        Args:
            batches: the training data.
            epoch: number of the epoch, counted from 0.

        Returns:
            the epoch's row of metrics.jsonl, without evaluation: losses and metrics on the training batches (measured
            during training, before each update), mean task weights, gradient statistics, learning rate, speed.
        """
        # Dropout and a user's own code draw from torch's global streams. Reseeded here, their draws depend on the seed
        # and the epoch alone. So a resumed run continues exactly as the uninterrupted run would have.
        with seeded(self.seed, "dropout", epoch), self.trainer.flags():
            started, epochs, steps = time.perf_counter(), self.trainer.epochs, len(batches)
            if epoch == 0:
                self._saved.python_state()  # warns now, rather than after hours, if a resume will be impossible
            self.strategy.epoch_start(epoch, epochs, self.seed)
            self.model.train()
            self.strategy.train()
            # Most runs have one stage. Others train, for example, a new head on the frozen backbone in a second stage.
            # `counts` are the tasks whose losses count in this stage; None if all do.
            stage, first = stage_at(self.trainer.plan, epoch)
            counts = self._enter(stage, begins=0 < epoch == first)
            # `partial`: some sample lacks a label. Without such samples, the step needs no marks of the labelled ones.
            step, tally, partial = self.step(), Tally(self.device), any(t.name in batches.partial for t in self.tasks)
            observer = GradientObserver(self.microscope.most, self.tasks, self.model,
                                        self.switches.transform == "log", self.one_jacobian, tally)  # fmt: skip
            # Until an epoch has changed the model, a watch checks it. A frozen model would otherwise train in vain.
            watch = None if self._trained else Watch(self.model, self.optimizer, tally)
            progress = Progress(steps, f"epoch {epoch + 1}/{epochs}")
            # With several processes, only the first one draws the progress bar.
            progress.live &= self.processes is None or self.processes.leads
            alarm = Alarm([task.name for task in self.tasks], epoch, type(self.strategy).__name__)
            for i, batch in enumerate(batches.epoch(epoch)):
                # The schedule counts epochs from the start of the stage: epoch - first + i / steps of them are done.
                if i == 0 or self.schedule.interval == "step":
                    self._set_rate(epoch - first + i / steps, stage.epochs)
                # Labels are counted here, once: for the marks, the losses and the sums.
                units = self._groups.units(batch)
                labelled = self._labelled(units, counts) if partial or counts is not None else None
                # Without trainable shared parameters, there are no gradients to compare.
                look = Look(observer, self, batch, units) if self.microscope.looks(i) and observer.parameters else None
                # One update: see `Step.__call__`. `self.forward(batch)` is a function that computes the losses, because
                # some methods call it several times. `info` holds the weights, statistics and forward passes.
                info = step(self.forward(batch, units), _size(batch), labelled, look)
                losses = self._add_up(info, batch, units, tally)
                # The sums stay on the device. If a loss becomes NaN, the alarm raises `Diverged` within the epoch.
                alarm.see(losses, info.norm, counts)
                if watch is not None:
                    watch.step()
                progress.update(i + 1, losses)
            if watch is not None:
                watch.finish()
            read = tally.read()  # the host waits for the device here, once per epoch
            progress.clear()
            if self.processes is not None:  # all processes must have computed the same sums
                self.processes.compare(read, self.device)
            if watch is not None:
                self._idle = watch.cause(read)
                self._trained = self._idle is None
            seconds = time.perf_counter() - started
            return {
                **self._row("train", read),
                **self._of_steps(read, steps),
                **observer.figures(read),
                "lr": self.optimizer.param_groups[0]["lr"],  # of the model, in the last step
                "time/seconds": seconds,
                "time/images_per_second": batches.samples / seconds,
            }

    @torch.no_grad()
    def _add_up(self, info: Info, batch: Batch, units: Units, tally: Tally) -> Sequence[Tensor]:
        """Add one step to the epoch's sums on the device.

        Returns:
            the step's T losses on the whole batch.
        """
        # A name with a slash, such as "step/norm", cannot collide with a task's: no task name contains a slash.
        predictions, losses = self._whole(info.passes, batch, units)
        counts = self._add_tasks(predictions, batch, units, tally, training=True)
        # A loss is a mean over the batch's labels. Multiplied by their number it can be summed over batches.
        sums = {"loss": torch.stack(list(losses)) * counts}
        for name in ("weights", *STATISTICS):
            if (value := getattr(info, name)) is not None:
                sums[f"step/{name}"] = value
        tally.add_all(sums)
        return losses

    def _add_tasks(
        self, predictions: Sequence[Any], batch: Batch, units: Units, tally: Tally, training: bool = False
    ) -> Tensor:
        """Add a batch to the metrics of all tasks.

        Returns:
            (T,) numbers of labelled units in the batch, such as samples.
        """
        counts = self._groups.counts(units)
        tally.add("count", counts)
        self._groups.update(predictions, batch, tally, training)
        return counts

    def _of_steps(self, read: Mapping[str, Tensor], steps: int) -> dict[str, float]:
        """Means over the epoch's steps: weights/<task> and grad/<statistic>."""
        row = {}
        if "step/weights" in read:
            for task, weight in zip(self.tasks, read["step/weights"].tolist(), strict=True):
                row[f"weights/{task.name}"] = weight / steps
        for name in STATISTICS:
            if f"step/{name}" in read:
                row[f"grad/{name}"] = read[f"step/{name}"].item() / steps
        return row

    def _enter(self, stage: Stage, begins: bool) -> Tensor | None:
        """Freeze and unfreeze parameters, as the stage says.

        Args:
            begins: whether this is the first epoch of a stage other than the first one.

        Returns:
            (T,) bool, the tasks whose losses count; None if all do.
        """
        # A run without stages: nothing to freeze or unfreeze. What the user froze in the model stays frozen.
        if len(self.trainer.plan) == 1 and stage == Stage(stage.epochs):
            return None
        names = [task.name for task in self.tasks]
        freeze(self.model, names, stage, self._trainable)
        if begins:  # each stage starts without the momentum of the stage before, as a run of its own would
            self.optimizer.state.clear()
            self.schedule.load_state({})
        # A stage's `lr` concerns the model only, not the method's own parameters. A backbone keeps its share of it.
        method = {id(p) for p in self.strategy.parameters()}
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            of_model = not any(id(p) in method for p in group["params"])
            share = rate / self._rates[0] if self._rates[0] else 1.0
            group["initial_lr"] = rate if stage.lr is None or not of_model else stage.lr * share
        counts = [stage.counts(name) for name in names]
        return None if all(counts) else torch.tensor(counts).to(self.device, non_blocking=True)

    def _labelled(self, units: Units, counts: Tensor | None) -> Tensor:
        """(N, T) bool: whether sample n has a label of task t, and the task counts in this stage."""
        # For each sample, and not only for the batch, because a step may divide the batch into parts.
        labelled = self._groups.labelled(units)
        return labelled if counts is None else labelled & counts

    def step(self) -> Step:
        """A new `Step`, which updates this learner's parameters."""
        heads = [list(self.model.own_parameters(task.name)) for task in self.tasks]
        self.strategy.group = None  # the processes of a run divide the network only, so nothing is averaged
        return Step(
            self.strategy, self.optimizer, list(self.model.shared_parameters()), heads,
            switches=self.switches, model=self.model,
        )  # fmt: skip

    def _whole(self, passes: Sequence[Pass], batch: Batch, units: Units) -> tuple[Sequence[Any], Sequence[Tensor]]:
        """Each task's predictions and loss on the whole batch, collected from the step's forward passes."""
        if len(passes) == 1:
            return passes[0].predictions, passes[0].values
        if getattr(self.optimizer, "alternates", False):  # each task's loss from its own turn
            return [p.predictions[k] for k, p in enumerate(passes)], [p.values[k] for k, p in enumerate(passes)]
        # A method with independent batches has made a pass for each part. The predictions are joined, and the loss is
        # computed again: the mean of the parts' losses would weigh labels unequally.
        predictions = [each(_joined, *parts) for parts in zip(*(p.predictions for p in passes), strict=True)]
        return predictions, self._groups.losses(predictions, batch, units)

    def forward(self, batch: Batch, units: Units) -> Callable[[slice], Pass]:
        """The function that computes the losses of a part of this batch: `Step` calls it as forward(slice(0, 64))."""

        def forward(part: slice) -> Pass:
            piece = {name: column[part] for name, column in batch.items()}
            outputs, own = self.predict(piece), [known[:, part] for known in units]
            return Pass(self._groups.losses(outputs.predictions, piece, own), outputs.features, outputs.predictions)

        return forward

    def predict(self, batch: Batch) -> Outputs:
        """Run the model: each task's prediction in fp32, and the features at the end of the shared part."""
        # `views` is passed only if needed, so that a user's own model does not have to accept it.
        options: dict[str, Any] = {}
        if defines(self.strategy, "views") or self.switches.of_features(self.strategy):
            options["views"] = self._views
        # Only the network runs in bf16. Losses and metrics get fp32 predictions.
        with self.trainer.autocast(self.device):
            batch = self.trainer.laid_out(batch)
            if self.processes is None:
                outputs = self.model(batch, **options)
            else:
                outputs = self.processes.outputs(self.model, batch, [t.name for t in self.tasks], **options)
        found = outputs.predictions
        found = found if isinstance(found, Predictions) else Predictions(found)
        return Outputs(found.each(Tensor.float), outputs.features)

    def _views(self, features: Tensor) -> Sequence[Tensor]:
        """The input of each decoder: the features themselves, or a rotated copy for each task (RotoGrad)."""
        if torch.is_grad_enabled() and not features.requires_grad and self.switches.of_features(self.strategy):
            features.requires_grad_()  # the backbone is frozen, but the method needs gradients of the features
        return self.strategy.views(features)

    def epoch_end(self, row: dict[str, float], last: bool = False) -> None:
        """Give the method the epoch's mean training losses and each task's main metric, and the schedule all metrics.

        The metrics are measured on validation data, or on the training batches if the data has no validation split. The
        test set never reaches the method or the schedule.

        Args:
            row: the epoch's row of metrics.jsonl, with evaluation.
            last: whether the run stops early after this epoch.

        Raises:
            NothingTrained: the epoch has trained nothing, and no later epoch can be expected to.
        """
        if self._idle is not None:
            epoch = self.strategy.epoch
            self._idle.judge(epoch, last or epoch + 1 == self.trainer.epochs)
        if self.strategy.epoch == 0:
            counts = stage_at(self.trainer.plan, 0)[0].tasks
            say_unweighed(self.strategy, row, self.strategy.names if counts is None else counts)
        with seeded(self.seed, "epoch_end", self.strategy.epoch), self.trainer.flags():
            self._epoch_end(row)

    def _epoch_end(self, row: dict[str, float]) -> None:
        # The row already has all results as Python numbers, so nothing is computed again.
        keys = [f"{t.name}_{t.scores[0].name}" for t in self.tasks]
        split = "val" if f"val/{keys[0]}" in row else "train"
        losses = torch.tensor([row[f"train/{t.name}_loss"] for t in self.tasks])
        # NaN, too, for a metric that is not measured on training batches, if there is no validation data.
        scores = torch.tensor([row.get(f"{split}/{key}", math.nan) for key in keys])
        stage, _ = stage_at(self.trainer.plan, self.strategy.epoch)
        if absent := [i for i, task in enumerate(self.tasks) if not stage.counts(task.name)]:
            losses[absent], scores[absent] = math.nan, math.nan  # NaN also marks a task without any label
        higher = torch.tensor([t.scores[0].higher_is_better for t in self.tasks])
        self.strategy.epoch_end(Statistics(losses, scores, higher, percent=True))
        values = {key.removeprefix(f"{split}/"): value for key, value in row.items() if key.startswith(f"{split}/")}
        self.schedule.epoch_end(values, dict(zip(keys, higher.tolist(), strict=True)))

    def evaluate(self, batches: Iterable, name: str) -> dict[str, float]:
        """Losses and metrics over all samples of a split: {"test/fine_loss": 1.2, "test/fine_accuracy": 61.0}.

        Args:
            batches: the split's batches.
            name: of the split.
        """
        with seeded(self.seed, "evaluate", name), self.trainer.flags():
            return self._evaluate(batches, name)

    @torch.inference_mode()
    def _evaluate(self, batches: Iterable[Batch], name: str) -> dict[str, float]:
        self.model.eval()
        tally = Tally(self.device)
        for batch in batches:
            predictions = self.predict(batch).predictions
            self._add_tasks(predictions, batch, self._groups.units(batch), tally)
            # A sum over the labelled samples. `_row` divides it by their number, so that batch sizes do not matter.
            tally.add("loss", self._groups.sums(predictions, batch))
        return self._row(name, tally.read())

    def _row(self, split: str, read: Mapping[str, Tensor]) -> dict[str, float]:
        """{"test/fine_loss": …, "test/fine_accuracy": …} from an epoch's sums; NaN where no sample had a label."""
        row, losses = {}, read["loss"].tolist()
        for k, (task, total, count) in enumerate(zip(self.tasks, losses, read["count"].tolist(), strict=True)):
            row[f"{split}/{task.name}_loss"] = total / count if count else math.nan
            for name, value in self._groups.scores(k, read).items():
                row[f"{split}/{task.name}_{name}"] = value
        return row

    def _set_rate(self, progress: float, epochs: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(group["initial_lr"], progress, epochs)

    def state(self) -> dict:
        """Everything that a resumed run needs besides (seed, epoch): see `Saved`."""
        # Most schedules have no state.
        schedule = {"schedule": state} if (state := self.schedule.state()) else {}
        return {**self._saved.state(), **schedule, **({} if self._trained else {"untrained": True})}

    def load_state(self, state: dict) -> None:
        """Continue from `state`.

        Args:
            state: from `state`, with the number of finished epochs as "epoch". It is 0 if the state of a new run is
                handed from one process to another.

        Raises:
            SetupError: a part of the state could not be saved, or the state belongs to other classes.
        """
        self._saved.load(state)
        self.schedule.load_state(state.get("schedule", {}))
        self._trained = bool(state.get("epoch")) and not state.get("untrained", False)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
