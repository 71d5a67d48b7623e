"""From a config to the objects of a run.

1. `check` compares the config with the signatures of the classes that it names. Nothing is built.
2. `assemble` builds model, method and optimizer, and runs the model once on random inputs. No data is loaded.
3. `open_batches` loads the data, and evaluates each split's first samples once.

So most mistakes appear in the first second, before a folder is made or data is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import nn

from mtl.archs.check import check_model
from mtl.archs.model import ArchError, HardSharing, Model, Outputs, count_macs, takes
from mtl.archs.restore import as_before
from mtl.config import schema
from mtl.config.source import blame
from mtl.data.base import Benchmark, build_benchmark
from mtl.data.batches import EvaluationBatches, TrainingBatches, ready
from mtl.data.check import check_tasks, few
from mtl.engine.backward import Switches
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.engine.stages import check_stages
from mtl.engine.stopping import check_patience
from mtl.errors import ConfigError, SetupError, one_line
from mtl.inspect.microscope import Microscope
from mtl.losses import Equal, Strategy
from mtl.losses.hooks import defines, needs_features, reads_features
from mtl.optim.schedules import Schedule
from mtl.parallel.processes import Processes
from mtl.random import seeded, stream
from mtl.tasks import Task

# The nodes of a config, with the arguments that the engine adds. A config must not give these: loss.tasks, for example,
# comes from the data.
NODES: dict[str, tuple[str, ...]] = {
    "data": (),
    "arch": ("in_channels", "in_shapes", "tasks"),
    "sharing": ("backbone", "build_backbone", "tasks", "shapes"),
    "loss": ("tasks",),
    "optimizer": ("params",),
    "schedule": (),
    "step": (),
    "microscope": (),
    "trainer": (),
    "logger": (),
    "study": (),
}


def _root(seed: Annotated[int, Ge(0)], output_root: str, data: dict, arch: dict, sharing: dict, loss: dict,
          optimizer: dict, schedule: dict, step: dict, microscope: dict, trainer: dict, logger: dict,
          study: dict) -> None:  # fmt: skip
    """Never called. Its signature describes the config's top level, in the form in which classes describe nodes."""


def check(config: Mapping[str, Any]) -> None:
    """Compare the whole config with the signatures of the classes that it names.

    Nothing is built or written.

    Raises:
        ConfigError: the first mistake, such as an unknown argument or a number out of its range.
    """
    # An empty path would mean the current folder, but later the report would take it for a damaged file.
    if isinstance(root := config.get("output_root"), str) and not root.strip():
        raise ConfigError(f"output_root={root!r}: must name a folder; output_root=. is the current one")
    schema.check_arguments(_root, {key: {} if key in NODES else value for key, value in config.items()}, "")
    for name, supplied in NODES.items():
        schema.check(config.get(name), name, supplied)


