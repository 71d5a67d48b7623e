"""The header before a run's first epoch and the footer after its last."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mtl.archs.model import count_macs, count_parameters
from mtl.config.identity import Identity
from mtl.data.base import Benchmark
from mtl.data.check import has_labels
from mtl.data.columns import Split
from mtl.engine.directory import RunDirectory
from mtl.engine.learner import Learner
from mtl.engine.stages import Stage
from mtl.engine.summary import selection
from mtl.losses import LossWeighting
from mtl.tasks import Task
from mtl.tracking.console import Heading, count, duration, rate, table

log = logging.getLogger("mtl")

MANY = 6  # tasks: the lines of more are shortened
NAMES = {"train": "training", "val": "validation"}  # of splits, in messages


def header(config: Mapping[str, Any], identity: Identity, benchmark: Benchmark, learner: Learner,
           splits: Mapping[str, Split], labels: Mapping[str, int], steps: int, path: str, tracker: str, resumed: int,
           ) -> None:  # fmt: skip
    """Log what will be trained, before the first epoch.

    Args:
        config, identity, benchmark, learner: the run's.
        splits: the data, "train" among it.
        labels: number of training samples with a label, of each task that some sample lacks.
        steps: number of steps in an epoch.
        path: the run's directory.
        tracker: the tracker's own line, such as the address of a dashboard.
        resumed: number of epochs that are already done.
    """
    trainer, strategy, optimizer = learner.trainer, learner.strategy, config["optimizer"]
    own = sum(p.numel() for p in strategy.parameters())
    samples = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    heads = "" if isinstance(strategy, LossWeighting) else f", heads: {strategy.heads} gradient"
    each = f"{'an' if benchmark.noun[0] in 'aeiou' else 'a'} {benchmark.noun}"
    most = "at most " if trainer.patience is not None else ""
    lines = {
        "run": identity.title,
        "data": f"{identity.data}: {samples}; {_tasks(learner.tasks)}",
        "labels": _labels(labels, len(splits["train"]), benchmark.noun),
        "model": f"{identity.arch}: {count_parameters(learner.model):,} parameters, "
        f"{count_macs(learner.model, benchmark.one()) / 1e6:,.1f} MMAC {each}",
        "strategy": f"{identity.loss} ({strategy.family}{heads}{f', {own} own parameters' if own else ''})",
        "training": f"{most}{count(trainer.epochs, 'epoch')} of {count(steps, 'step')}, batch {benchmark.batch_size}, "
        f"{optimizer['_target_'].rpartition('.')[2]} lr {optimizer.get('lr', 'default')}, "
        f"{config['schedule']['_target_'].rpartition('.')[2].lower()} schedule",
        "stages": "; ".join(map(_stage, trainer.plan)) if trainer.stages else "",
        "micro": learner.microscope.describe(
            len(learner.tasks),
            learner.passes,
            learner.one_jacobian,
            learner.alternates,
            steps,
            benchmark.batch_size,
            sum(p.numel() * p.element_size() for p in learner.model.shared_parameters() if p.requires_grad),
        ),
        "device": f"{_device_name(learner.device)}, {trainer.precision}"
        + (f"; {processes.size} processes with a part of each batch" if (processes := learner.processes) else ""),
        "output": path,
        "tracker": tracker,
        "resumed": f"after epoch {resumed}" if resumed else "",
    }
    for key, value in lines.items():
        if value:
            log.info(Heading(key, value))
    if trainer.slow_precision(learner.device):
        log.info("WARNING   this CPU has no bf16 instructions: trainer.precision=fp32 is about 10x faster here")
    for line in unlabelled(learner.tasks, splits, benchmark.select):
        log.info(f"WARNING   {line}")


def unlabelled(tasks: Sequence[Task], splits: Mapping[str, Split], select: str) -> Iterator[str]:
    """A line for each split in which no sample has a label of some task. Such a run is valid, but its table has nan.

    Args:
        tasks: of the run.
        splits: the data by name.
        select: the benchmark's, as for `mtl.engine.summary.selection`.
    """
    chosen = selection(tasks, "val" in splits, select)
    for name, split in splits.items():
        lacking = [task for task in tasks if not has_labels(split, task)]
        if not lacking:
            continue
        # "test/mean" is a mean over the tasks that have labels.
        mains = {f"{name}/{task.name}_{task.scores[0].name}" for task in lacking}
        lost = f", and {chosen.by} cannot choose the best epoch: the first one counts as the best"
        effect = "untrained in this run" if name == "train" else f"nan in the {name} results"
        yield (
            f"no {NAMES.get(name, name)} sample has a label of {_listed([t.name for t in lacking])}: {effect}"
            f"{lost if mains >= set(chosen.keys) else ''}"
        )


def footer(summary: Mapping[str, Any], epochs: int, directory: RunDirectory, command: str, noun: str,
           tasks: Sequence[Task]) -> None:  # fmt: skip
    """Log the results, and the command that repeats the run.

    Args:
        summary: the run's results, as in summary.json.
        epochs: number of trained epochs.
        directory: the run's directory.
        command: the command that repeats the run.
        noun: what a sample of the data is called.
        tasks: of the run.
    """
    chosen = summary["selected"]
    header = ["test", "best", "at epoch", f"last ({epochs})", *([f"by {chosen['by']}"] if chosen else [])]
    kinds = _kinds(tasks) if len(tasks) > MANY else {key.removeprefix("test/"): [key] for key in summary["best"]}
    log.info(table(header, [_results(name, keys, summary, chosen) for name, keys in kinds.items()]))
    speed = f"{rate(summary['images_per_second'], noun)} in training"
    speed += f", peak memory {summary['peak_memory_gib']:.2f} GiB"
    files = "last.pt and best.pt" if directory.best.is_file() else "last.pt (best.pt is missing)"
    log.info(f"{duration(summary['seconds'])}, {speed}; checkpoints {files} in {directory.path}")
    log.info(f"reproduce: {command}")


def _kinds(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """{"mean accuracy of 40 tasks": keys in the summary, …}: metrics of one name and one unit have a mean."""
    found: dict[tuple[str, str], list[str]] = {}
    for task in tasks:
        for score in task.scores:
            found.setdefault((score.name, score.unit), []).append(f"test/{task.name}_{score.name}")
    names = [name for name, _ in found]
    kinds = {}
    for (name, unit), keys in found.items():
        shown = f"{name} ({unit.strip()})" if names.count(name) > 1 and unit else name
        kinds[f"mean {shown} of {len(keys)} tasks" if len(keys) > 1 else keys[0].removeprefix("test/")] = keys
    return kinds


def _results(name: str, keys: Sequence[str], summary: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> list[str]:
    """One line of the table: a metric, or the mean of several."""
    best = [summary["best"][key] for key in keys]
    columns = [[summary["last"][k] for k in keys], *([[chosen[k] for k in keys]] if chosen else [])]
    epoch = str(best[0]["epoch"]) if len(keys) == 1 else "each its own"
    return [name, _mean([b["value"] for b in best]), epoch, *map(_mean, columns)]


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if value == value]  # not NaN
    left = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{sum(known) / len(known):.4g}{left}" if known else "–"


def _tasks(tasks: Sequence[Task], most: int = MANY) -> str:
    named = [f"{task.name} ({task.outputs})" for task in tasks]
    return f"{'' if len(named) <= most else f'{len(named)} '}tasks {_listed(named, most)}"


def _listed(names: Sequence[str], most: int = MANY) -> str:
    return ", ".join(names if len(names) <= most else [*names[: most - 1], "…", names[-1]])


def _labels(labels: Mapping[str, int], size: int, noun: str) -> str:
    if not labels:
        return ""
    named = ", ".join(f"{task} {number:,}" for task, number in labels.items())
    if len(labels) > MANY:
        low, high = min(labels.values()), max(labels.values())
        named = f"{len(labels)} tasks {f'{low:,}' if low == high else f'{low:,} to {high:,}'}"
    return f"{named} of {size:,} training {noun}s"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({count(torch.get_num_threads(), 'thread')})"


def _stage(stage: Stage) -> str:
    tasks = "" if stage.tasks is None else f" of {', '.join(stage.tasks)}"
    rate = "" if stage.lr is None else f" at lr {stage.lr:g}"
    return f"{count(stage.epochs, 'epoch')}{tasks}, {' and '.join(stage.train)} learn{rate}"
