"""A trained run in use: its model, tasks and preprocessing from its folder. Tensors are read, and no code is run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mtl import __version__
from mtl.archs.model import Model
from mtl.archs.weights import replaced
from mtl.config.identity import CONF, TARGET, own_parts, owner, today
from mtl.data.base import Benchmark
from mtl.data.batches import ready
from mtl.engine.build import NODES, assemble, check
from mtl.engine.directory import RunDirectory
from mtl.engine.files import read_regular
from mtl.engine.learner import Learner
from mtl.engine.resume import opened
from mtl.errors import ConfigError, SetupError, UserError, one_line, suggest
from mtl.random import seeded
from mtl.tasks import Task

EPOCHS = ("best", "last")
# Nodes that the configs of old runs lack, and the options that do what was done.
YOUNGER = {"sharing": "hard", "step": "default", "microscope": "default", "study": "default"}


@dataclass(frozen=True)
class LoadedRun:
    """A run's model, with all that is needed to use it.

    Attributes:
        directory: of the run.
        name: of the run, such as resnet56-dwa-s0-1a2b3c4d.
        epoch: after how many epochs these weights were saved.
        config: resolved, as plain Python objects.
        benchmark: the data set's description, with the preprocessing of its inputs; nothing of the data is read.
        learner: the model and the method, which may change what the decoders see.
    """

    directory: Path
    name: str
    epoch: int
    config: dict[str, Any] = field(repr=False)
    benchmark: Benchmark = field(repr=False)
    learner: Learner = field(repr=False)

    @property
    def model(self) -> Model:
        """In evaluation mode, on the device: a batch of ready inputs, {"image": (N, C, H, W), …} → predictions.

        Called by itself it leaves out what a method does between the backbone and the heads (RotoGrad turns the
        features). `predict` does not.
        """
        return self.learner.model

    @property
    def tasks(self) -> list[Task]:
        """In the order of the model's predictions."""
        return self.learner.tasks

    def predict(self, inputs: Any) -> dict[str, dict[str, Tensor]]:
        """What a user reads of the predictions.

        Args:
            inputs: what the data set stores: uint8 images (N, H, W, C), or {column: tensor or array}.

        Returns:
            {task: {answer: (N, …) on the CPU}}. A class has the answers "class" and "probability", a number the answer
            "number"; see `mtl.tasks.Task.answers`.

        Raises:
            ConfigError: the inputs are not what the model reads.
        """
        columns, learner = self._columns(inputs), self.learner
        found: dict[str, dict[str, list[Tensor]]] = {task.name: {} for task in self.tasks}
        size = len(next(iter(columns.values())))
        with seeded(learner.seed, "predict"), learner.trainer.flags(), torch.inference_mode():
            for start in range(0, size, self.benchmark.eval_batch_size):
                part = slice(start, start + self.benchmark.eval_batch_size)
                batch = ready(self.benchmark, {name: c[part].to(learner.device) for name, c in columns.items()})
                for task, prediction in zip(self.tasks, learner.predict(batch).predictions, strict=True):
                    for key, value in _answers(task, prediction).items():
                        found[task.name].setdefault(key, []).append(value.cpu())
        # A clone, since nobody can train on a tensor of inference mode.
        return {task: {k: torch.cat(parts).clone() for k, parts in kinds.items()} for task, kinds in found.items()}

    def _columns(self, inputs: Any) -> dict[str, Tensor]:
        expected = self.benchmark.inputs
        if not isinstance(inputs, Mapping):
            if len(expected) > 1:
                raise ConfigError(f"inputs: the model reads {', '.join(expected)}; a dict of these columns is needed")
            inputs = {next(iter(expected)): inputs}
        if missing := [name for name in expected if name not in inputs]:
            hint = suggest(missing[0], map(str, inputs))
            raise ConfigError(f"inputs: {missing[0]} is missing; the model reads {', '.join(expected)}{hint}")
        columns = {}
        for name, one in expected.items():
            try:
                columns[name] = one.read(inputs[name])
                one.check(columns[name])
            except (ValueError, TypeError, RuntimeError) as error:
                raise ConfigError(f"inputs: {name}: {one_line(error)}") from error
        sizes = {len(column) for column in columns.values()}
        if len(sizes) > 1:
            shown = ", ".join(f"{len(column)} of {name}" for name, column in columns.items())
            raise ConfigError(f"inputs: the columns must have the same number of rows, not {shown}")
        if sizes == {0}:
            raise ConfigError("inputs: there are no samples")
        return columns


