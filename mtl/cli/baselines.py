"""Single-task baselines: the same config with another loss. A finished baseline is found by its identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mtl.config import schema
from mtl.config.identity import identify
from mtl.data.base import build_benchmark
from mtl.data.check import check_shapes
from mtl.engine.backward import Switches
from mtl.engine.directory import RunDirectory
from mtl.errors import ConfigError

AUTO, SINGLE = "auto", "mtl.losses.Single"
Command = tuple[dict[str, Any], dict[str, str], list[str]]  # config, chosen options, overrides as typed


def single_tasks(config: Mapping[str, Any], choices: Mapping[str, str], words: list[str]) -> list[Command]:
    """The single-task runs to compare a run with, one for each task; none if it is a single-task run itself.

    Raises:
        ConfigError: the data node is wrong.
    """
    if isinstance(config.get("loss"), Mapping) and config["loss"].get(schema.TARGET) == SINGLE:
        return []
    schema.check(config.get("data"), "data")
    return [single_task(config, choices, words, task.name) for task in build_benchmark(config["data"]).tasks]


def single_task(config: Mapping[str, Any], choices: Mapping[str, str], words: list[str], task: str) -> Command:
    """`config` with loss=single for `task`. The step's switches are at their defaults: one task needs no weights."""
    kept = [w for w in words if w.lstrip("+~").partition("=")[0].partition(".")[0] not in ("loss", "step", "study")]
    alone = {
        **config,
        "loss": {schema.TARGET: SINGLE, "task": task},
        "step": {schema.TARGET: "mtl.engine.backward.Switches", **asdict(Switches())},
    }
    return alone, {**choices, "loss": "single", "step": "default"}, [*kept, "loss=single", f"loss.task={task}"]


def fill(config: Mapping[str, Any], choices: Mapping[str, str]) -> dict[str, Any]:
    """Replace `auto` in the loss by the results of finished single-task runs (AMTL, PIVRG).

    A result is the task's main metric at the last epoch, with the same seed. It comes from the validation data, or from
    the training batches if there is no validation data. The method sees the same metric of its own run. It never comes
    from the test set.

    Raises:
        ConfigError: such a run is missing, or ended with a value that the method cannot take, such as 0.
    """
    loss = config.get("loss")
    if not isinstance(loss, Mapping) or AUTO not in loss.values():
        return dict(config)
    method = schema.locate(loss.get(schema.TARGET), f"loss.{schema.TARGET}")
    key = getattr(method, "single_task_argument", None)
    if key is None or loss.get(key) != AUTO:
        return dict(config)
    schema.check(config.get("data"), "data")
    results, hint = {}, schema.hints_of(method).get(key)
    benchmark = build_benchmark(config["data"])
    for task in benchmark.tasks:
        alone, chosen, _ = single_task(config, choices, [], task.name)
        directory = RunDirectory(identify(alone, chosen).directory(config["output_root"]))
        name = f"{task.name}_{task.scores[0].name}"
        if directory.run.get("status") == "finished":
            check_shapes(directory.run.get("inputs"), benchmark, directory.path)
            last = directory.rows()[-1]
            measured = [last[one] for one in (f"val/{name}", f"train/{name}") if one in last]
            if not measured:
                raise ConfigError(
                    f"loss.{key}=auto: {name} is measured on validation data only, and there is none; set "
                    "data.val_fraction=0.1"
                )
            wrong = "must not be 0" if measured[0] == 0 else schema.complaint(hint, {task.name: measured[0]})
            if wrong:
                raise ConfigError(
                    f"loss.{key}=auto: the single-task run of {task.name} ended with {name} {measured[0]:.4g}, which "
                    f"{wrong.partition(' or ')[0]}; train the single tasks for longer, or give the numbers: "
                    f"'loss.{key}={{{task.name}: NUMBER, …}}'"
                )
            results[task.name] = measured[0]
        elif config["study"].get("plan"):
            results[task.name] = 1.0  # good enough to time a step
        else:
            raise ConfigError(
                f"loss.{key}=auto: no finished single-task run of {task.name} in {directory.path}; add "
                f"study.baselines=auto to train it, or give the numbers: 'loss.{key}={{{task.name}: NUMBER, …}}'"
            )
    return {**config, "loss": {**loss, key: results}}
