"""What is wrong with a benchmark's class attributes, or with the splits that its `load` returns, is one line."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mtl.data.base import Benchmark, Split, build_benchmark
from mtl.data.batches import TrainingBatches
from mtl.data.check import check_loaded
from mtl.data.inputs import Image, Numbers
from mtl.data.synthetic import Synthetic
from mtl.errors import ConfigError, SetupError
from mtl.metrics.base import Score
from mtl.metrics.labels import Accuracy
from mtl.tasks import Classification, Depth, Disparity, Regression
from mtl.views import Crop, Flip


def declared(**attributes) -> Benchmark:
    """As a run builds it: `Own`, whose class attributes are the keywords."""
    tasks = (Classification("a", 3), Regression("b"))
    known = {"load": None, "tasks": tasks, "inputs": {"image": Image((1, 4, 4), [0.5], [0.25])}}
    own = dataclass(type("Own", (Benchmark,), {**known, **attributes}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtl.data.digits.Digits", own)
        return build_benchmark({"_target_": "mtl.data.digits.Digits"})


def called(name: object) -> type:
    return type("Own", (Accuracy,), {"scores": (Score(name),)})


def with_metric(metric: type, name: str = "a") -> tuple[Classification]:
    return (type("OwnTask", (Classification,), {"metrics": (metric(),)})(name, 3),)


@pytest.mark.parametrize("attributes, message", [
    ({"tasks": ()}, r"tasks: \(\); a tuple of at least one task"),
    ({"tasks": Regression("b")}, "tasks: Regression.*a tuple"),
    ({"tasks": ("a",)}, "tasks: 'a' is no mtl.tasks.Task"), ({"tasks": (Regression(""),)}, "the name '' may hold"),
    *(({"tasks": (Regression(name),)}, f"the name '{name}' may hold") for name in ("a.b", "a/b", "a b", "ü:")),
    ({"tasks": (Regression("a"), Regression("a"))}, "two tasks have the name 'a'"),
    ({"tasks": (Depth("near"), Disparity("far", target="near"))}, "near and far share the column 'near', but move it"),
    ({"tasks": (Regression("training"),)}, "the name 'training'"),
    ({"tasks": (Regression("a", 0),)}, "a has outputs=0"),
    ({"tasks": with_metric(called("loss"))},
     "task 'a' with its loss and task 'a' with its loss share the name 'a_loss'"),
    ({"tasks": with_metric(called("b_c")) + with_metric(called("c"), "a_b")},
     "task 'a' with its metric 'b_c' and task 'a_b' with its metric 'c' share the name 'a_b_c' in the results"),
    ({"tasks": (*with_metric(called("loss_loss")), Regression("a_loss"))},
     "task 'a' with its metric 'loss_loss' and task 'a_loss' with its loss share the name 'a_loss_loss'"),
    ({"tasks": with_metric(called(None))}, "with the name None"),
    ({"tasks": (type("OwnTask", (Regression,), {"metrics": ()})("a"),)}, r"a has the metrics \(\)"),
    ({"tasks": with_metric(type("Own", (Accuracy,), {"scores": ()}))}, r"a: Own.scores is \(\), not a tuple such as"),
    ({"tasks": (Classification("a", 3, True),)}, "a has target=True; the name of a column"),
    ({"tasks": (Regression("image"),)}, "image has its labels in the column 'image', which is an input"),
    ({"inputs": Image((1, 4, 4))}, "inputs: .*; a dict is needed"), ({"inputs": {}}, "inputs: {}; a dict is needed"),
    ({"augment": Flip()}, r"augment: Flip\(\); a tuple is needed"), ({"augment": (Crop,)}, "augment: .*; a tuple"),
    ({"augment": (Flip(),), "inputs": {"x": Numbers((3,))}}, "augment: no input is an image"),
    ({"image_shape": (1, 4, 4)}, "image_shape: no Benchmark has it any more; write inputs = .*Image"),
    ({"mean": 0.5}, "mean: no Benchmark .* inputs = "), ({"std": [0.5]}, "std: no Benchmark .* inputs = "),
    ({"crop_padding": 0}, "crop_padding: no Benchmark .* augment = .*Crop"),
    ({"flip": False}, "flip: no Benchmark .* augment = .*Flip"),
])  # fmt: skip
def test_class_attributes_are_checked_before_anything_is_read(attributes, message):
    with pytest.raises(ConfigError, match=f"^data: Own.(tasks: .*)?{message}"):
        declared(**attributes)


def test_a_benchmark_without_tasks_or_inputs_is_refused(monkeypatch):
    for name in ("tasks", "inputs"):
        known = {"load": None, "tasks": (Regression("b"),), "inputs": {"image": Image((1, 4, 4))}}
        del known[name]
        monkeypatch.setattr("mtl.data.digits.Digits", dataclass(type("Own", (Benchmark,), known)))
        with pytest.raises(ConfigError, match=f"^data: Own.{name}: missing; a Benchmark needs tasks and inputs"):
            build_benchmark({"_target_": "mtl.data.digits.Digits"})


def test_an_option_may_bear_the_name_of_what_was_a_class_attribute():
    assert declared(flip=True, __annotations__={"flip": bool}).flip


@pytest.mark.parametrize("make, message", [
    (lambda: Image((4, 4)), r"shape: \(4, 4\); three whole numbers"), (lambda: Image((1, 4, 0)), "shape: .*three"),
    (lambda: Image((1, 4, 4), [0.5] * 3), "mean: .* the 1 channels"),
    (lambda: Image((1, 4, 4), (0.5,), []), "std: .* the 1 channels"),
    (lambda: Image((1, 4, 4), (0.5,), [0.0]), "std: .* greater than 0"),
    (lambda: Image((1, 4, 4), "x"), "mean: 'x'"), (lambda: Image((1, 4, 4), [float("nan")]), "mean: .* finite"),
    (lambda: Numbers(()), r"shape: \(\); whole numbers"), (lambda: Numbers(3), "shape: 3; whole numbers"),
    (lambda: Crop(-1), "padding: -1"),
])  # fmt: skip
def test_inputs_and_augmentations_are_checked_where_they_are_written(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_what_builds_no_benchmark_is_refused():
    with pytest.raises(ConfigError, match=r"data._target_=builtins.dict: must make a Benchmark, not {}"):
        build_benchmark({"_target_": "builtins.dict"})


def test_names_that_start_alike_and_numbers_in_arrays_are_fine():
    tasks = (Regression("age_group"), Regression("age"), Regression("type"), Regression("values"), Regression("a-1"))
    image = Image((1, 4, 4), np.array([0.5]), torch.tensor([0.5]))
    assert declared(tasks=tasks, inputs={"image": image}).tasks == tasks and image.mean == image.std == (0.5,)
    assert Image((3, 4, 4), 0.5).mean == (0.5,) * 3


IMAGES = torch.zeros(6, 4, 4, 1, dtype=torch.uint8)


def loaded(train: dict | None = None, test: dict | None = None) -> dict[str, Split]:
    """The splits of a benchmark whose `load` returns good data, except for these images or labels."""

    def split(wrong: dict | None) -> Split:
        columns = {"image": IMAGES, "a": torch.arange(6) % 3, "b": torch.linspace(0, 1, 6), **(wrong or {})}
        return Split({name: y for name, y in columns.items() if y is not None})

    benchmark = declared()
    benchmark.load = lambda: {"train": split(train), "test": split(test)}
    return benchmark.splits()


@pytest.mark.parametrize("wrong, message", [
    ({"image": IMAGES.float()}, r"image: float32 .* uint8 images of shape \(N, 4, 4, 1\) are needed; .mul\(255\)"),
    ({"image": IMAGES.permute(0, 3, 1, 2)}, r"image: uint8 of shape \(6, 1, 4, 4\); .*permute\(0, 2, 3, 1\)"),
    ({"image": IMAGES[:, :3]}, r"shape \(6, 3, 4, 1\)"), ({"image": IMAGES[..., 0]}, r"shape \(6, 4, 4\)"),
    ({"image": IMAGES.numpy()}, "a ndarray; .*torch.from_numpy"), ({"image": IMAGES[:0]}, "there are no samples"),
    ({"image": None}, "image: there is no such column, only 'a', 'b'; inputs reads it"),
    ({"image": None, "images": IMAGES}, "image: there is no such column.*; did you mean images"),
    ({"b": None}, "no labels for task 'b'; there are labels for 'a'"),
    ({"b": None, "bb": torch.zeros(6)}, "no labels for task 'b'.*; did you mean bb"),
    ({"a": torch.zeros(4).long()}, r"labels of task 'a': shape \(4,\); one label for each of the 6 samples"),
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
    assert set(loaded({"c": [1, 2]})["train"].columns) == {"image", "a", "b"}


@pytest.mark.parametrize("rows, message", [
    ([0, 1], "a list; an int64 tensor .* from 0 to 5 is needed"), (torch.ones(6).bool(), r"torch.bool of shape \(6,\)"),
    (torch.tensor([[0]]), r"int64 of shape \(1, 1\)"), (torch.tensor([0, 6]), "the position 6; "),
    (torch.tensor([-1]), "the position -1; "),
])  # fmt: skip
def test_rows_are_checked(rows, message):
    benchmark = declared()
    part = Split({"image": IMAGES, "a": torch.arange(6) % 3, "b": torch.zeros(6)}, rows)
    benchmark.load = lambda: {"train": part, "test": part}
    with pytest.raises(SetupError, match=f"train split: rows: .*{message}"):
        benchmark.splits()


def test_only_selected_labels_are_checked_but_each_column_is_whole():
    """Wrong labels may be left out by selection; a column of another length does not belong to the images."""
    benchmark, rows = declared(), torch.tensor([4, 0])
    part = Split({"image": IMAGES, "a": torch.tensor([0, 9, 9, 9, 2, 9]), "b": torch.arange(6.0)}, rows)
    benchmark.load = lambda: {"train": part, "test": part}
    assert benchmark.splits()["test"].column("a").tolist() == [2, 0]
    part.columns["b"] = torch.zeros(7)
    with pytest.raises(SetupError, match=r"task 'b': shape .*7.*each of the 6 samples"):
        benchmark.splits()


SPLIT = Split({"image": IMAGES, "a": torch.zeros(6).long(), "b": torch.zeros(6)})


@pytest.mark.parametrize("returned, message", [
    (None, "returned a NoneType; {\"train\": Split"), ((1, 2), "returned a tuple of int, int; {"),
    ((SPLIT, SPLIT), r"returned a tuple of Split, Split; {\"train\": Split\(…\), \"test\": Split\(…\)} is needed"),
    ({"train": SPLIT, "test": 1}, "returned a dict of Split, int"),
    ({"train": SPLIT}, "returned the splits 'train'; needed are train, test, and val"),
    ({"train": SPLIT, "test": SPLIT, "valid": SPLIT}, "'valid'; needed are train, test, and val"),
])  # fmt: skip
def test_load_returns_named_splits(returned, message):
    benchmark = declared()
    benchmark.load = lambda: returned
    with pytest.raises(SetupError, match=message):
        benchmark.splits()


def test_a_split_of_images_and_labels_apart_says_what_to_write():
    benchmark = declared()
    benchmark.load = lambda: Split(IMAGES, {"a": torch.zeros(6).long()})
    with pytest.raises(
        SetupError, match=r"Own.load\(\): TypeError: Split takes a dict .*\"image\": images.* not a Tensor"
    ):
        benchmark.splits()


def test_images_are_not_read_by_the_checks():
    """Of these, only type and shape exist."""
    images = torch.empty(4, 32, 32, 3, dtype=torch.uint8, device="meta")
    split = Split({"image": images, "fine": torch.arange(4), "coarse": torch.arange(4)})
    check_loaded(Synthetic(), {"train": split, "test": split})


def test_partial_tasks_are_found_in_the_training_labels():
    """Those that lack a label, and no others."""
    benchmark = declared(tasks=(Classification("a", 3), Regression("b"), Regression("c")))
    labels = {"a": torch.zeros(6).long(), "b": torch.tensor([0.0, torch.nan, 1, 2, 3, 4]), "c": torch.zeros(6)}
    batches = TrainingBatches(Split({"image": IMAGES, **labels}), benchmark, torch.device("cpu"), 0)
    assert batches.partial == {"b"} and batches.labels == {"b": 5}
