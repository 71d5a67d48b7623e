"""Every kind of data, task and model through the command line: tables, label maps, experts, official validation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional as F

from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine.learner import Learner

OWN = '''
from dataclasses import dataclass

import torch
from torch import nn

from mtl.archs.model import Model, Outputs
from mtl.data.base import Benchmark, Split
from mtl.data.inputs import Image, Numbers
from mtl.metrics.base import Metric, Score
from mtl.tasks import Classification, Regression, Task
from mtl.views import Crop, Flip, Pixels


@dataclass
class Table(Benchmark):
    """Rows of five numbers; two tasks read the same column, and most samples lack a label of some task."""

    tasks = (Classification("kind", 3), Regression("size"), Classification("again", 3, target="kind"))
    inputs = {"row": Numbers((5,))}
    official: bool = False

    def load(self):
        draws = torch.Generator().manual_seed(0)

        def split(count):
            row = torch.randn(count, 5, generator=draws, dtype=torch.float64)
            kind, size = (row[:, 0] > 0).long() + (row[:, 1] > 0), row.sum(1)
            kind[1::3], size[::4] = -100, torch.nan
            return Split({"row": row, "kind": kind, "size": size})

        parts = {"train": split(61), "test": split(23)}
        return {**parts, "val": split(17)} if self.official else parts


class MLP(nn.Module):
    inputs, out_features = ("row",), 8

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh())

    def forward(self, row):
        return self.body(row)


class MMoE(Model):
    """Ma et al., KDD 2018: experts for all, and for each task a gate and a tower."""

    inputs = ("row",)

    def __init__(self, tasks, experts: int = 2, declared: str = "right"):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(experts))
        self.gates = nn.ModuleDict({t.name: nn.Linear(5, experts) for t in tasks})
        self.towers = nn.ModuleDict({t.name: nn.Linear(4, t.outputs) for t in tasks})
        self.declared = declared
        if declared in ("unused", "frozen"):
            self.spare = nn.Linear(2, 2).requires_grad_(declared == "unused")

    def forward(self, batch):
        x, predictions = batch["row"], []
        keep = torch.rand(len(self.experts)) < 0.5 if self.declared == "drops" and self.training else None
        for name, gate in self.gates.items():
            kept = [e(x) if keep is None or keep[i] else x[:, :4] for i, e in enumerate(self.experts)]
            mixed = torch.einsum("ne,enf->nf", gate(x).softmax(1), torch.stack(kept))
            predictions.append(self.towers[name](mixed.tanh()))
        return Outputs(predictions)

    def shared_parameters(self):
        shared = [*self.experts.parameters()]
        if self.declared == "expert":
            shared = [*self.experts[1:].parameters()]
        if self.declared == "gate":
            shared += [*self.gates["size"].parameters()]
        if self.declared in ("unused", "frozen"):
            shared += [*self.spare.parameters()]
        return shared

    def own_parameters(self, task):
        own = [*self.towers[task].parameters()]
        if not (self.declared == "gate" and task == "size"):
            own += [*self.gates[task].parameters()]
        if self.declared == "expert" and task == "kind":
            own += [*self.experts[0].parameters()]
        if self.declared == "twice" and task != "again":  # and among the shared parameters
            own += [*self.experts[0].parameters()]
        if self.declared == "stranger":
            own += [nn.Parameter(torch.zeros(3))]
        if self.declared == "module":
            own = [self.towers[task]]
        return own[1:] if self.declared == "forgotten" and task == "again" else own


class IoU(Metric):
    """Of two classes; one state, two scores."""

    scores = (Score("miou", "%"), Score("pixel_accuracy", "%"))

    def zero(self):
        return torch.zeros(2, 2, dtype=torch.int64)

    def update(self, state, prediction, target):
        known = target != -100
        cells = torch.where(known, target.clamp(min=0) * 2 + prediction.argmax(1), 0)
        state += torch.zeros(4, dtype=torch.int64).index_add_(0, cells.flatten(), known.flatten().long()).view(2, 2)

    def compute(self, state):
        right = state.diagonal()
        union = state.sum(0) + state.sum(1) - right
        return {"miou": 100 * (right / union).mean().item(), "pixel_accuracy": 100 * (right.sum() / state.sum()).item()}


@dataclass(frozen=True)
class Mask(Task):
    """Cross-entropy over the labelled pixels: predictions (N, outputs, H, W), targets (N, H, W), -100 for no label."""

    outputs: int = 2
    moves = Pixels()

    @property
    def metrics(self):
        return (IoU(),)

    def units(self, target):
        return (target != -100).flatten(1).sum(1)

    def criterion(self, prediction, target):
        return nn.functional.cross_entropy(prediction, target.long(), ignore_index=-100, reduction="none").sum((1, 2))


@dataclass
class Masks(Benchmark):
    """A pixel is of class 1 where its image is bright; so an augmented map can be told from its augmented image."""

    tasks = (Mask("mask"), Classification("kind", 2))
    inputs = {"image": Image((1, 6, 6))}
    augment = (Crop(2), Flip())

    def load(self):
        def split(count):
            draws = torch.Generator().manual_seed(count)
            image = torch.randint(1, 256, (count, 6, 6, 1), dtype=torch.uint8, generator=draws)
            mask = (image[..., 0] > 127).to(torch.int16)
            mask[1] = -100
            mask[2, :3] = -100
            return Split({"image": image, "mask": mask, "kind": torch.arange(count) % 2})

        return {"train": split(37), "test": split(11)}


class Dense(nn.Module):
    """Features are maps; the decoder of a map is a convolution, that of a class takes a mean."""

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)

    def decoder(self, task):
        if task.name == "mask":
            return nn.Conv2d(4, task.outputs, 1)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, task.outputs))

    def forward(self, x):
        return self.conv(x).tanh()
'''
SMALL = ("data=digits", "arch=vgg16_bn", "~arch.dropout", "data.batch_size=16", "trainer.epochs=1", "logger=none",
         "optimizer.lr=0.01", "data.residency=host", "data.workers=0")  # fmt: skip


@pytest.fixture
def own(cli, tmp_path, monkeypatch):
    """`own("Table", "MLP", "loss=pcgrad")` trains that data set on that network of a stranger's package."""
    torch.set_num_threads(1)
    (tmp_path / "ring_classes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    targets = lambda data, arch: (f"data._target_=ring_classes.{data}", f"arch._target_=ring_classes.{arch}")  # noqa: E731
    return lambda data, arch, *options: cli(*SMALL, *targets(data, arch), *options)


class Grabbed(BaseException):
    """Ends a run before its first step."""


@pytest.fixture
def build(own, monkeypatch):
    """`build("Table", "MLP")` returns the learner and the training batches of that command."""

    def call(*arguments) -> tuple[Learner, TrainingBatches]:
        def grab(*found):
            built.extend(found)
            raise Grabbed

        built: list = []
        with monkeypatch.context() as patch, pytest.raises(Grabbed):
            patch.setattr(Learner, "train_epoch", grab)
            own(*arguments)
        return built[0], built[1]

    return call


def results(root: str = "outputs") -> tuple[list[dict], dict]:
    (file,) = Path(root).rglob("metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return rows, json.loads((file.parent / "summary.json").read_text())


def refused(run) -> str:
    """The one line of a run that was refused before it wrote anything."""
    assert run.code in (1, 2) and not list(Path().rglob("run.json")), run.out
    (line,) = run.err.splitlines()
    return line


# ------------------------------------------------------------------------------------------------------------ no images


def by_hand(learner: Learner, columns: dict) -> dict[str, float]:
    """Losses and metrics of `Table` on all labelled samples at once."""
    with torch.no_grad():
        outputs = learner.model.eval()({"row": columns["row"].float()}).predictions
    kind, size = columns["kind"], columns["size"]
    classes, numbers = kind >= 0, ~size.isnan()
    found = {}
    for task, y in (("kind", outputs[0]), ("again", outputs[2])):
        found[f"{task}_loss"] = F.cross_entropy(y[classes], kind[classes]).item()
        found[f"{task}_accuracy"] = 100 * sklearn_metrics.accuracy_score(kind[classes], y[classes].argmax(1))
    y = outputs[1][numbers, 0]
    found["size_loss"] = F.smooth_l1_loss(y, size[numbers].float()).item()
    found["size_mae"] = sklearn_metrics.mean_absolute_error(size[numbers], y)
    return found


@pytest.mark.parametrize("loss", ["equal", "pcgrad", "rotograd"])
def test_a_table_trains_through_the_command_line(own, loss):
    run = own("Table", "MLP", f"loss={loss}", "trainer.epochs=2")
    assert run.code == 0, run.err
    rows, _ = results()
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert {key for key in rows[1] if key.startswith("test/")} == {
        "test/kind_loss", "test/kind_accuracy", "test/size_loss", "test/size_mae", "test/again_loss",
        "test/again_accuracy",
    }  # fmt: skip
    assert rows[1]["train/size_loss"] < rows[0]["train/size_loss"]


def test_an_epoch_of_shuffled_batches_equals_the_whole_split_at_once(build):
    """Batches of 16, with unequal numbers of labels; the weights stand still, as the rate is next to nothing."""
    learner, batches = build("Table", "MLP", "data.eval_batch_size=7", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    counts = [int(learner.tasks[0].count(batch["kind"])) for batch in batches.epoch(0)]
    assert len(set(counts)) > 1
    row, expected = learner.train_epoch(batches, 0), by_hand(learner, batches.split.columns)
    assert {key: row[f"train/{key}"] for key in expected} == pytest.approx(expected, rel=1e-5)
    split = batches.benchmark.splits()["test"]
    row = learner.evaluate(EvaluationBatches(split, batches.benchmark, learner.device), "test")
    assert row == pytest.approx({f"test/{k}": v for k, v in by_hand(learner, split.columns).items()}, rel=1e-5)


def test_official_validation_data_selects(own):
    """best.pt and the row "selected" are of the epoch with the best validation metric, not the best test metric."""
    run = own("Table", "MLP", "+data.official=true", "trainer.epochs=4", "optimizer.lr=0.3")
    assert run.code == 0, run.err
    rows, summary = results()
    best = max(rows, key=lambda row: (row["val/kind_accuracy"], -row["epoch"]))
    assert summary["selected"]["by"] == "val/kind_accuracy" and summary["selected"]["epoch"] == best["epoch"]
    assert summary["selected"]["test/size_mae"] == best["test/size_mae"]
    held_out = own("Table", "MLP", "+data.official=true", "data.val_fraction=0.2", "output_root=other")
    (line,) = held_out.err.splitlines()
    assert held_out.code == 2 and line == ("error: data.val_fraction=0.2: Table has validation data of its own; use 0")


def test_a_network_that_reads_another_column_is_refused(own):
    line = refused(own("Masks", "MLP"))
    assert line == "error: arch: MLP reads row; the data has image; a network names what it reads in `inputs`"


# ----------------------------------------------------------------------------------------------------- who owns what


@pytest.mark.parametrize("loss", ["equal", "pcgrad"])
@pytest.mark.parametrize("declared", ["right", "frozen", "drops"])
def test_experts_declared_rightly_train(own, loss, declared):
    run = own("Table", "MMoE", f"loss={loss}", f"+arch.declared={declared}", "+arch.experts=3")
    assert run.code == 0, run.err
    (row,), _ = results()
    assert all(np.isfinite(value) for value in row.values()) and row["grad/norm"] > 0


def test_experts_get_the_gradients_of_all_tasks_and_gates_their_own(build):
    """One step of plain SGD against autograd by hand."""
    learner, batches = build("Table", "MMoE", "loss=equal", "optimizer.weight_decay=0", "optimizer.momentum=0")
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    batch = next(iter(batches.epoch(0)))
    outputs = learner.model(batch).predictions
    known, sized = batch["kind"] >= 0, ~batch["size"].isnan()
    losses = [
        F.cross_entropy(outputs[0][known], batch["kind"][known]),
        F.smooth_l1_loss(outputs[1][sized, 0], batch["size"][sized].float()),
        F.cross_entropy(outputs[2][known], batch["kind"][known]),
    ]
    slopes = torch.autograd.grad(sum(losses), list(learner.model.parameters()))
    learner._set_rate(0, 1)
    learner.step()(learner.forward(batch, learner._groups.units(batch)), 16, None)
    for (name, p), slope in zip(learner.model.named_parameters(), slopes, strict=True):
        torch.testing.assert_close(p.detach(), before[name] - 0.01 * slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ("loss=rotograd", r"loss: RotoGrad works on the features between backbone and heads, and MMoE has none"),
    ("loss=pcgrad step.gradients=features", r"loss: PCGrad works on the features .* MMoE has none"),
    ("+arch.declared=expert", r"arch: experts.0.weight is declared task 'kind''s own, but task '(again|size)' uses it"),
    ("+arch.declared=gate", r"arch: gates.size.weight is declared shared, but only task 'size' uses it"),
    ("+arch.declared=forgotten", r"arch: towers.again.weight is neither a shared parameter nor a task's own"),
    ("+arch.declared=unused", r"arch: no task uses the parameter spare.weight and 1 more"),
    ("+arch.declared=twice", r"arch: experts.0.weight is declared both 'kind''s and 'size''s own; declare it shared"),
    ("+arch.declared=stranger", r"arch: MMoE.own_parameters\('kind'\) has a Parameter of shape \(3,\) that is not a"),
    ("+arch.declared=module", r"arch: MMoE.own_parameters\('kind'\) has a Linear that is not a parameter of MMoE"),
])  # fmt: skip
def test_what_experts_cannot_do_is_one_line(own, options, message):
    assert re.match(f"error: {message}", refused(own("Table", "MMoE", *options.split())))


# ---------------------------------------------------------------------------------------------------------- label maps


def test_maps_train_and_are_measured_by_pixels(build):
    """Losses and both scores of one confusion matrix, over all labelled pixels of the test images."""
    learner, batches = build("Masks", "Dense")
    learner.train_epoch(batches, 0)
    split = batches.benchmark.splits()["test"]
    row = learner.evaluate(EvaluationBatches(split, batches.benchmark, learner.device), "test")
    with torch.no_grad():
        images = split.columns["image"].permute(0, 3, 1, 2) / 255
        prediction = learner.model.eval()({"image": images}).predictions[0].permute(0, 2, 3, 1)
    known = split.columns["mask"] != -100
    y, labels = prediction[known], split.columns["mask"][known].long()
    assert known.sum() == 11 * 36 - 36 - 18
    assert row["test/mask_loss"] == pytest.approx(F.cross_entropy(y, labels).item(), rel=1e-5)
    score = sklearn_metrics.jaccard_score(labels, y.argmax(1), average="macro")
    assert row["test/mask_miou"] == pytest.approx(100 * score)
    score = sklearn_metrics.accuracy_score(labels, y.argmax(1))
    assert row["test/mask_pixel_accuracy"] == pytest.approx(100 * score)


def test_maps_follow_their_images(build):
    """Wherever a pixel's class is known, it is that of the pixel shown; black from outside has no label."""
    _, batches = build("Masks", "Dense")
    moved = 0
    for batch in batches.epoch(3):
        image, mask = batch["image"][:, 0] * 255, batch["mask"]
        known = mask != -100
        assert torch.equal(mask[known], (image[known] > 127).long())
        assert not known[image == 0].any()  # the data holds no black pixel
        moved += int((image == 0).sum())
    assert moved > 0


def test_a_map_trains_with_any_kind_of_method(own):
    for loss in ("pcgrad", "graddrop", "mgda"):
        run = own("Masks", "Dense", f"loss={loss}", f"output_root={loss}")
        assert run.code == 0, run.err
        (row,), _ = results(loss)
        assert 0 <= row["test/mask_miou"] <= 100 and np.isfinite(row["train/mask_loss"])


def test_a_rotation_of_maps_is_refused(own):
    line = refused(own("Masks", "Dense", "loss=rotograd"))
    assert line == "error: loss: RotoGrad needs features (N, F), a vector for each sample; Dense has (N, 4, 6, 6)"
