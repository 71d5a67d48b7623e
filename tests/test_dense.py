"""The ring is general: every method trains classes, depth and normals of pixels, of which the engine knows nothing."""

import json
import re
import signal
from functools import cache
from pathlib import Path

import pytest
import shipped
import torch
import yaml

from mtl.config import schema
from mtl.data.base import Split
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.rooms import Rooms
from mtl.engine import checkpoint
from mtl.engine.build import build_learner, parts
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.engine.switches import Switches
from mtl.errors import ConfigError
from mtl.tracking import Tracker

ROOT = Path(__file__).parents[1]
LOSSES = shipped.options("loss")
VECTORS = ("rep_mtl", "rotograd")
SCORES = {"segmentation": 60.0, "depth": 0.5, "normals": 25.0}
OWN = """
import torch
class MultiTaskLoss(torch.nn.Module):
    def forward(self, segmentation_loss, depth_loss, normals_loss, epoch, total_epochs):
        return segmentation_loss + 0.5 * depth_loss + normals_loss ** 2
"""
NEEDED = {
    "amtl": {"potentials": SCORES},
    "pivrg": {"baselines": SCORES},
    "single": {"task": "depth"},
    "static": {"weights": {"segmentation": 1, "depth": 0.5, "normals": 2}},
    # The same rules, sooner.
    "stch": {"warmup_epochs": 0},
    "annealed_calibrated": {"calibration": 2},
}


class Loaded(Rooms):
    """Two steps of eight images, rendered once for all tests."""

    def __init__(self):
        super().__init__(batch_size=8, train_size=16, test_size=8, height=16, width=24)

    def load(self):
        return images()


@cache
def images() -> dict[str, Split]:
    return Rooms(train_size=16, test_size=8, height=16, width=24).load()


class NoNormals(Loaded):
    """No pixel has a normal."""

    def load(self):
        return {
            name: Split({**s.columns, "normals": torch.full_like(s.columns["normals"], torch.nan)})
            for name, s in super().load().items()
        }


class Two(Loaded):
    """Nobody asks for normals."""

    tasks = Rooms().tasks[:2]


def build(loss: str, kind=Loaded, optimizer: str = "adam", **switches) -> tuple[Learner, TrainingBatches, Rooms]:
    benchmark = kind()
    chosen = {"loss": loss, "optimizer": optimizer, "schedule": "cosine", "microscope": "default", "arch": "fcn",
              "sharing": "hard"}  # fmt: skip
    nodes = {g: yaml.safe_load((ROOT / "conf" / g / f"{name}.yaml").read_text()) for g, name in chosen.items()}
    names = [t.name for t in benchmark.tasks]
    nodes["loss"] |= {
        key: {k: v for k, v in value.items() if k in names} if isinstance(value, dict) else value
        for key, value in NEEDED.get(loss, {}).items()
    }
    nodes["arch"]["width"] = 4
    if loss == "custom":
        Path("own.py").write_text(OWN)
        nodes["loss"]["file"] = "own.py"
    strategy = schema.build(nodes["loss"], "loss", tasks=names)
    tasks = [t for t in benchmark.tasks if t.name in strategy.names]
    cpu, chosen = torch.device("cpu"), Switches(**switches)
    chosen.check(strategy)
    learner = build_learner({"seed": 3, **nodes}, benchmark, tasks, strategy, Execution(2), cpu, chosen)
    train = TrainingBatches(benchmark.splits()["train"], benchmark, cpu, 3, 2 * parts(strategy))
    return learner, train, benchmark


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def trains(learner: Learner, batches: TrainingBatches, benchmark: Rooms) -> None:
    """An epoch: all numbers are finite, and every tensor of the model moves."""
    before = parameters(learner)
    evaluation = EvaluationBatches(benchmark.splits()["test"], benchmark, learner.device)
    row = {**learner.train_epoch(batches, 0), **learner.evaluate(evaluation, "test")}
    assert not [key for key, value in row.items() if not abs(value) < 1e6]
    for task in learner.tasks:
        assert {f"test/{task.name}_{name}" for name in ("loss", *(s.name for s in task.scores))} <= row.keys()
    after = parameters(learner)
    assert not [name for name, p in after.items() if not p.isfinite().all() or torch.equal(p, before[name])]
    learner.epoch_end(row)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("loss", LOSSES)
