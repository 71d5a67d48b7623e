"""Stages of a training. Each stage has a number of epochs, the tasks that count, and the parameters that learn.

Example: 50 epochs of two tasks, then 20 epochs of a third task's head on the frozen backbone::

    trainer.epochs=70 "trainer.stages=[{epochs: 50, tasks: [digit, odd]}, {epochs: 20, tasks: [ink], train: [ink]}]"

A task that does not count is treated as absent from every batch. A parameter that does not learn has
`requires_grad=False`. The optimizer's state and the schedule start anew with each stage. The epoch number does not: so
random draws and resuming work as without stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt
from torch import nn

from mtl.archs.model import Model
from mtl.config import schema
from mtl.errors import ConfigError, suggest

SHARED, HEADS = "shared", "heads"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        epochs: number of epochs.
        tasks: names of the tasks whose losses count; None for all.
        train: the parameters that learn: "shared" (the shared ones), "heads" (all tasks' own), or names of tasks.
        lr: the optimizer's learning rate in this stage; None for `optimizer.lr`.
    """

    epochs: Annotated[int, Ge(1)]
    tasks: Sequence[str] | None = None
    train: Sequence[str] = (SHARED, HEADS)
    lr: Annotated[float, Gt(0)] | None = None

    def counts(self, task: str) -> bool:
        """Whether the task's loss counts."""
        return self.tasks is None or task in self.tasks

    def learns(self, task: str | None) -> bool:
        """Whether the own parameters of `task` learn; for None, whether the shared parameters do."""
        return SHARED in self.train if task is None else HEADS in self.train or task in self.train


def read_stages(given: Sequence[Mapping[str, Any]], epochs: int) -> tuple[Stage, ...]:
    """The stages of a config. If none are given: one stage with all `epochs`.

    Raises:
        ConfigError: a stage has an unknown or wrong argument, or the stages' epochs do not add up to `epochs`.
    """
    if not given:
        return (Stage(epochs),)
    stages = []
    for i, one in enumerate(given):
        if not isinstance(one, Mapping):
            raise ConfigError(f"trainer.stages[{i}]={one!r:.60}: must be an object, such as {{epochs: 50, tasks: [a]}}")
        schema.check_arguments(Stage, one, f"trainer.stages[{i}]")
        stages.append(Stage(**one))
    if (total := sum(stage.epochs for stage in stages)) != epochs:
        raise ConfigError(
            f"trainer.stages: {total} epochs in all, and trainer.epochs={epochs}; set trainer.epochs={total}"
        )
    return tuple(stages)


def check_stages(stages: Sequence[Stage], tasks: Sequence[str], warmup: int, keeps: str | None) -> None:
    """Check the stages against the run's tasks and method.

    Args:
        stages: the stages.
        tasks: names of the run's tasks.
        warmup: number of warm-up epochs, with which each stage begins.
        keeps: name of the method if it keeps averages of the shared gradients over steps, otherwise None.

    Raises:
        ConfigError: a name is unknown, or a stage trains nothing or is not longer than the warm-up. Or the method needs
            the same shared parameters in all stages.
    """
    for i, stage in enumerate(stages):
        where = f"trainer.stages[{i}]"
        for key, names, known in (("tasks", stage.tasks or (), tasks), ("train", stage.train, (SHARED, HEADS, *tasks))):
            for name in names:
                if name not in known:
                    raise ConfigError(f"{where}.{key}: {name!r} is none of {', '.join(known)}{suggest(name, known)}")
        if not any(stage.counts(task) for task in tasks) or not any(map(stage.learns, [None, *tasks])):
            raise ConfigError(f"{where}: trains nothing; name at least one task, and something that learns")
        # A loss that reaches nothing that learns has no gradient.
        if idle := [task for task in tasks if stage.counts(task) and not (stage.learns(None) or stage.learns(task))]:
            raise ConfigError(
                f"{where}: task {idle[0]} counts, but neither its head nor 'shared' learns; add {idle[0]} to train, or "
                "leave it out of tasks"
            )
        if warmup >= stage.epochs:
            raise ConfigError(
                f"schedule.warmup_epochs={warmup}: must be less than the {stage.epochs} epochs of {where}"
            )
    if keeps is not None and len({stage.learns(None) for stage in stages}) > 1:
        raise ConfigError(
            f"trainer.stages: {keeps} keeps averages of the shared parameters' gradients, which the stages freeze and "
            "unfreeze; train 'shared' in all stages or in none, or choose another loss"
        )


def stage_at(stages: Sequence[Stage], epoch: int) -> tuple[Stage, int]:
    """The stage of epoch number `epoch`, and the number of the stage's first epoch; both count from 0."""
    first = 0
    for stage in stages:
        if epoch < first + stage.epochs:
            return stage, first
        first += stage.epochs
    return stages[-1], first - stages[-1].epochs  # beyond the last epoch, the last stage goes on


def freeze(model: Model, tasks: Sequence[str], stage: Stage, trainable: Sequence[nn.Parameter]) -> None:
    """Freeze the parameters of `model` that do not learn in a stage, and unfreeze the others.

    Args:
        model: the run's model.
        tasks: names of the run's tasks.
        stage: the stage that begins, or goes on.
        trainable: the parameters that the user has not frozen. All others stay as they are.
    """
    learns = {id(p) for task in tasks if stage.learns(task) for p in model.own_parameters(task)}
    learns |= {id(p) for p in model.shared_parameters()} if stage.learns(None) else set()
    for p in trainable:
        p.requires_grad_(id(p) in learns)
    # requires_grad=False does not stop batch norm's running averages; evaluation mode does. Only a batch norm that the
    # stage froze is concerned: `frozen` leaves out parameters that the user froze.
    frozen = {id(p) for p in trainable} - learns
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if hasattr(module, "track_running_stats") and own and all(id(p) in frozen for p in own):
            module.eval()