def assemble(
    config: Mapping[str, Any], processes: Processes | None = None, facts: Mapping[str, Any] | None = None
) -> tuple[Benchmark, Learner]:
    """Build what a checked config describes, except its data and its tracker.

    Args:
        config: resolved and checked.
        processes: the processes that share the work; None if there is only this one.
        facts: what a run that is loaded has learnt from its data's files; see `Benchmark.facts`.

    Raises:
        UserError: two nodes do not fit each other, or the machine has no such device.
    """
    # A user's own class may draw from the global generators. Each object gets its own stream, so that another loss, for
    # example, does not change the model's initial weights.
    with seeded(config["seed"], "data"):
        benchmark = build_benchmark(config["data"], facts)
    with seeded(config["seed"], "loss"):
        strategy: Strategy = schema.build(config["loss"], "loss", tasks=[t.name for t in benchmark.tasks])
    # Some methods divide each batch, and every part needs a sample. See `parts`.
    if benchmark.batch_size < parts(strategy):
        name = type(strategy).__name__
        raise ConfigError(
            f"data.batch_size={benchmark.batch_size}: {name} divides a batch into {parts(strategy)} parts, none "
            f"of which may be empty; use {parts(strategy)} or more, and {2 * parts(strategy)} or more with batch norm"
        )
    # The single-task baseline (loss=single) trains one task of several. The others do not exist in such a run.
    tasks = [task for task in benchmark.tasks if task.name in strategy.names]
    _check_accuracies(strategy, tasks)
    trainer: Execution = schema.build(config["trainer"], "trainer")
    switches: Switches = schema.build(config["step"], "step")
    try:
        switches.check(strategy)
    except ValueError as error:  # it begins with the switch's name, which the prefix turns into a config key
        raise ConfigError(f"step.{error}") from error
    if (warmup := config["schedule"].get("warmup_epochs", 0)) >= trainer.epochs:
        raise ConfigError(f"schedule.warmup_epochs={warmup}: must be less than trainer.epochs={trainer.epochs}")
    # A method with lazy buffers keeps averages of the shared gradients; their length must not change between stages.
    keeps = type(strategy).__name__ if strategy.lazy else None
    check_stages(trainer.plan, [task.name for task in tasks], warmup, keeps)
    if processes is not None:
        trainer = replace(trainer, device=processes.device(trainer.device))  # cuda becomes cuda:0, cuda:1, …
    device = trainer.open_device()
    with trainer.flags():  # with the run's flags, the trial passes find operations that a deterministic run refuses
        learner = build_learner(config, benchmark, tasks, strategy, trainer, device, switches)
    if processes is not None:
        _divide(learner, benchmark, processes)
    return benchmark, learner


def _divide(learner: Learner, benchmark: Benchmark, processes: Processes) -> None:
    """Let several processes share the learner's work.

    Raises:
        ConfigError: the model cannot be divided among them, or not with this method.
    """
    model, strategy, switches = learner.model, learner.strategy, learner.switches
    if switches.parallel > 1 and learner.combines and not switches.of_features(strategy):
        raise ConfigError(
            f"step.parallel={switches.parallel}: torch cannot run a pass for several tasks at once where several "
            "processes exchange gradients; use step.parallel=1, or train it without torchrun"
        )
    # A model is divided at its features, or as a whole. The features of a whole one are not put together.
    if not takes(model, "run") and (_cuts(strategy, switches) or reads_features(strategy)):
        name, kind = type(strategy).__name__, type(model).__name__
        raise ConfigError(
            f"loss: {name} works on the features between backbone and heads, and several processes divide {kind} as a "
            "whole; use sharing=hard, or train it without torchrun"
        )
    batch = benchmark.example(2, torch.Generator().manual_seed(0))
    batch = {name: column.to(learner.device) for name, column in batch.items()}
    processes.check_model(model, learner.trainer.laid_out(batch), [task.name for task in learner.tasks])
    learner.processes = processes


def open_batches(benchmark: Benchmark, learner: Learner) -> tuple[TrainingBatches, dict[str, EvaluationBatches]]:
    """Load the data, and try the tasks on it: training batches, and evaluation batches of every other split.

    Raises:
        UserError: the data is missing or wrong, or a task's loss or metrics do not work on it.
    """
    with seeded(learner.seed, "load"):
        strategy, splits = learner.strategy, benchmark.splits()
    if "val" not in splits:
        _check_measured(learner)
    check_patience(learner, splits.get("val"), benchmark.select)
    # Batch norm cannot normalise a single sample, so each part of a batch needs two.
    smallest = 2 * parts(strategy)
    if len(splits["train"]) < smallest:
        raise ConfigError(f"data: {len(splits['train'])} training samples; batch norm needs at least {smallest}")
    train = TrainingBatches(splits["train"], benchmark, learner.device, learner.seed, smallest)
    # Try each task's loss and metrics on a few samples of each split. A mistake in a user's own task appears now, and
    # not after the first epoch. `as_before` puts the model back afterwards.
    for split in splits.values():
        # `few` includes samples without a label, which a user's own task is most likely to treat wrongly.
        columns = {name: column.to(learner.device) for name, column in few(split, learner.tasks).items()}
        with as_before(learner.model), learner.trainer.flags(), torch.no_grad():
            batch = ready(benchmark, columns)
            outputs = learner.model.eval()(batch)
            check_tasks(learner.tasks, outputs.predictions, batch)
    evaluations = {n: EvaluationBatches(s, benchmark, learner.device) for n, s in splits.items() if n != "train"}
    return train, evaluations


