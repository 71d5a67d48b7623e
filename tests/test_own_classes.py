"""A stranger's data set, task and architecture through train.py: the right numbers, or one line before training."""

import hashlib
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mtl.losses.base import GramianWeighting, LossWeighting

OWN = '''
from dataclasses import dataclass

import torch
from torch import nn

from mtl.data.base import Benchmark, Split
from mtl.data.inputs import Image
from mtl.metrics.base import Score
from mtl.metrics.labels import MeanAbsoluteError
from mtl.tasks import Classification, Regression


@dataclass
class Shapes(Benchmark):
    fault: str = ""
    tasks = (Classification("shape", 3), Regression("size"))
    inputs = {"image": Image((1, 8, 8), (0.5,), (0.25,))}

    def load(self):
        draws = torch.Generator().manual_seed(0)

        def split(size):
            images = torch.randint(0, 256, (size, 8, 8, 1), dtype=torch.uint8, generator=draws)
            shape = torch.randint(0, 3, (size,), generator=draws)
            return Split({"image": images, "shape": shape, "size": torch.randn(size, generator=draws)})

        train, test = split(48), split(32)
        if self.fault == "missing":
            train.columns["shape"][::2], train.columns["size"][1::2] = -100, torch.nan
            test.columns["shape"][8:], test.columns["size"][8:] = -100, torch.nan
        if self.fault == "class":
            test.columns["shape"][7] = 3
        if self.fault == "bug":
            train.columns["colour"]
        return {"train": train, "test": test}


class Experts(nn.Module):
    """Its weight (E, F, C) meets an einsum, which leaves a gradient of another memory layout."""

    def __init__(self, features, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, features, outputs, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.einsum("nf,efk->nek", x, self.weight).tanh().mean(1)


class Convolutions(nn.Module):
    """Two 3x3 convolutions over the features as a picture, so that the step makes channels_last gradients."""

    def __init__(self, outputs):
        super().__init__()
        self.body, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, outputs, 3, padding=1)

    def forward(self, x):
        x = x.view(len(x), 2, 2, -1).contiguous(memory_format=torch.channels_last)
        return self.last(self.body(x).tanh()).mean((2, 3))


class WrongTask(Regression):
    def criterion(self, prediction, target):
        return (prediction - target).square()


class Property(Shapes):
    @property
    def tasks(self):
        return [Classification(name, 3) for name in self.names]


class Broadcasts(Shapes):
    tasks = (Classification("shape", 3), WrongTask("size"))


class Unmasked(Regression):
    def criterion(self, prediction, target):
        return (prediction.squeeze(1) - target).square()


class Error(MeanAbsoluteError):
    def add(self, prediction, target):
        return (prediction.squeeze(1) - target).abs().sum(), (~target.isnan()).sum()


class UnmaskedMetric(Regression):
    metrics = (Error(),)


class NaNLoss(Shapes):
    tasks = (Classification("shape", 3), Unmasked("size"))


class NaNMetric(Shapes):
    tasks = (Classification("shape", 3), UnmaskedMetric("size"))


@dataclass
class Folder(Shapes):
    root: str = "."


class Norm(MeanAbsoluteError):
    scores = (Score("norm", higher_is_better=False),)


class Weights(MeanAbsoluteError):
    scores = (Score("weights", higher_is_better=False),)


class NormTask(Regression):
    metrics = (Norm(), Weights())


@dataclass
class Clash(Shapes):
    """Its task's name and metrics are words that the engine uses for its own sums."""

    tasks = (NormTask("step"), NormTask("size"))

    def load(self):
        parts = super().load()
        for part in parts.values():
            part.columns["step"] = part.columns["size"].clone()
        return parts


class Tiny(nn.Module):
    out_features = 8

    def __init__(self, in_channels, fault=""):
        super().__init__()
        self.conv, self.fault = nn.Conv2d(in_channels, 8, 3, padding=1), fault

    def forward(self, x):
        if self.fault == "bug":
            return self.missing(x)
        features = self.conv(x).relu().mean((2, 3))
        return features.detach() if self.fault == "detached" else features


class Sides(Tiny):
    def decoder(self, task):
        return Experts(8, task.outputs) if task.name == "shape" else Convolutions(task.outputs)
'''


