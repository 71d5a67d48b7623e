"""Stages of a training: for how long which tasks count, and which parameters learn.

Example: 50 epochs of two tasks, then 20 epochs of a third task's head on the frozen backbone::

    trainer.epochs=70 "trainer.stages=[{epochs: 50, tasks: [digit, odd]}, {epochs: 20, tasks: [ink], train: [ink]}]"

A stage is two masks: a task that does not count is absent from every batch, and a parameter that does not learn has
`requires_grad=False`. The optimizer's state and the schedule begin anew with each stage. The epoch number runs on, so
random draws and resuming need nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt

from mtl.config import schema
from mtl.errors import ConfigError, suggest

SHARED, HEADS = "shared", "heads"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        epochs: how long it lasts.
        tasks: names of the tasks whose losses count; None for all.
        train: what learns: "shared" (the shared parameters), "heads" (each task's own), or names of tasks.
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
        """Whether the task's own parameters learn; None asks for the shared ones."""
        return SHARED in self.train if task is None else HEADS in self.train or task in self.train


def read_stages(given: Sequence[Mapping[str, Any]], epochs: int) -> tuple[Stage, ...]:
    """The stages of a config; one stage of all `epochs` where none is given.

    Raises:
        ConfigError: a stage is not described as above, or the stages have another number of epochs in all.
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
    """Compare the stages with what a run trains.

    Args:
        tasks: names of the run's tasks.
        warmup: epochs of warm-up, which each stage begins with.
        keeps: name of the method if it keeps averages of gradients from step to step, else None.

    Raises:
        ConfigError: a name is unknown, a stage trains nothing or is no longer than the warm-up, or the method needs the
            same shared parameters throughout.
    """
    for i, stage in enumerate(stages):
        where = f"trainer.stages[{i}]"
        for key, names, known in (("tasks", stage.tasks or (), tasks), ("train", stage.train, (SHARED, HEADS, *tasks))):
            for name in names:
                if name not in known:
                    raise ConfigError(f"{where}.{key}: {name!r} is none of {', '.join(known)}{suggest(name, known)}")
        if not any(stage.counts(task) for task in tasks) or not any(map(stage.learns, [None, *tasks])):
            raise ConfigError(f"{where}: trains nothing; name at least one task, and something that learns")
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
    """The stage that epoch number `epoch` belongs to, and the stage's first epoch; counted from 0."""
    first = 0
    for stage in stages:
        if epoch < first + stage.epochs:
            return stage, first
        first += stage.epochs
    return stages[-1], first - stages[-1].epochs