def _check_accuracies(strategy: Strategy, tasks: list[Task]) -> None:
    """Raises:
    ConfigError: the method needs accuracies, and a task's main metric is an error.
    """
    errors = [f"{task.name}_{task.scores[0].name}" for task in tasks if not task.scores[0].higher_is_better]
    if strategy.needs_accuracies and errors:
        raise ConfigError(
            f"loss: {type(strategy).__name__} needs accuracies, and the main metric {errors[0]} is an error; use "
            "loss=amtl, which takes both kinds"
        )


def _check_measured(learner: Learner) -> None:
    """Check that training without validation data measures the metrics which the method or the schedule reads.

    Raises:
        ConfigError: one of them is not measured on training batches.
    """
    mains = [f"{t.name}_{t.scores[0].name}" for t in learner.tasks]
    skipped = [f"{t.name}_{s.name}" for t in learner.tasks for m in t.metrics if not m.training for s in m.scores]
    strategy, schedule = learner.strategy, learner.schedule
    for one, names in (strategy, mains if strategy.reads_scores else ()), (schedule, schedule.reads(mains)):
        if found := [name for name in names if name in skipped]:
            raise ConfigError(
                f"{'loss' if one is strategy else 'schedule'}: {type(one).__name__} reads {found[0]}, which is "
                "measured on validation data only, and there is none; set data.val_fraction=0.1"
            )


