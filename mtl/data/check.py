"""Own data, looked at once: what a benchmark declares before anything is read, and what its `load` returned.

A wrong label trains without a word and spoils every figure. So all labels are looked at, and of the images, which may
be memory-mapped, only type and shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mtl.config.source import blame
from mtl.data.columns import Split
from mtl.errors import SetupError, one_line, suggest
from mtl.metrics.task import Metric
from mtl.tasks import Task

NAME = re.compile(r"\w[\w-]*")  # becomes a part of metric names, of the checkpoint's keys and of config keys


def check_declared(benchmark: Any) -> None:
    """Look at the class attributes of a Benchmark.

    Raises:
        ValueError: one is missing or wrong; the message begins with its name.
    """
    for name in ("tasks", "image_shape", "mean", "std"):
        if not hasattr(type(benchmark), name) and not hasattr(benchmark, name):
            raise ValueError(f"{name}: missing; a Benchmark needs tasks, image_shape, mean and std")
    _check_names(benchmark.tasks)
    shape = benchmark.image_shape
    if not (_is_sequence(shape) and len(shape) == 3 and all(isinstance(n, Integral) and n > 0 for n in shape)):
        raise ValueError(f"image_shape: {shape!r}; three whole numbers are needed: (channels, height, width)")
    for name in ("mean", "std"):
        values = _numbers(getattr(benchmark, name))
        if len(values) != shape[0] or not all(map(math.isfinite, values)):
            shown = repr(getattr(benchmark, name))
            raise ValueError(f"{name}: {shown}; one finite number for each of the {shape[0]} channels is needed")
    if min(_numbers(benchmark.std)) <= 0:
        raise ValueError(f"std: {benchmark.std!r}; images are divided by it, so it must be greater than 0")
    if not isinstance(benchmark.crop_padding, Integral) or benchmark.crop_padding < 0:
        raise ValueError(f"crop_padding: {benchmark.crop_padding!r}; a whole number of pixels is needed, 0 for no crop")


def check_loaded(benchmark: Any, loaded: Any) -> None:
    """Look at what the `load()` of a Benchmark returned, before it is limited or divided.

    Raises:
        SetupError: it is not a training and a test split, or one does not fit the tasks or the image_shape.
    """
    where = f"data: {type(benchmark).__name__}.load()"
    if not (isinstance(loaded, tuple | list) and len(loaded) == 2 and all(_is_split(part) for part in loaded)):
        returned = [type(x).__name__ for x in loaded] if isinstance(loaded, tuple | list) else type(loaded).__name__
        raise SetupError(f"{where} returned {returned}; two Splits are needed, of training and of test data")
    for name, split in zip(("train", "test"), loaded, strict=True):
        try:
            _check_images(split.all_images, benchmark.image_shape)
            _check_rows(split)
            _check_labels(split, benchmark.tasks)
        except ValueError as error:
            raise SetupError(f"{where}: {name} split: {error}") from error


def few(split: Split, tasks: Sequence[Task]) -> Split:
    """At most two samples and, for each task, the first one without a label."""
    chosen = set(range(min(2, len(split))))
    for task in tasks:
        missing = ~task.labelled(split.labels(task.name))
        chosen |= set(missing.nonzero()[:1].flatten().tolist())
    return split.take(torch.tensor(sorted(chosen)))


def check_tasks(tasks: Sequence[Task], predictions: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
    """Try loss and metrics of each task on the samples that `few` chose.

    Args:
        predictions: each task's (N, …), in the order of the tasks.
        targets: by task name, (N, …).

    Raises:
        SetupError: a loss or metric fails, or is not what training adds up.
    """
    for task, prediction in zip(tasks, predictions, strict=True):
        try:
            target = targets[task.name]
            loss, count, unlabelled = task.loss(prediction, target), task.count(target), ~task.labelled(target)
            if (wrong := task.criterion(prediction, target)[unlabelled]).any():
                raise ValueError(f"its loss of a sample without a label is {wrong[0].item()}; it must be 0")
            if loss.shape != () or count.shape != ():
                shapes = f"{tuple(loss.shape)} and {tuple(count.shape)}"
                raise ValueError(f"loss and count have the shapes {shapes}, not ()")
            for metric in task.metrics:
                if not isinstance(state := metric.update(prediction, target), Tensor):
                    kind = type(state).__name__
                    raise ValueError(f"update of metric {metric.name!r} returned a {kind}, not a tensor")
                if unlabelled.any() and (wrong := metric.update(prediction[unlabelled], target[unlabelled])).any():
                    shown = f"{wrong.flatten().tolist()} of samples without a label"
                    raise ValueError(f"update of metric {metric.name!r} returned {shown}; these must add nothing, 0")
                metric.compute(state.flatten().tolist(), max(1, int(count)))
        except Exception as error:  # whatever a user's own task raises
            raise SetupError(f"data: task {task.name!r}: {_message(error)}") from error


def _message(error: Exception) -> str:
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)}{blame(error)}"


def _check_names(tasks: Any) -> None:
    if not _is_sequence(tasks) or not len(tasks):
        raise ValueError(f"tasks: {tasks!r:.80}; a tuple of at least one task is needed, as in (Regression('size'),)")
    names = [getattr(task, "name", None) for task in tasks]
    keys: dict[str, str] = {}  # of metrics.jsonl, without the split; and whose they are, in words
    for task in tasks:
        if not isinstance(task, Task):
            raise ValueError(f"tasks: {task!r:.80} is no mtl.tasks.Task")
        if not isinstance(task.name, str) or not NAME.fullmatch(task.name):
            raise ValueError(f"tasks: the name {task.name!r} may hold letters, digits, _ and - only, and not be empty")
        if task.name == "training":  # an attribute of every nn.Module, which the heads' container would lose
            raise ValueError("tasks: no task can have the name 'training'; rename it")
        if not isinstance(task.outputs, Integral) or task.outputs < 1:
            raise ValueError(f"tasks: {task.name} has outputs={task.outputs!r}; a whole number from 1 is needed")
        if names.count(task.name) > 1:
            raise ValueError(f"tasks: two tasks have the name {task.name!r}; rename one of them")
        metrics = task.metrics
        if not _is_sequence(metrics) or not len(metrics) or not all(isinstance(m, Metric) for m in metrics):
            raise ValueError(f"tasks: {task.name} has the metrics {metrics!r:.80}; a tuple of at least one is needed")
        for name in ("loss", *(getattr(m, "name", None) for m in metrics)):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"tasks: {task.name} has a metric with the name {name!r}; letters, digits, _ and -")
            key, what = f"{task.name}_{name}", "its loss" if name == "loss" else f"its metric {name!r}"
            what = f"task {task.name!r} with {what}"
            if key in keys:
                raise ValueError(f"tasks: {keys[key]} and {what} share the name {key!r} in the results; rename one")
            keys[key] = what


def _check_images(images: Any, image_shape: Sequence[int]) -> None:
    channels, height, width = image_shape
    needed = f"uint8 images of shape (N, {height}, {width}, {channels}) are needed"
    if not isinstance(images, Tensor):
        raise ValueError(f"images: a {type(images).__name__}; {needed} (torch.from_numpy makes a tensor of an array)")
    shape, dtype = tuple(images.shape), str(images.dtype).removeprefix("torch.")
    hints = []
    if images.dtype != torch.uint8:
        hints.append(".mul(255).round().to(torch.uint8) converts floats in [0, 1]")
    if shape[1:] == (channels, height, width) != (height, width, channels):
        hints.append(".permute(0, 2, 3, 1) moves the channels to the end")
    if hints or shape[1:] != (height, width, channels):
        raise ValueError(f"images: {dtype} of shape {shape}; {'; '.join([needed, *hints])}")


def _check_rows(split: Split) -> None:
    rows, size = split.rows, len(split.all_images)
    if rows is not None:
        needed = f"an int64 tensor of shape (N,) on the cpu with positions from 0 to {size - 1} is needed"
        if not isinstance(rows, Tensor):
            raise ValueError(f"rows: a {type(rows).__name__}; {needed}")
        if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device.type != "cpu":
            raise ValueError(f"rows: {rows.dtype} of shape {tuple(rows.shape)} on {rows.device}; {needed}")
        if (wrong := rows[(rows < 0) | (rows >= size)]).numel():
            raise ValueError(f"rows: the position {wrong[0].item()}; {needed}")
    if not len(split):
        raise ValueError("images: there are none")


def _check_labels(split: Split, tasks: Sequence[Task]) -> None:
    targets, size = split.all_targets, len(split.all_images)
    names = [task.name for task in tasks]
    if not isinstance(targets, dict):
        raise ValueError(f"targets: a {type(targets).__name__}; a dict from the tasks' names to labels is needed")
    for name in names:
        if name not in targets:
            hint = suggest(name, [key for key in map(str, targets) if key not in names])
            raise ValueError(f"no labels for task {name!r}; there are labels for {_listed(targets)}{hint}")
    for task in tasks:
        target = targets[task.name]
        try:
            if not isinstance(target, Tensor):
                raise ValueError(f"a {type(target).__name__}; a tensor is needed (torch.as_tensor makes one)")
            if target.layout != torch.strided:
                raise ValueError(f"layout {target.layout}; convert with to_dense()")
            if target.ndim == 0 or len(target) != size:
                raise ValueError(f"shape {tuple(target.shape)}; one label for each of the {size} images is needed")
            task.check(split.labels(task.name))
        except Exception as error:  # whatever a user's own task raises
            raise ValueError(f"labels of task {task.name!r}: {_message(error)}") from error


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _numbers(values: Any) -> list[float]:
    """The numbers of a list, an array or a tensor; empty where it is none of them."""
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return []


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_split(value: Any) -> bool:
    return isinstance(value, Split)