@pytest.fixture
def own(cli, tmp_path, monkeypatch):
    """`own("Shapes", "data.fault=class")` trains that data set of a stranger's package on their Tiny net."""
    torch.set_num_threads(1)
    (tmp_path / "own_classes.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(tmp_path)
    small = ["data=digits", "arch=vgg16_bn", "~arch.dropout", "arch._target_=own_classes.Tiny", "+arch.fault=''",
             "+data.fault=''", "data.batch_size=16", "trainer.epochs=1", "logger=none"]  # fmt: skip
    return lambda data, *options: cli(*small, f"data._target_=own_classes.{data}", *options)


def last_row(root: str) -> dict[str, float]:
    (file,) = Path(root).rglob("metrics.jsonl")
    row = json.loads(file.read_text().splitlines()[-1])
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def one_line(run) -> str:
    """The error of a run that was refused before it wrote anything."""
    assert run.code in (1, 2) and not list(Path().rglob("run.json"))
    (line,) = run.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_missing_labels_count_without_being_declared(own):
    """Losses and metrics are those of the labelled samples, of the test data the first 8."""
    rows = []
    for options in ([], ["data.limit_test=8"]):
        run = own("Shapes", "data.fault=missing", f"output_root=root{len(rows)}", *options)
        assert run.code == 0, run.err
        rows.append(last_row(f"root{len(rows)}"))
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)