def load(
    run: str | os.PathLike[str],
    epoch: str = "best",
    device: str = "cpu",
    data: Mapping[str, Any] | None = None,
) -> LoadedRun:
    """The trained model of a run.

    Args:
        run: the run's folder, such as outputs/digits/resnet20/dwa/1a2b3c4d/seed0.
        epoch: "best", of the main metric, or "last".
        device: as trainer.device: cpu, cuda, cuda:1, mps or auto.
        data: options of the data set that are to be others than in training, by key.

    Raises:
        UserError: there is no such run, one of its files is damaged, or this version or machine cannot build it.
    """
    path = Path(run)
    if epoch not in EPOCHS:
        raise ConfigError(f"epoch: {epoch!r} is none of {', '.join(EPOCHS)}")
    info, config = _saved(path)
    if data:
        config["data"] = {**config["data"], **data}
    config["trainer"] = {**config["trainer"], "device": device}
    file = path / f"{epoch}.pt"
    if not os.path.lexists(file):
        other = [e for e in EPOCHS if os.path.lexists(path / f"{e}.pt")]
        raise SetupError(
            f"{path} has no {file.name}" + (f"; use epoch={other[0]}" if other else ": it has not trained")
        )
    saved = opened(file, info["name"], "restore it, or delete the run's folder and train again")
    _warn_of_changes(info, config, path)
    made = info.get("versions", {}).get("mtl", "an unknown version") if isinstance(info.get("versions"), dict) else "?"
    versions = f"the run was made by mtl {made}, and this is {__version__}"
    try:
        check(config)
        with replaced():
            # Another class of data has its own facts.
            facts = info.get("facts") if TARGET not in (data or {}) else None
            benchmark, learner = assemble(config, facts=facts)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
    if why := saved.pop("unsavable", None):
        warnings.warn(f"{file}: {why}; in the loaded model it is as at the start of training", stacklevel=3)
    try:
        learner.load_state(saved)
    except Exception as error:  # whatever torch or a method says to a state of another shape
        text = one_line(error)
        raise SetupError(f"{file} does not fit its config.yaml ({text[:160]}); {versions}") from error
    learner.model.eval()
    learner.strategy.eval()
    return LoadedRun(path, info["name"], saved["epoch"], config, benchmark, learner)


def _saved(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and config.yaml of a run.

    Raises:
        SetupError: `path` is no run's folder, or one of them is damaged.
    """
    if not path.is_dir():
        wrong = "is no folder" if os.path.lexists(path) else "no such folder"
        raise SetupError(f"{path}: {wrong}; a run's folder is needed, such as outputs/digits/resnet20/dwa/…/seed0")
    info = RunDirectory(path).run
    if not isinstance(info.get("name"), str):
        if os.path.lexists(path / "run.json"):
            raise SetupError(f"{path / 'run.json'} is damaged: no name in it; the run's command writes it anew")
        below = next(path.glob("**/run.json"), None)
        hint = f"; the first of the runs below it is {below.parent}" if below else ""
        raise SetupError(f"{path} is no run's folder: there is no run.json in it{hint}")
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(read_regular(file).decode())
    except FileNotFoundError as error:
        raise SetupError(f"{file} is missing; restore it") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SetupError(f"{file} is damaged: {one_line(error)[:120]}; restore it") from error
    if not isinstance(config, dict):
        raise SetupError(f"{file} is damaged: it holds no config of a run; restore it")
    for node, option in YOUNGER.items():
        config.setdefault(node, yaml.safe_load((CONF / node / f"{option}.yaml").read_text()))
    if lacking := [node for node in NODES if not isinstance(config.get(node), dict)]:
        raise SetupError(f"{file} is damaged, or of another version: there is no {lacking[0]} in it; restore it")
    if not isinstance(config.get("seed"), int):
        raise SetupError(f"{file} is damaged: there is no seed in it; restore it")
    return info, today(config)


def _warn_of_changes(info: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Say which of the user's own modules are no longer what the run was trained with."""
    then = info.get("own") if isinstance(info.get("own"), dict) else {}
    for node, modules in own_parts(config).items():
        for module, digest in modules.items():
            before = then.get(node, {}).get(module, digest)
            if before != digest and owner(config[node], module) is None:
                warnings.warn(f"{module} was changed after {path} was trained with it", stacklevel=4)


def _answers(task: Task, prediction: Any) -> dict[str, Tensor]:
    found = task.answers(prediction)
    wrong: Sequence[str] = [k for k, value in found.items() if not isinstance(value, Tensor)]
    if wrong:
        kind = type(found[wrong[0]]).__name__
        raise ConfigError(
            f"task {task.name!r}: {type(task).__name__}.answers gives a {kind} as {wrong[0]}; a tensor is needed"
        )
    return found
