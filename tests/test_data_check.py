"""What is wrong with a benchmark's class attributes, or with the splits that its `load` returns, is one line."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mtl.data.base import Benchmark, Split, build_benchmark
from mtl.data.batches import TrainingBatches
from mtl.data.check import check_loaded
from mtl.data.synthetic import Synthetic
from mtl.errors import ConfigError, SetupError
from mtl.metrics.task import Accuracy
from mtl.tasks import Classification, Regression


def declared(**attributes) -> Benchmark:
    """As a run builds it: `Own`, whose class attributes are the keywords."""
    tasks = (Classification("a", 3), Regression("b"))
    known = {"load": None, "tasks": tasks, "image_shape": (1, 4, 4), "mean": [0.5], "std": [0.25]}
    own = dataclass(type("Own", (Benchmark,), {**known, **attributes}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtl.data.digits.Digits", own)
        return build_benchmark({"_target_": "mtl.data.digits.Digits"})


class Loss(Accuracy):
    name = "loss"


class Nameless(Accuracy):
    name = None


def with_metric(metric: type, name: str = "a") -> tuple[Classification]:
    return (type("OwnTask", (Classification,), {"metrics": (metric(),)})(name, 3),)


def called(name: str) -> type:
    return type("Own", (Accuracy,), {"name": name})


@pytest.mark.parametrize("attributes, message", [
    ({"tasks": ()}, r"tasks: \(\); a tuple of at least one task"),
    ({"tasks": Regression("b")}, "tasks: Regression.*a tuple"),
    ({"tasks": ("a",)}, "tasks: 'a' is no mtl.tasks.Task"), ({"tasks": (Regression(""),)}, "the name '' may hold"),
    *(({"tasks": (Regression(name),)}, f"the name '{name}' may hold") for name in ("a.b", "a/b", "a b", "ü:")),
    ({"tasks": (Regression("a"), Regression("a"))}, "two tasks have the name 'a'"),
    ({"tasks": (Regression("training"),)}, "the name 'training'"),
    ({"tasks": (Regression("a", 0),)}, "a has outputs=0"),
    ({"tasks": with_metric(Loss)}, "task 'a' with its loss and task 'a' with its loss share the name 'a_loss'"),
    ({"tasks": with_metric(called("b_c")) + with_metric(called("c"), "a_b")},
     "task 'a' with its metric 'b_c' and task 'a_b' with its metric 'c' share the name 'a_b_c' in the results"),
    ({"tasks": (*with_metric(called("loss_loss")), Regression("a_loss"))},
     "task 'a' with its metric 'loss_loss' and task 'a_loss' with its loss share the name 'a_loss_loss'"),
    ({"tasks": with_metric(Nameless)}, "with the name None"),
    ({"image_shape": (4, 4)}, r"image_shape: \(4, 4\); three whole numbers"),
    ({"mean": [0.5] * 3}, "mean: .* the 1 channels"),
    ({"std": []}, "std: .* the 1 channels"), ({"std": [0.0]}, "std: .* greater than 0"), ({"mean": 0.5}, "mean: 0.5"),
    ({"mean": [float("nan")]}, "mean: .* finite"), ({"crop_padding": -1}, "crop_padding: -1"),
])  # fmt: skip
def test_class_attributes_are_checked_before_anything_is_read(attributes, message):
    with pytest.raises(ConfigError, match=f"^data: Own.(tasks: .*)?{message}"):
        declared(**attributes)


def test_what_builds_no_benchmark_is_refused():
    with pytest.raises(ConfigError, match=r"data._target_=builtins.dict: must make a Benchmark, not {}"):
        build_benchmark({"_target_": "builtins.dict"})


def test_names_that_start_alike_and_numbers_in_arrays_are_fine():
    tasks = (Regression("age_group"), Regression("age"), Regression("type"), Regression("values"), Regression("a-1"))
    assert declared(tasks=tasks, mean=np.array([0.5]), std=torch.tensor([0.5])).tasks == tasks


IMAGES = torch.zeros(6, 4, 4, 1, dtype=torch.uint8)


def loaded(train: dict | None = None, test: dict | None = None) -> dict[str, Split]:
    """The splits of a benchmark whose `load` returns good data, except for these images or labels."""

    def split(wrong: dict | None) -> Split:
        columns = {"images": IMAGES, "a": torch.arange(6) % 3, "b": torch.linspace(0, 1, 6), **(wrong or {})}
        return Split(columns.pop("images"), {name: y for name, y in columns.items() if y is not None})

    benchmark = declared()
    benchmark.load = lambda: (split(train), split(test))
    return benchmark.splits()


@pytest.mark.parametrize("wrong, message", [
    ({"images": IMAGES.float()}, r"images: float32 .* uint8 images of shape \(N, 4, 4, 1\) are needed; .mul\(255\)"),
    ({"images": IMAGES.permute(0, 3, 1, 2)}, r"images: uint8 of shape \(6, 1, 4, 4\); .*permute\(0, 2, 3, 1\)"),
    ({"images": IMAGES[:, :3]}, r"shape \(6, 3, 4, 1\)"), ({"images": IMAGES[..., 0]}, r"shape \(6, 4, 4\)"),
    ({"images": IMAGES.numpy()}, "a ndarray; .*torch.from_numpy"), ({"images": IMAGES[:0]}, "images: there are none"),
    ({"b": None}, "no labels for task 'b'; there are labels for 'a'"),
    ({"b": None, "bb": torch.zeros(6)}, "no labels for task 'b'.*; did you mean bb"),
    ({"a": torch.zeros(4).long()}, r"labels of task 'a': shape \(4,\); one label for each of the 6 images"),
    ({"b": torch.tensor(1.0)}, r"labels of task 'b': shape \(\)"),
    ({"b": np.zeros(6)}, "task 'b': a ndarray; a tensor"),
    ({"b": torch.zeros(6).to_sparse()}, "task 'b': layout torch.sparse_coo"),
    ({"a": torch.tensor([0, 1, 2, 0, 9, 1])}, "task 'a': sample 4 has the label 9; .* from 0 to 2"),
])  # fmt: skip
def test_what_load_returned_is_checked(wrong, message):
    """In both splits, by name; the message says what is allowed."""
    for name in ("train", "test"):
        with pytest.raises(SetupError, match=f"^data: Own.load\\(\\): {name} split: .*{message}"):
            loaded(**{name: wrong})


def test_labels_of_no_task_are_left_out():
    """A subclass with fewer tasks inherits a `load` that knows more."""
    assert set(loaded({"c": [1, 2]})["train"].targets) == {"a", "b"}


@pytest.mark.parametrize("rows, message", [
    ([0, 1], "a list; an int64 tensor .* from 0 to 5 is needed"), (torch.ones(6).bool(), r"torch.bool of shape \(6,\)"),
    (torch.tensor([[0]]), r"int64 of shape \(1, 1\)"), (torch.tensor([0, 6]), "the position 6; "),
    (torch.tensor([-1]), "the position -1; "),
])  # fmt: skip
def test_rows_are_checked(rows, message):
    benchmark = declared()
    part = Split(IMAGES, {"a": torch.arange(6) % 3, "b": torch.zeros(6)}, rows)
    benchmark.load = lambda: (part, part)
    with pytest.raises(SetupError, match=f"train split: rows: .*{message}"):
        benchmark.splits()


def test_only_selected_labels_are_checked_but_each_column_is_whole():
    """Wrong labels may be left out by selection; a column of another length does not belong to the images."""
    benchmark, rows = declared(), torch.tensor([4, 0])
    part = Split(IMAGES, {"a": torch.tensor([0, 9, 9, 9, 2, 9]), "b": torch.arange(6.0)}, rows)
    benchmark.load = lambda: (part, part)
    assert benchmark.splits()["test"].targets["a"].tolist() == [2, 0]
    part.all_targets["b"] = torch.zeros(7)
    with pytest.raises(SetupError, match=r"task 'b': shape .*7.*each of the 6 images"):
        benchmark.splits()


@pytest.mark.parametrize("returned", [None, (1, 2), (Split(IMAGES, {}),), {"train": Split(IMAGES, {})}])
def test_load_returns_two_splits(returned):
    benchmark = declared()
    benchmark.load = lambda: returned
    with pytest.raises(SetupError, match="two Splits are needed"):
        benchmark.splits()


def test_images_are_not_read_by_the_checks():
    """Of these, only type and shape exist."""
    images = torch.empty(4, 32, 32, 3, dtype=torch.uint8, device="meta")
    split = Split(images, {"fine": torch.arange(4), "coarse": torch.arange(4)})
    check_loaded(Synthetic(), (split, split))


def test_partial_tasks_are_found_in_the_training_labels():
    """Those that lack a label, whatever they declare, and no others."""
    benchmark = declared(tasks=(Classification("a", 3, partial=True), Regression("b"), Regression("c")))
    labels = {"a": torch.zeros(6).long(), "b": torch.tensor([0.0, torch.nan, 1, 2, 3, 4]), "c": torch.zeros(6)}
    assert TrainingBatches(Split(IMAGES, labels), benchmark, torch.device("cpu"), 0).partial == {"b"}