def parts(strategy: Strategy) -> int:
    """The number of parts into which a step divides its batch: 1 for most methods, 2 for Auto-Lambda and MoDo."""
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
    """Build model and optimizer on the device, and put all parts into a `Learner`.

    The initial weights depend on the seed alone. So two methods with the same seed start from the same weights.

    Raises:
        ConfigError: the architecture does not fit the images, the microscope does not fit the batches, or the optimizer
            refuses its arguments.
        SetupError: no parameter of the model can be trained.
    """
    microscope: Microscope = schema.build(config["microscope"], "microscope")
    try:
        microscope.check(benchmark.batch_size, [t.name for t in tasks])
    except ValueError as error:
        raise ConfigError(f"microscope.{error}") from error
    seed = config["seed"]
    with seeded(seed, "schedule"):
        schedule: Schedule = schema.build(config["schedule"], "schedule")
    try:
        schedule.check(
            [f"{t.name}_{name}" for t in tasks for name in ("loss", *(s.name for s in t.scores))], len(tasks)
        )
    except ValueError as error:
        raise ConfigError(f"schedule.{error}") from error
    with seeded(seed, "init"):
        # The trial pass has two samples, because batch norm refuses one. It has one only if the run's batches do.
        size = max(1, min(2, benchmark.batch_size // parts(strategy)))
        model, outputs = _build_model(config, benchmark, tasks, trainer, size)
        _check_features(model, outputs, strategy, tasks, switches or Switches())
        # RotoGrad, for example, makes a rotation matrix for each task. It needs the width of the features.
        if outputs.features is not None:
            strategy.prepare(outputs.features[0].numel())
    if not any(p.requires_grad for p in model.parameters()):
        raise SetupError("arch: every parameter of the model is frozen (requires_grad=False); nothing would be trained")
    model, strategy = trainer.place(model, device), strategy.to(device)
    groups, backbone = _parameter_groups(model, strategy, trainer.backbone_lr_factor)
    with seeded(seed, "optimizer"):
        optimizer = schema.build(config["optimizer"], "optimizer", params=groups)
    if backbone is not None:  # after the optimizer is built: the config may leave the rate to its class
        optimizer.param_groups[backbone]["lr"] *= trainer.backbone_lr_factor
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
    # Every step computes lr = initial_lr · schedule anew. So a resumed run cannot apply the schedule twice.
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Learner(trainer, model, tasks, strategy, optimizer, schedule, device, seed, switches, microscope)


def _parameter_groups(model: Model, strategy: Strategy, factor: float) -> tuple[list[dict[str, Any]], int | None]:
    """The optimizer's parameter groups.

    Args:
        factor: of the learning rate of the shared parameters.

    Returns:
        the groups: the model (without a backbone of another rate), maybe the backbone, maybe the method's own
        parameters, such as the log variances of uncertainty weighting; and the number of the backbone's group.

    Raises:
        ConfigError: the backbone can have no rate of its own.
    """
    groups, backbone = [{"params": list(model.parameters())}], None
    if factor != 1:
        key = f"trainer.backbone_lr_factor={factor:g}"
        shared = list(model.shared_parameters())
        if not any(p.requires_grad for p in shared):
            raise ConfigError(f"{key}: the model has no shared parameter that learns; leave it at 1")
        if defines(strategy, "look_ahead"):
            name = type(strategy).__name__
            raise ConfigError(f"{key}: {name} tries steps out with one rate for all parameters; leave it at 1")
        taken = {id(p) for p in shared}
        groups = [{"params": [p for p in model.parameters() if id(p) not in taken]}, {"params": shared}]
        # The decoders come first, because the first group's rate is the one that is logged.
        groups = [group for group in groups if group["params"]]
        backbone = len(groups) - 1
    if own := list(strategy.parameters()):
        # They may have their own rate, and by default no weight decay: it would pull the log variances to 0. None
        # follows the optimizer's setting.
        settings = {"lr": strategy.lr, "weight_decay": strategy.weight_decay}
        groups.append({"params": own, **{k: v for k, v in settings.items() if v is not None}})
    return groups, backbone


def _build_model(
    config: Mapping[str, Any], benchmark: Benchmark, tasks: list[Task], trainer: Execution, size: int
) -> tuple[Model, Outputs]:
    """Build the model, and run it on `size` random samples.

    Returns:
        the model, and its outputs for the samples.

    Raises:
        ConfigError: the model fails on inputs of the data's shapes, or its outputs do not fit the tasks.
    """
    node, first = config["arch"], next(iter(benchmark.inputs.values()))
    parameters = inspect.signature(schema.locate(node[schema.TARGET], f"arch.{schema.TARGET}")).parameters
    # A class gets the engine's arguments only if its signature has them. A user's own network may need neither.
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    supplied: dict[str, Any] = {}
    if takes_all or "in_channels" in parameters:
        supplied["in_channels"] = first.shape[0]
    if "in_shapes" in parameters:
        supplied["in_shapes"] = {name: one.shape for name, one in benchmark.inputs.items()}
    if "tasks" in parameters:
        supplied["tasks"] = tasks
    built = schema.build(node, "arch", **supplied)
    if isinstance(built, Model) and not shares_hard(config):
        scheme, kind = config["sharing"][schema.TARGET].rpartition(".")[2], type(built).__name__
        raise ConfigError(f"sharing: {scheme} needs a backbone, and arch={kind} is a whole model; use sharing=hard")
    batch = benchmark.example(size, stream(0, "arch_check"))
    try:
        # A plain backbone becomes a model of the sharing scheme. A `Model` brings its own heads.
        model = built
        if not isinstance(built, Model):
            spare = [built]  # the first copy; a scheme of several backbones builds the others

            def build_backbone() -> Any:
                return spare.pop() if spare else schema.build(node, "arch", **supplied)

            shapes = {name: one.shape for name, one in benchmark.inputs.items()}
            model = _share(config["sharing"], built, build_backbone=build_backbone, tasks=tasks, shapes=shapes)
        if missing := [name for name in model.inputs if name not in batch]:
            name, columns = type(model.trunk).__name__, ", ".join(batch)
            raise ArchError(
                f"{name} reads {missing[0]}; the data has {columns}; a network names what it reads in `inputs`"
            )
        count_macs(model, benchmark.one())
        return model, check_model(model, trainer.laid_out(batch), [task.name for task in tasks])
    except ConfigError:
        raise
    except ArchError as error:
        raise ConfigError(f"arch: {error}") from error
    except Exception as error:  # whatever a user's own module raises
        shape = "; ".join("x".join(map(str, one.shape)) for one in benchmark.inputs.values())
        kind, known = type(error).__name__, isinstance(error, ValueError | RuntimeError)
        what = one_line(error) if known else f"{kind}: {one_line(error)}"
        raise ConfigError(f"arch: does not fit the inputs of data ({shape}): {what}{blame(error)}") from error


def shares_hard(config: Mapping[str, Any]) -> bool:
    """Whether the sharing scheme is the default."""
    return schema.locate(config["sharing"][schema.TARGET], f"sharing.{schema.TARGET}") is HardSharing


def _share(node: Mapping[str, Any], backbone: Any, **supplied: Any) -> Model:
    """The model of a sharing scheme, which gets those arguments that its signature has.

    Raises:
        ArchError: the backbone is no module, or the scheme cannot use it.
        ConfigError: the scheme refuses one of its own arguments.
    """
    if not isinstance(backbone, nn.Module):
        raise ArchError(f"a {type(backbone).__name__} was built; a torch.nn.Module is needed")
    scheme, options = schema.locate(node[schema.TARGET], f"sharing.{schema.TARGET}"), dict(node)
    del options[schema.TARGET]
    supplied["backbone"] = backbone
    named = inspect.signature(scheme).parameters
    try:
        model = scheme(**options, **{k: v for k, v in supplied.items() if k in named})
    except ValueError as error:
        # Our constructors begin their messages with the wrong argument. All else is about the backbone.
        if str(error).partition(":")[0] in options:
            raise ConfigError(f"sharing.{error}") from error
        raise
    if not isinstance(model, Model):
        raise ConfigError(f"sharing: {type(model).__name__} is no mtl.archs.model.Model")
    return model


def _cuts(strategy: Strategy, switches: Switches) -> bool:
    """Whether the step comes between features and heads: it changes what heads see, or takes features' gradients."""
    return strategy.flat or defines(strategy, "views") or switches.of_features(strategy)


def _check_features(model: Model, outputs: Outputs, strategy: Strategy, tasks: list[Task], switches: Switches) -> None:
    """Check that the model has the features that the method needs, such as a vector for each sample.

    Raises:
        ConfigError: the model has no features, or they have another shape, or heads without parameters.
    """
    # Most methods need no features at all.
    name, kind = type(strategy).__name__, type(model.trunk).__name__  # for the messages
    cut = _cuts(strategy, switches)
    if not cut and not needs_features(strategy):
        return
    if outputs.features is None or (cut and not takes(model, "views")):
        raise ConfigError(f"loss: {name} works on the features between backbone and heads, and {kind} has none")
    if strategy.flat and outputs.features.ndim != 2:
        shown = ", ".join(map(str, outputs.features.shape[1:]))
        raise ConfigError(f"loss: {name} needs features (N, F), a vector for each sample; {kind} has (N, {shown})")
    if defines(strategy, "views") and not all(list(model.own_parameters(t.name)) for t in tasks):
        raise ConfigError(f"loss: {name} rotates the heads' features; every head needs parameters to follow")