def test_every_method_trains_on_maps(loss):
    """Two methods refuse features that are no vectors; a third knows accuracies only."""
    if loss in VECTORS:
        with pytest.raises(
            ConfigError, match=r"^loss: \w+ needs features \(N, F\), a vector .*; FCN has \(N, 16, 4, 6"
        ):
            build(loss)
    elif loss == "dtp":
        with pytest.raises(ValueError, match="DTP needs accuracies, and 'depth' has a score that is better when lower"):
            trains(*build(loss))
    else:
        trains(*build(loss))


def of_features(loss: str) -> bool:
    """Whether the method may take its gradients of the features."""
    node = yaml.safe_load((ROOT / "conf" / "loss" / f"{loss}.yaml").read_text()) | NEEDED.get(loss, {})
    if loss in ("custom", *VECTORS):
        return False
    try:
        Switches("features").check(schema.build(node, "loss", tasks=list(SCORES)))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if of_features(loss)])
def test_gradients_of_maps(loss):
    """In place of vectors of features; `features` (N, 16, 4, 6) of an image of 16x24."""
    trains(*build(loss, gradients="features"))


def test_mgda_of_maps_by_hand():
    """The least-norm combination of the two gradients of all numbers in the maps, of one batch."""
    learner, batches, _ = build("mgda", Two, optimizer="sgd", gradients="features")
    batch = next(iter(batches.epoch(0)))
    learner.model.train()
    features = learner.model.backbone(batch["image"])
    heads = learner.model.heads.values()
    losses = [t.loss(h(features), batch[t.column]) for t, h in zip(learner.tasks, heads, strict=True)]
    first, second = (torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in losses)
    share = ((second - first).dot(second) / (first - second).dot(first - second)).clamp(0, 1).item()
    row = learner.train_epoch(batches, 0)
    learner, batches, _ = build("mgda", Two, optimizer="sgd", gradients="features")
    info = learner.step()(learner.forward(batch, learner._groups.units(batch)), len(batch["image"]))
    torch.testing.assert_close(info.weights, torch.tensor([share, 1 - share]), rtol=1e-4, atol=1e-5)
    assert row["weights/segmentation"] + row["weights/depth"] == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------ absence


@pytest.mark.parametrize("loss, switches", [
    ("equal", {}), ("uncertainty", {}), ("dwa", {}), ("famo", {}), ("gls", {}),
    ("mgda", {}), ("nash_mtl", {}), ("cagrad", {}), ("pcgrad", {}), ("graddrop", {}), ("aligned_mtl", {}),
    ("imtl_g", {}), ("mgda", {"gradients": "features"}), ("pcgrad", {"gradients": "features"}),
    ("modo", {}), ("moml", {}), ("auto_lambda", {}),
])  # fmt: skip
def test_a_task_without_a_labelled_pixel_is_not_there(loss, switches):
    """Its head stays, bit for bit; all else moves as in a run of the other two tasks."""
    three, batches, _ = build(loss, NoNormals, **switches)
    two, fewer, _ = build(loss, Two, **switches)
    two.model.load_state_dict({k: v for k, v in three.model.state_dict().items() if not k.startswith("heads.normals")})
    before = parameters(three)
    rows = three.train_epoch(batches, 0), two.train_epoch(fewer, 0)
    after, other = parameters(three), parameters(two)
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("heads.normals"))
    torch.testing.assert_close({k: after[k] for k in other}, other, rtol=0, atol=2e-6)
    assert rows[0]["train/normals_loss"] != rows[0]["train/normals_loss"]  # NaN
    assert all(rows[0][f"train/{t}_loss"] == pytest.approx(rows[1][f"train/{t}_loss"]) for t in ("depth",))


# ------------------------------------------------------------------------------------------------------------ learning


class Some(Rooms):
    """Enough to learn something within two seconds."""

    def __init__(self):
        super().__init__(batch_size=8, train_size=128, test_size=32, height=24, width=32)


def constant(benchmark: Rooms, split: Split) -> dict[str, float]:
    """The scores of the best maps of one value: the commonest class, the median depth, the mean normal."""
    classes, depth, normals = (split.columns[name] for name in ("segmentation", "depth", "normals"))
    commonest = classes[classes >= 0].long().mode().values
    values = {
        "segmentation": torch.nn.functional.one_hot(commonest, benchmark.tasks[0].outputs).float(),
        "depth": depth.nanmedian()[None],
        "normals": normals.nanmean((0, 1, 2)),
    }
    found = {}
    for task in benchmark.tasks:
        (metric,) = task.metrics
        state, target = metric.zero(), split.columns[task.name]
        metric.update(state, values[task.name][None, :, None, None].expand(len(split), -1, *target.shape[1:3]), target)
        found |= {f"{task.name}_{name}": number for name, number in metric.compute(state).items()}
    return found


