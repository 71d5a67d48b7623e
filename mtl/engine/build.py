"""From a config to the objects of a run: checked, built, and tried out on each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge

from mtl.archs.check import ArchError, as_before, check_model
from mtl.archs.model import MultiTaskModel, count_macs
from mtl.config import schema
from mtl.config.source import blame
from mtl.data.base import Benchmark, build_benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches, move
from mtl.data.check import check_tasks, few
from mtl.engine.backward import Switches
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.errors import ConfigError, SetupError, one_line
from mtl.inspect.microscope import Microscope
from mtl.losses import Equal, Strategy
from mtl.losses.hooks import defines
from mtl.parallel.processes import Processes
from mtl.random import seeded, stream
from mtl.tasks import Task

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
    trainer: Execution = schema.build(config["trainer"], "trainer")
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
    with trainer.flags():  # what a deterministic run refuses, the trial passes find
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
        with as_before(learner.model), learner.trainer.flags(), torch.no_grad():
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
    trainer: Execution,
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
    seed = config["seed"]
    with seeded(seed, "schedule"):
        schedule = schema.build(config["schedule"], "schedule")
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


def _build_model(config, benchmark: Benchmark, tasks: list[Task], trainer: Execution, size: int) -> MultiTaskModel:
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
