"""Checks of a user's own data set: its class attributes before anything is read, and then the result of `load`.

A wrong label raises no error in training, but spoils every metric. So every label is checked. Images may be
memory-mapped and large, so only their type and shape are checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl.config.source import blame
from mtl.data.columns import Batch, Column, Joined, Ragged, Split
from mtl.data.inputs import Image, Input, check_ragged
from mtl.errors import ConfigError, SetupError, UserError, one_line, suggest
from mtl.metrics.base import Metric, Score
from mtl.metrics.tally import Tally
from mtl.tasks import Task
from mtl.tasks.groups import check_alike
from mtl.tasks.predictions import each, tensors
from mtl.views import Augment

NAME = re.compile(r"\w[\w-]*")  # a task's name becomes a part of metric names, checkpoint keys and config keys
PIECE = 2**26  # bytes of a column that are checked together
INPUTS = 'inputs = {"image": mtl.data.inputs.Image(shape, mean, std)}'
AUGMENT = "augment = (mtl.views.Crop(padding), mtl.views.Flip())"
INSTEAD = {  # attributes of older versions, and their replacements, for the error message
    "image_shape": INPUTS, "mean": INPUTS, "std": INPUTS, "crop_padding": AUGMENT, "flip": AUGMENT,
}  # fmt: skip


def check_declared(benchmark: Any) -> None:
    """Check the class attributes of a Benchmark.

    Raises:
        ValueError: an attribute is missing or wrong; the message begins with its name.
    """
    fields = getattr(type(benchmark), "__dataclass_fields__", {})
    for name, now in INSTEAD.items():
        if hasattr(type(benchmark), name) and name not in fields:
            raise ValueError(f"{name}: no Benchmark has it any more; write {now}")
    for name in ("tasks", "inputs"):
        if not hasattr(type(benchmark), name) and not hasattr(benchmark, name):
            raise ValueError(f"{name}: missing; a Benchmark needs tasks and inputs")
    _check_names(benchmark.tasks)
    _check_select(benchmark)
    inputs, augment = benchmark.inputs, benchmark.augment
    if not isinstance(inputs, Mapping) or not inputs or not all(isinstance(one, Input) for one in inputs.values()):
        example = '{"image": mtl.data.inputs.Image((3, 32, 32), mean, std)}'
        raise ValueError(f"inputs: {inputs!r:.80}; a dict is needed, such as {example}")
    for task in benchmark.tasks:
        if task.column in inputs:
            raise ValueError(f"tasks: {task.name} has its labels in the column {task.column!r}, which is an input")
        # A shared column is moved once, for the first of its tasks.
        first = next(one for one in benchmark.tasks if one.column == task.column)
        if first.moves != task.moves:
            what = f"{first.name} and {task.name} share the column {task.column!r}, but move it differently"
            raise ValueError(f"tasks: {what} ({first.moves} and {task.moves}); give each a column of its own")
    if not _is_sequence(augment) or not all(isinstance(one, Augment) for one in augment):
        raise ValueError(f"augment: {augment!r:.80}; a tuple is needed, such as (mtl.views.Flip(),)")
    if len({type(one) for one in augment}) < len(augment):  # two of one kind would share a random stream
        raise ValueError(f"augment: {augment!r:.80}; each kind of view can occur once")
    if augment and not any(isinstance(one, Image) for one in inputs.values()):
        raise ValueError("augment: no input is an image; use ()")


def check_loaded(benchmark: Any, loaded: Any) -> None:
    """Check the result of a Benchmark's `load()`, before it is limited or divided.

    Raises:
        SetupError: there is no training or test split, or a split does not fit the tasks or the inputs.
    """
    where = f"data: {type(benchmark).__name__}.load()"
    if not isinstance(loaded, Mapping) or not all(isinstance(part, Split) for part in loaded.values()):
        kind = f"a {type(loaded).__name__}"
        if isinstance(loaded, Mapping | tuple | list):
            kind += " of " + ", ".join(
                type(x).__name__ for x in (loaded.values() if isinstance(loaded, Mapping) else loaded)
            )
        raise SetupError(f'{where} returned {kind}; {{"train": Split(…), "test": Split(…)}} is needed')
    if not {"train", "test"} <= set(loaded) <= {"train", "val", "test"}:
        raise SetupError(
            f"{where} returned the splits {_listed(loaded)}; needed are train, test, and val if there is one"
        )
    for name, split in loaded.items():
        try:
            _check_columns(split, benchmark)
            _check_rows(split)
            for task in benchmark.tasks:
                _check_labels(split, task, benchmark)
        except ValueError as error:
            raise SetupError(f"{where}: {name} split: {error}") from error


def shapes(benchmark: Any) -> dict[str, list[int]]:
    """{"image": [3, 288, 384]}: the shape of each input, for run.json."""
    return {name: list(one.shape) for name, one in benchmark.inputs.items()}


def check_shapes(noted: Any, benchmark: Any, run: Path) -> None:
    """Compare the data's inputs with those that a run was trained on.

    A data set may take the images' size from its files, and the folder of the files is no part of a run's identity.

    Args:
        noted: what `shapes` returned for the run; None for a run from before it was noted.
        benchmark: the data as it is now.
        run: the run's directory.

    Raises:
        ConfigError: a shape differs.
    """
    for name, shape in shapes(benchmark).items():
        before = noted.get(name, shape) if isinstance(noted, Mapping) else shape
        if before != shape:
            old, new = ("x".join(map(str, numbers)) for numbers in (before, shape))
            raise ConfigError(
                f"{run} was trained on inputs {name} of {old}, but the data has {new}; set another output_root, or the "
                "options of the data that say its size (such as data.height and data.width)"
            )


def few(split: Split, tasks: Sequence[Task]) -> Batch:
    """A small batch to try the tasks on: two samples (or one) and, for each task, the first sample without a label.

    Samples without a label are where a user's own loss or metric is most often wrong.
    """
    chosen = set(range(min(2, len(split))))
    for task in tasks:
        start = 0
        for part in pieces(split, task.column):
            missing = (~task.labelled(task.select(part))).nonzero()[:1].flatten()
            if len(missing):
                chosen.add(start + int(missing))
                break
            start += len(part)
    return split.batch(torch.tensor(sorted(chosen)))


def pieces(split: Split, column: str) -> Iterator[Column]:
    """The rows of one column, in pieces of about 64 MiB. So a memory-mapped column is never copied as a whole."""
    one, values = split.only([column]), split.columns[column]
    size = max(1, PIECE // max(1, one.bytes // max(1, len(split))))
    for start in range(0, len(split), size):
        part = slice(start, start + size)
        yield values[part] if split.rows is None else values[split.rows[part]]


def has_labels(split: Split, task: Task) -> bool:
    """Whether any sample of a split has a label of a task."""
    return any(bool(task.labelled(task.select(part)).any()) for part in pieces(split, task.column))


def check_tasks(tasks: Sequence[Task], predictions: Sequence[Any], batch: Batch) -> None:
    """Try loss and metrics of each task on the samples that `few` chose.

    Args:
        predictions: the predictions of each task, in the order of the tasks.
        batch: the samples, as `mtl.data.batches.ready` makes them.

    Raises:
        SetupError: a loss or metric fails, or returns something that training cannot add up.
    """
    for task, prediction in zip(tasks, predictions, strict=True):
        try:
            _check_task(task, prediction, task.select(batch[task.column]))
        except UserError:
            raise
        except Exception as error:  # whatever a user's own task raises
            raise SetupError(f"data: task {task.name!r}: {_message(error)}") from error
    try:
        check_alike(tasks, predictions, batch)
    except ValueError as error:
        raise SetupError(f"data: {error}") from error


def _check_task(task: Task, prediction: Any, target: Column) -> None:
    """Try loss and metrics of one task.

    Raises:
        ValueError: a sample without a label adds something, or a shape, dtype or name is wrong.
    """
    loss, missing = task.loss(prediction, target), ~task.labelled(target)
    if (wrong := task.criterion(prediction, target)[missing]).any():
        raise ValueError(f"its loss of a sample without a label is {wrong[0].item()}; it must be 0")
    if loss.shape != () or task.count(target).shape != ():
        shapes = f"{tuple(loss.shape)} and {tuple(task.count(target).shape)}"
        raise ValueError(f"loss and count have the shapes {shapes}, not ()")
    for metric in task.metrics:
        name, tally = f"metric {type(metric).__name__}", Tally(target.device)
        zero = metric.zero()
        if not isinstance(zero, Tensor) or zero.dtype not in (torch.int64, torch.float64) or zero.any():
            raise ValueError(f"zero of {name} must be a tensor of zeros, int64 or float64, not {zero!r:.60}")
        tally.update("whole", metric, prediction, target)
        # A second state with the unlabelled samples only: it must stay at zero.
        if missing.any() and all(part.shape[:1] == missing.shape for part in tensors(prediction)):
            tally.update("missing", metric, each(lambda part: part[missing], prediction), target[missing])
        read = tally.read()
        if (added := read.get("missing", zero)).any():
            shown = added.flatten()[:8].tolist()
            raise ValueError(f"update of {name} added {shown} for samples without a label; these must add nothing, 0")
        values, needed = metric.compute(read["whole"]), [score.name for score in metric.scores]
        if not isinstance(values, Mapping) or sorted(values) != sorted(needed):
            raise ValueError(f"compute of {name} returned {values!r:.60}; a dict with {', '.join(needed)} is needed")


def _message(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)}{blame(error)}"


def _check_names(tasks: Any) -> None:
    if not _is_sequence(tasks) or not len(tasks):
        raise ValueError(f"tasks: {tasks!r:.80}; a tuple of at least one task is needed, as in (Regression('size'),)")
    names = [getattr(task, "name", None) for task in tasks]
    # For each key of metrics.jsonl (without the split) its owner, for the message. Different tasks can give one key:
    # task "a" with metric "b_c", and task "a_b" with metric "c".
    keys: dict[str, str] = {}
    for task in tasks:
        if not isinstance(task, Task):
            raise ValueError(f"tasks: {task!r:.80} is no mtl.tasks.Task")
        if not isinstance(task.name, str) or not NAME.fullmatch(task.name):
            raise ValueError(f"tasks: the name {task.name!r} may hold letters, digits, _ and - only, and not be empty")
        if task.name == "training":  # an attribute of every nn.Module, which the heads' container would lose
            raise ValueError("tasks: no task can have the name 'training'; rename it")
        if not isinstance(task.target, str):
            raise ValueError(f"tasks: {task.name} has target={task.target!r}; the name of a column is needed")
        if task.index is not None and (not isinstance(task.index, Integral) or task.index < 0):
            raise ValueError(f"tasks: {task.name} has index={task.index!r}; the number of a column, from 0, is needed")
        if not isinstance(task.outputs, Integral) or task.outputs < 1:
            raise ValueError(f"tasks: {task.name} has outputs={task.outputs!r}; a whole number from 1 is needed")
        if names.count(task.name) > 1:
            raise ValueError(f"tasks: two tasks have the name {task.name!r}; rename one of them")
        metrics = task.metrics
        if not _is_sequence(metrics) or not len(metrics) or not all(isinstance(m, Metric) for m in metrics):
            raise ValueError(f"tasks: {task.name} has the metrics {metrics!r:.80}; a tuple of at least one is needed")
        for metric in metrics:
            scores: Any = getattr(metric, "scores", ())
            if not _is_sequence(scores) or not len(scores) or not all(isinstance(one, Score) for one in scores):
                kind = type(metric).__name__
                raise ValueError(
                    f"tasks: {task.name}: {kind}.scores is {scores!r:.60}, not a tuple such as (Score('f1'),)"
                )
        for name in ("loss", *(score.name for score in task.scores)):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"tasks: {task.name} has a metric with the name {name!r}; letters, digits, _ and -")
            key, what = f"{task.name}_{name}", "its loss" if name == "loss" else f"its metric {name!r}"
            what = f"task {task.name!r} with {what}"
            if key in keys:
                raise ValueError(f"tasks: {keys[key]} and {what} share the name {key!r} in the results; rename one")
            keys[key] = what


def _check_select(benchmark: Any) -> None:
    kinds = {task.scores[0] for task in benchmark.tasks}
    select = getattr(benchmark, "select", "first")
    if select not in ("first", "mean"):
        raise ValueError(f"select: {select!r}; 'first' or 'mean' is needed")
    if select == "mean" and len(kinds) > 1:
        shown = ", ".join(sorted({kind.name for kind in kinds}))
        raise ValueError(f"select: 'mean' needs one kind of main metric, not {shown}")


def _check_columns(split: Split, benchmark: Any) -> None:
    """Check that the input columns exist, as tensors of one length, with the dtype and shape that the network reads."""
    columns = split.columns
    known = {str(name) for name in columns}
    for name in benchmark.inputs:
        if name not in columns:
            hint = suggest(name, known)
            raise ValueError(f"{name}: there is no such column, only {_listed(columns)}; inputs reads it{hint}")
        needed = benchmark.inputs[name].column
        if not isinstance(columns[name], (needed, Joined) if needed is Tensor else needed):
            kind, how = type(columns[name]).__name__, "a tensor is needed (torch.from_numpy makes a tensor of an array)"
            if needed is Ragged:
                how = "a ragged column is needed: mtl.data.Ragged(values, lengths)"
            raise ValueError(f"{name}: a {kind}; {how}")
        try:
            benchmark.inputs[name].check(columns[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    first = next(iter(benchmark.inputs))
    for name in benchmark.inputs:
        if len(columns[name]) != len(columns[first]):
            raise ValueError(f"{name}: {len(columns[name])} rows, and {len(columns[first])} of {first}")


def _check_rows(split: Split) -> None:
    rows, size = split.rows, len(next(iter(split.columns.values())))
    if rows is not None:
        needed = f"an int64 tensor of shape (N,) on the cpu with positions from 0 to {size - 1} is needed"
        if not isinstance(rows, Tensor):
            raise ValueError(f"rows: a {type(rows).__name__}; {needed}")
        if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device.type != "cpu":
            raise ValueError(f"rows: {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}; {needed}")
        if (wrong := rows[(rows < 0) | (rows >= size)]).numel():
            raise ValueError(f"rows: the position {wrong[0].item()}; {needed}")
    if not len(split):
        raise ValueError("there are no samples")


def _check_labels(split: Split, task: Task, benchmark: Any) -> None:
    columns, inputs = split.columns, benchmark.inputs
    size, name = len(columns[next(iter(inputs))]), task.column
    if name not in columns:
        read = {*inputs, *(other.column for other in benchmark.tasks)}
        others = [key for key in map(str, columns) if key not in inputs]
        hint = suggest(name, [key for key in others if key not in read])
        raise ValueError(f"no labels for task {task.name!r}; there are labels for {_listed(others)}{hint}")
    target = columns[name]
    try:
        if not isinstance(target, Column):
            raise ValueError(f"a {type(target).__name__}; a tensor is needed (torch.as_tensor makes one)")
        values = target
        if isinstance(target, Ragged):
            check_ragged(target)
            values = target.values
            if len(target) != size:
                raise ValueError(f"{len(target)} lengths; one for each of the {size} samples is needed")
        if values.layout != torch.strided:
            raise ValueError(f"layout {values.layout}; convert with to_dense()")
        if values.ndim == 0 or len(target) != size:
            raise ValueError(f"shape {tuple(values.shape)}; one label for each of the {size} samples is needed")
        if task.index is not None and (values is not target or values.ndim < 2 or values.shape[1] <= task.index):
            shape = tuple(values.shape)
            raise ValueError(f"shape {shape}; index={task.index} needs a matrix (N, K) with K from {task.index + 1}")
        # With augmentation, a map that does not follow its image would teach wrong labels, without any error.
        shapes = [one.shape[1:] for one in inputs.values() if isinstance(one, Image)]
        if benchmark.augment and (problem := task.moves.fits(tuple(values.shape[1:]), shapes[0])):
            raise ValueError(f"shape {tuple(values.shape)}: {problem}")
        if values.is_complex():
            raise ValueError(f"dtype {str(values.dtype).removeprefix('torch.')}; {task.allowed}")
        start, count, first = 0, 0, None
        for part in pieces(split, name):
            part = task.select(part)
            wrong = _wrong(task, part)
            if found := int(wrong.sum()):
                if first is None:
                    where = tuple(wrong.nonzero()[0].tolist())
                    sample = int(part.owner()[where[0]]) if isinstance(part, Ragged) else where[0]
                    first = start + sample, (part.values if isinstance(part, Ragged) else part)[where].item()
                count += found
            start += len(part)
        if first is not None:
            others = f" ({count} labels are wrong)" if count > 1 else ""
            raise ValueError(f"sample {first[0]} has the label {first[1]}{others}; {task.allowed}")
    except Exception as error:  # whatever a user's own task raises
        raise ValueError(f"labels of task {task.name!r}: {_message(error)}") from error


def _wrong(task: Task, target: Column) -> Tensor:
    """Mark the labels that the task cannot be trained on: a bool for each label, of a ragged column for each value.

    Raises:
        ValueError: the labels have another dtype or shape than the task needs, or `units` does not return one integer
            for each sample.
    """
    try:
        wrong = task.wrong(target)
    except ValueError as error:
        raise ValueError(f"{one_line(error)}; {task.allowed}{blame(error)}") from error
    units, kind, values = task.units(target), type(task).__name__, target
    if isinstance(target, Ragged):
        values = target.values
    if not isinstance(units, Tensor) or units.is_floating_point() or units.shape != (len(target),):
        shown = f"{units.dtype} of shape {tuple(units.shape)}" if isinstance(units, Tensor) else repr(units)[:60]
        hint = "; drop the second dimension of the labels with squeeze(1)" if values.shape[1:] == (1,) else ""
        if values.ndim == 2 and values.shape[1] > 1 and values is target:
            hint = "; with index=k, a task reads one column of a matrix: see mtl.tasks.alike"
        raise ValueError(
            f"{kind}.units returned {shown}; an integer for each sample, ({len(target)},), is needed{hint}"
        )
    if wrong.shape != values.shape or wrong.dtype != torch.bool:
        raise ValueError(f"{kind}.wrong must return a bool for each label, of the shape {tuple(values.shape)}")
    return wrong


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