def test_three_tasks_are_learned():
    learner, batches, benchmark = build("equal", Some)
    learner.trainer = Execution(6)
    test = benchmark.splits()["test"]
    for group in learner.optimizer.param_groups:
        group["initial_lr"] = 0.01
    for epoch in range(6):
        learner.train_epoch(batches, epoch)
    row = learner.evaluate(EvaluationBatches(test, benchmark, learner.device), "test")
    trivial = constant(benchmark, test)
    assert row["test/segmentation_miou"] > 2.5 * trivial["segmentation_miou"]
    assert row["test/segmentation_pixel_accuracy"] > 1.3 * trivial["segmentation_pixel_accuracy"]
    assert row["test/depth_abs_err"] < 0.8 * trivial["depth_abs_err"]
    assert row["test/normals_mean"] < 0.7 * trivial["normals_mean"]


# --------------------------------------------------------------------------------------------------------- whole runs

SMALL = ("experiment=rooms", "data.train_size=16", "data.test_size=8", "data.height=16", "data.width=24",
         "data.batch_size=8", "arch.width=4", "trainer.epochs=3", "trainer.device=cpu")  # fmt: skip


def left(root: str) -> list:
    (file,) = Path(root).rglob("metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return [rows, *(checkpoint.load(file.parent / name) for name in ("last.pt", "best.pt"))]


@pytest.mark.parametrize(
    "options", [("loss=uncertainty",), ("loss=mgda", "step.gradients=features"), ("loss=graddrop",)]
)
def test_an_interrupted_run_of_maps_goes_on_exactly(cli, monkeypatch, options):
    """SIGTERM after the first epoch; the second start ends where an uninterrupted run ends, to the bit."""
    assert cli(*SMALL, "output_root=whole", *options).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, row: signal.raise_signal(signal.SIGTERM))
        assert cli(*SMALL, "output_root=parts", *options).code == 143
    again = cli(*SMALL, "output_root=parts", *options)
    assert again.code == 0 and "after epoch 1" in again.out
    torch.testing.assert_close(left("parts"), left("whole"), rtol=0, atol=0)


def test_a_table_of_maps(cli):
    """Every score of every task, under the microscope too."""
    result = cli(*SMALL, "loss=pcgrad", "microscope.every=1", "output_root=out")
    assert result.code == 0, result.err
    names = ["segmentation_miou", "segmentation_pixel_accuracy", "depth_abs_err", "depth_rel_err", "normals_mean",
             "normals_median", "normals_11", "normals_22", "normals_30"]  # fmt: skip
    assert [line.split()[0] for line in result.out.splitlines() if re.match(r"\w+_\w+ +[\d.]+ ", line)] == names


@pytest.mark.parametrize("options, message", [
    (("data.height=18",), "FCN needs images whose height and width are multiples of 4, not 18x24"),
    (("arch=resnet20",), "a map (2, 6, 16, 24) of predictions, but the model predicts the shape (2, 6); networks with"),
])  # fmt: skip
def test_what_makes_no_maps_is_refused_in_a_line(cli, options, message):
    """Before an image is trained on."""
    result = cli(*(word for word in SMALL if word != "arch.width=4"), *options)
    assert (
        result.code in (1, 2) and message in result.err and result.err.count("\n") == 1 and not Path("outputs").exists()
    )


def test_nobody_else_knows_of_pixels():
    """Only tasks, metrics, views, data and architectures do, and the certificates' problem on maps."""
    words = re.compile(
        r"(tasks|metrics)\.dense|\b(Segmentation|Depth|Normals|Rooms|FCN|[Pp]ixels?|segmentation|normals)\b"
    )
    knowing = ("tasks", "metrics", "views", "data", "archs", "certify")
    files = [file for file in shipped.files("mtl/**/*.py") if file.relative_to(ROOT / "mtl").parts[0] not in knowing]
    assert len(files) > 100
    found = [(str(file), line) for file in files for line in file.read_text().splitlines() if words.search(line)]
    assert not found