class Soft(GramianWeighting):
    """Keeps one average in a buffer and a count in a plain attribute."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.register_buffer("average", torch.zeros(self.tasks))
        self.seen = 0

    def weights(self, gramian):
        self.seen += 1
        self.average.lerp_(gramian.diagonal(), 0.1 if self.seen > 1 else 1.0)
        return torch.softmax(-self.average, 0) * self.tasks


class Short(LossWeighting):
    """Keeps nothing."""

    def forward(self, losses):
        return losses.square().sum()


@pytest.mark.parametrize("name", ["Soft", "Short"])
def test_a_method_of_ones_own_is_resumed_bit_for_bit(cli, tmp_path, monkeypatch, name):
    """No such run could be resumed: the library's own attributes were taken for the user's."""
    from mtl.engine.learner import Learner

    words = (f"loss._target_={__name__}.{name}", "arch._target_=golden.problems.Net", "~arch.depth", "data=digits",
             "data.limit_train=32", "data.limit_test=16", "data.batch_size=8", "trainer.epochs=3", "optimizer.lr=0.05",
             "trainer.device=cpu", "logger=none")  # fmt: skip
    whole, real = cli(*words, f"output_root={tmp_path / 'whole'}"), Learner.train_epoch
    assert whole.code == 0 and "WARNING" not in whole.out, whole.out

    def stop(self, batches, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, batches, epoch)

    monkeypatch.setattr(Learner, "train_epoch", stop)
    cli(*words, f"output_root={tmp_path / 'parts'}")
    monkeypatch.setattr(Learner, "train_epoch", real)
    resumed = cli(*words, f"output_root={tmp_path / 'parts'}")
    assert resumed.code == 0, resumed.err
    one, two = (torch.load(next((tmp_path / part).rglob("last.pt")), weights_only=True) for part in ("whole", "parts"))
    for part in ("model", "strategy"):
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part])


def test_a_run_notes_its_own_code_and_the_folder_of_its_data(own):
    assert (run := own("Folder", "+data.root=here")).code == 0, run.err
    code = hashlib.sha256(Path("own_classes.py").read_bytes()).hexdigest()[:8]
    noted = json.loads(next(Path("outputs").rglob("run.json")).read_text())["own"]
    assert noted == {"data": {"own_classes": code, "root": str(Path.cwd() / "here")}, "arch": {"own_classes": code}}


def test_names_that_the_engine_uses_itself_are_free_for_tasks_and_metrics(own):
    assert (run := own("Clash")).code == 0, run.err
    row = last_row("outputs")
    assert row["grad/norm"] > 0 and row["weights/step"] == row["weights/size"] == 1
    assert row["train/step_norm"] == row["train/step_weights"] > 0


@pytest.mark.parametrize(("data", "options", "message"), [
    ("Shapes", "data.fault=class", r"test split: labels of task 'shape': sample 7 has the label 3; .* from 0 to 2"),
    ("Shapes", "data.fault=bug", r"data: Shapes.load\(\): KeyError: 'colour' \(.*own_classes.py:\d+ in \w+; traceback in "),  # noqa: E501
    ("Property", "", r"data: Property: AttributeError: .* attribute 'names' \(.*own_classes.py:\d+ in \w+; traceback in "),  # noqa: E501
    ("Broadcasts", "", r"data: task 'size': WrongTask.criterion returned the shape \(2, 2\)"),
    ("NaNLoss", "data.fault=missing", "task 'size': its loss of a sample without a label is nan; it must be 0"),
    ("NaNMetric", "data.fault=missing", r"update of metric Error added \[nan, 0.0\] for samples without a label"),
    ("Shapes", "arch.fault=bug", r"arch: .* no attribute 'missing' \(.*own_classes.py:\d+ in \w+; traceback in .*\)"),
    ("Shapes", "arch.fault=detached", r"arch: no loss reaches a parameter of Tiny"),
    ("Shapes", "data.batch_size=1 loss=auto_lambda", "data.batch_size=1: AutoLambda divides a batch into 2 parts"),
    ("Shapes", "data.batch_size=2 loss=sdmgrad", "data.batch_size=2: SDMGrad divides a batch into 3 parts"),
])  # fmt: skip
def test_a_fault_is_one_line_before_training(own, data, options, message):
    assert re.search(message, one_line(own(data, *options.split())))


@pytest.mark.parametrize("loss", ["equal", "pcgrad"])
def test_heads_of_any_memory_layout_train_alike_with_a_fused_optimizer(own, loss):
    rows = []
    for fused in ("true", "false"):
        run = own(
            "Shapes",
            "arch._target_=own_classes.Sides",
            "trainer.epochs=2",
            f"loss={loss}",
            f"optimizer.fused={fused}",
            f"output_root=fused_{fused}",
        )
        assert run.code == 0, run.err
        rows.append({k: v for k, v in last_row(f"fused_{fused}").items() if k.startswith(("train/", "test/"))})
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


OLD = {
    "class OldTask(Regression):\n    def head(self, features):\n        return None\n":
        "OldTask defines head, .*decoder",
    "class OldMetric(MeanAbsoluteError):\n    name = 'f1'\n": r"OldMetric: a Metric says scores = \(Score\('f1'\),\)",
    "class Old(Shapes):\n    image_shape = (1, 8, 8)\n": r"data: Old\.image_shape: no Benchmark .* write inputs = ",
    "class Old(Shapes):\n    flip = False\n": r"data: Old\.flip: no Benchmark .* write augment = ",
    "class Old(Shapes):\n    def load(self):\n        return tuple(super().load().values())\n":
        r"Old\.load\(\) returned a tuple of Split, Split; {\"train\": Split",
    "class Old(Shapes):\n    def load(self):\n        return Split(torch.zeros(4, 8, 8, 1), {'shape': None})\n":
        r"Old\.load\(\): TypeError: Split takes a dict of columns.*old_classes\.py:\d+",
}  # fmt: skip


@pytest.mark.parametrize(("source", "message"), OLD.items())
def test_a_class_of_the_old_shape_is_told_what_to_write(own, tmp_path, monkeypatch, source, message):
    monkeypatch.delitem(sys.modules, "old_classes", raising=False)
    (tmp_path / "old_classes.py").write_text(f"from own_classes import *\n\n\n{source}\n\n")
    assert re.search(message, one_line(own("Shapes", "data._target_=old_classes.Old")))
