"""The gradient microscope: against plain loops in NumPy, in every kind of step, and without a trace in the run."""

import copy
import itertools
import json
import signal
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

from mtl.archs.model import HardSharing
from mtl.archs.resnet import ResNet, WideResNet
from mtl.archs.vgg import VGG16BN
from mtl.config import schema
from mtl.config.identity import identify
from mtl.data.batches import TrainingBatches
from mtl.engine.build import build_learner
from mtl.inspect import microscope
from mtl.inspect.microscope import GradientObserver, Microscope, layer_groups
from mtl.metrics.tally import Tally
from mtl.tasks import Classification, Regression
from mtl.tracking import Tracker

# Batches of 32 and 18.
SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=20", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "optimizer.lr=0.01", "trainer.epochs=2", "logger=none")  # fmt: skip
SPARSE = "data._target_=test_engine.Sparse +data.blind=false data.batch_size=5 data.limit_train=25"


def build(options: str):
    """The learner and the batches of the small run."""
    torch.set_num_threads(1)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", [*SMALL, *options.split()]), resolve=True)
    benchmark = schema.build(config["data"], "data")
    strategy = schema.build(config["loss"], "loss", tasks=[t.name for t in benchmark.tasks])
    tasks = [t for t in benchmark.tasks if t.name in strategy.names]
    trainer, switches = (schema.build(config[node], node) for node in ("trainer", "step"))
    device = trainer.open_device()
    learner = build_learner(config, benchmark, tasks, strategy, trainer, device, switches)
    return learner, TrainingBatches(benchmark.splits()["train"], benchmark, device, 0, 2 * max(strategy.samples, 2))


def micro(row: dict) -> dict:
    return {k: v for k, v in row.items() if k.startswith("micro/")}


# ----------------------------------------------------------------------------------------------------------- the oracle


class Net(nn.Module):
    """Children, a nested child, a parameter without a module, and one that is not trained."""

    out_features = 4

    def __init__(self):
        super().__init__()
        # Without a bias: batch norm makes its gradient 0 but for rounding, which has a sign.
        self.conv, self.norm = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(12, 5), nn.Tanh()), nn.Linear(5, 4))
        self.scale, self.frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        return self.body(self.norm(self.conv(x)).relu().flatten(1)) * self.scale * self.frozen


OF_NET = {"conv": "conv", "norm": "norm", "body": "body", "scale": "scale"}  # the first part of a name is its group
TASKS = [Classification("a", 3), Classification("b", 2), Regression("c")]
WEIGHTS = (0.5, 2.0, 3.0)


def pair(a, b):
    """The three statistics by their formulas; 0 with a gradient of 0."""
    lengths = np.sqrt((a**2).sum()), np.sqrt((b**2).sum())
    conflict = np.mean([x * y < 0 for x, y in zip(a, b, strict=True)])
    if 0 in lengths:
        return {"cosine": 0.0, "magnitude": 0.0, "sign_conflict": conflict}
    magnitude = 2 * lengths[0] * lengths[1] / (lengths[0] ** 2 + lengths[1] ** 2)
    return {"cosine": a @ b / lengths[0] / lengths[1], "magnitude": magnitude, "sign_conflict": conflict}


class Oracle:
    """One batch in plain loops: every gradient from a forward and backward pass of its own, losses by hand."""

    def __init__(self, model, images, targets, samples):
        self.model, self.images, self.targets, self.samples = model, images, targets, samples

    def loss(self, predictions, task, n):
        y = self.targets[task][n]
        if task == "c":
            gap = (predictions[2][n, 0] - y).abs()
            return gap**2 / 2 if gap < 1 else gap - 0.5
        return -predictions["ab".index(task)][n].log_softmax(0)[y]

    def labelled(self, task, n):
        y = self.targets[task][n]
        return not (torch.isnan(y) if task == "c" else y == -100)

    def gradient(self, of):
        model = copy.deepcopy(self.model)
        of(model({"image": self.images}).predictions).backward()
        parts = defaultdict(list)
        for name, p in model.backbone.named_parameters():
            if p.requires_grad:
                for group in (OF_NET[name.split(".")[0]], "all"):
                    parts[group].append(p.grad.numpy().ravel())
        return {group: np.concatenate(values) for group, values in parts.items()}

    def of_sample(self, task, n):
        return self.gradient(lambda p: self.loss(p, task, n))

    def of_task(self, task):
        known = [n for n in range(len(self.images)) if self.labelled(task, n)]
        return self.gradient(lambda p: sum(self.loss(p, task, n) for n in known) / len(known)) if known else None

    def combined(self, n):
        known = [(w, t) for w, t in zip(WEIGHTS, "abc", strict=True) if self.labelled(t, n)]
        return self.gradient(lambda p: sum(w * self.loss(p, t, n) for w, t in known))

    def figures(self):
        """{name: [the gradients of one set whose pairs count, …]}, averaged over the pairs."""
        first = range(min(self.samples, len(self.images)))
        sets = {"tasks": [[g for t in "abc" if (g := self.of_task(t)) is not None]]}
        sets["tasks_per_sample"] = [[self.of_sample(t, n) for t in "abc" if self.labelled(t, n)] for n in first]
        for t in "abc":
            sets[f"samples/{t}"] = [[self.of_sample(t, n) for n in first if self.labelled(t, n)]]
        sets["samples/combined"] = [[self.combined(n) for n in first if any(self.labelled(t, n) for t in "abc")]]
        values = defaultdict(list)
        for name, members in sets.items():
            for a, b in itertools.chain(*(itertools.combinations(m, 2) for m in members)):
                for group in a:
                    for statistic, value in pair(a[group], b[group]).items():
                        values[f"micro/{name}/{statistic}/{group}"].append(value)
        return {key: np.mean(v) for key, v in values.items()}


def batch(model, size, c):
    """Images and labels; sample 1 has none of a and b, `c` are the samples with one of c, and the first of these is hit
    exactly: its gradient is 0."""
    images = torch.randn(size, 1, 4, 4, dtype=torch.float64)
    targets = {"a": torch.arange(size) % 3, "b": torch.arange(size) % 2, "c": torch.full((size,), torch.nan).double()}
    targets["a"][1] = targets["b"][1] = -100
    targets["c"][c] = torch.randn(len(c), dtype=torch.float64)
    if c:
        targets["c"][c[0]] = copy.deepcopy(model)({"image": images}).predictions[2][c[0], 0].detach()
    return images, targets


def test_against_loops_in_numpy():
    """Two observed steps: one with rare labels and a zero gradient, one with fewer samples than asked for and without
    any label of c. A figure is the mean over the steps that have one."""
    torch.manual_seed(0)
    model = HardSharing(Net(), TASKS).double().train()
    tally, expected = Tally(), defaultdict(list)
    observer = GradientObserver(4, TASKS, model, False, False, tally)
    for size, c in ((6, [0, 2, 3, 5]), (3, [])):
        images, targets = batch(model, size, c)
        for key, value in Oracle(model, images, targets, 4).figures().items():
            expected[key].append(value)
        predictions = model({"image": images}).predictions
        observer.before(predictions, [t.loss(p, targets[t.name]) for t, p in zip(TASKS, predictions, strict=True)],
                        targets)  # fmt: skip
        observer.after(torch.tensor(WEIGHTS))
    found = observer.figures(tally.read())
    assert set(found) == set(expected) and len(found) == 6 * 3 * 5
    assert len(expected["micro/samples/c/cosine/all"]) == 1 and len(expected["micro/tasks/cosine/all"]) == 2
    assert found == pytest.approx({key: np.mean(v) for key, v in expected.items()}, rel=1e-6, abs=1e-7)
    assert all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------------------------- in the engine


SAME = ("loss=pcgrad step.gradients=features", "loss=equal step.transform=log", "loss=graddrop",
        "loss=equal step.scale=norm", "loss=equal optimizer=adatask", "loss=equal optimizer=mtl_io",
        "loss=rotograd loss.lr=null", "loss=cagrad step.transform=log",
        "loss=cagrad trainer.channels_last=false")  # fmt: skip


def test_the_figures_do_not_depend_on_how_the_step_is_made(double):
    """At a learning rate of 0 all strategies see the same weights. Where a step's own Jacobian is used, it must give
    what the microscope's own passes give; the sum of the tasks alone is weighted."""
    common = "optimizer.lr=1e-30 microscope.every=1 microscope.samples=3"
    (learner, batches), *others = [build(f"{common} {options}") for options in ("loss=equal", *SAME)]
    expected = micro(double(learner).train_epoch(batches, 0))
    assert len(expected) == 6 * 3 * 6
    for learner, batches in others:
        found = micro(double(learner).train_epoch(batches, 0))
        assert set(found) == set(expected)
        unweighted = {k for k in expected if "combined" not in k}
        assert {k: found[k] for k in unweighted} == pytest.approx({k: expected[k] for k in unweighted}, abs=1e-6)


@pytest.mark.parametrize("loss", ["pcgrad", "db_mtl"])
def test_the_whole_network_agrees_with_the_steps_own_figures(loss):
    learner, batches = build(f"loss={loss} microscope.every=1 microscope.samples=0")
    row = learner.train_epoch(batches, 0)
    found = [row[f"micro/tasks/{name}/all"] for name in ("cosine", "magnitude")]
    assert found == pytest.approx([row["grad/cosine"], row["grad/magnitude"]], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "more"),
    [("loss=pcgrad microscope.samples=0", 0), ("loss=equal microscope.samples=0", 2 * 3),
     ("loss=pcgrad microscope.samples=2", 2 * 6), ("loss=modo microscope.samples=0", 2 * 3),
     ("loss=single loss.task=odd microscope.samples=4", 2 * 4)],
)  # fmt: skip
def test_backward_passes_are_made_on_the_observed_steps_only(options, more, monkeypatch):
    """Steps 0 and 2 of four; none where the step's own Jacobian will do."""
    counts, real = [], torch.autograd.grad
    learner, batches = build(f"{options} data.limit_train=120")
    assert len(batches) == 4
    for every in (0, 2):
        learner.microscope = Microscope(every, learner.microscope.samples)
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", lambda *a, to=calls, **k: to.append(1) or real(*a, **k))
            learner.train_epoch(batches, 0)
        counts.append(len(calls))
    assert counts[1] - counts[0] == more


UNTOUCHED = ("loss=equal", "loss=rlw", "loss=pcgrad", "loss=graddrop", "loss=modo", "loss=sdmgrad", "loss=rotograd",
             "loss=auto_lambda", "loss=famo", "loss=rep_mtl", "loss=single loss.task=odd",
             "loss=mgda step.gradients=features", "loss=equal optimizer=adatask", "loss=equal optimizer=mtl_io",
             "loss=uncertainty trainer.precision=bf16 data.limit_train=32", f"loss=cagrad {SPARSE}",
             f"loss=equal {SPARSE}")  # fmt: skip


@pytest.mark.parametrize("options", UNTOUCHED)
def test_a_run_ends_in_the_same_bits_with_and_without(options):
    """Weights, averages of batch norm, dropout, optimizer, method, gradients, random stream, all other figures."""
    ends, rows = [], []
    for every in (0, 1):
        learner, batches = build(f"{options} arch.dropout=0.3 microscope.every={every} microscope.samples=3")
        rows.append(learner.train_epoch(batches, 0))
        gradients = [p.grad for p in learner.model.parameters()]
        ends.append([learner.state(), gradients, torch.random.get_rng_state()])
    torch.testing.assert_close(*ends, rtol=0, atol=0, equal_nan=True)
    plain, watched = ({k: v for k, v in row.items() if not k.startswith("time/")} for row in rows)
    figures = micro(watched)
    assert figures and np.isfinite([*figures.values()]).all()
    others = {k: v for k, v in watched.items() if k not in figures}
    torch.testing.assert_close(others, plain, rtol=0, atol=0, equal_nan=True)


def test_one_task_has_samples_only():
    learner, batches = build("loss=single loss.task=odd microscope.every=1")
    names = {key.partition("/cosine")[0] for key in micro(learner.train_epoch(batches, 0)) if "/cosine" in key}
    assert names == {"micro/samples/odd"}


def test_nothing_waits_for_the_device(monkeypatch):
    """The host reads as often in an epoch of six steps as in one of two."""
    monkeypatch.setattr("mtl.engine.guard.host", lambda flags: None)  # as on a GPU: flags are not read at once
    counts = []
    for size in (64, 192):
        learner, batches = build(f"data.limit_train={size} microscope.every=1 microscope.samples=2")
        reads: list[str] = []
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
                real = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda *a, f=real, to=reads, n=name: to.append(n) or f(*a))
            learner.train_epoch(batches, 0)
        counts.append(reads)
    assert [] != counts[0] == counts[1]


# --------------------------------------------------------------------------------------------------------- layer groups


def sizes(backbone):
    return {name: sum(p.numel() for p in group) for name, group in layer_groups(HardSharing(backbone, TASKS)).items()}


def test_layer_groups():
    """Counted by hand: 9 c_in c_out a convolution, 2 c a batch norm, c_in c_out + 2 c a projection shortcut."""

    def stage(inputs, width, blocks, shortcut):
        convolutions = 9 * width * (inputs + (2 * blocks - 1) * width) + 4 * width * blocks
        return convolutions + shortcut * (inputs * width + 2 * width)

    expected = {"stem": 27 * 16 + 32, "layer1": stage(16, 16, 3, 0), "layer2": stage(16, 32, 3, 1)}
    assert sizes(ResNet(3, 20)) == {**expected, "layer3": stage(32, 64, 3, 1)}
    assert list(sizes(ResNet(3, 18))) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert list(sizes(WideResNet(3, 16, 1))) == ["stem", "layer1", "layer2", "layer3", "bn"]
    widths = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]
    vgg = {f"block{i + 1}": sum(9 * a * b + 3 * b for a, b in itertools.pairwise(w)) for i, w in enumerate(widths)}
    assert sizes(VGG16BN(3)) == {**vgg, "hidden": 2 * (512 * 512 + 512)}
    assert sizes(Net()) == {"conv": 27, "norm": 6, "body": 65 + 24, "scale": 4}


# ---------------------------------------------------------------------------------------------------- the command line


def rows_of(root: str) -> list[dict]:
    (file,) = Path(root).rglob("metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_run_goes_on_under_the_microscope(cli, monkeypatch):
    command = (*SMALL, "arch.dropout=0.3", "microscope.every=2", "microscope.samples=2")
    whole = cli(*command, "output_root=whole")
    assert whole.code == 0, whole.err
    assert "every 2 steps, 2 samples: 9 more backward passes on such a step, about +300 % time" in whole.out
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, row: signal.raise_signal(signal.SIGTERM))
        assert cli(*command, "output_root=parts").code == 143
    assert "after epoch 1" in cli(*command, "output_root=parts").out
    assert rows_of("parts") == rows_of("whole") and len(micro(rows_of("whole")[1])) == 6 * 3 * 6
    # The same run to the engine: it is done, whatever was looked at.
    assert "finished" in cli(*SMALL, "arch.dropout=0.3", "output_root=whole").out.splitlines()[0]


def test_it_decides_no_identity():
    digests = set()
    for overrides in ([], ["microscope.every=7", "microscope.samples=3"], ["~microscope"]):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", overrides), resolve=True)
        digests.add(identify(config, dict.fromkeys(("data", "arch", "loss"), "x")).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [("microscope.every=-1", "microscope.every=-1: must be greater than or equal to 0"),
     ("microscope.samples=-1", "microscope.samples=-1: must be greater than or equal to 0"),
     ("microscope.samles=4", "did you mean samples?"),
     ("microscope.every=5 microscope.samples=33", "microscope.samples=33: must be at most data.batch_size=32")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(cli, options, words):
    result = cli(*SMALL, *options.split())
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1 and not Path("outputs").exists()


def test_by_default_it_fits_small_batches():
    """NYUv2 has batches of two. The default is eight samples, or as many as there are."""
    looked = {}
    for options in ("", "microscope.samples=2"):
        learner, batches = build(f"microscope.every=1 data.batch_size=2 data.limit_train=4 {options}")
        looked[options] = micro(learner.train_epoch(batches, 0))
        assert "2 samples: 6 more backward passes" in learner.microscope.describe(3, 3, True, False, 2, 2, 4)
    assert len(looked[""]) > 10 and looked[""] == looked["microscope.samples=2"]
    assert Microscope(1).most == 8


def test_a_large_cost_is_said_with_the_cure():
    """CelebA: 40 tasks, and 5,176,640 shared numbers."""
    forty = (40, 3, False, False, 18, 256, 4 * 5_176_640)
    assert Microscope(18).describe(*forty) == (
        "every 18 steps, 8 samples: 360 more backward passes on such a step, about +1333 % time and at least "
        "6.2 GiB of memory; microscope.samples=0 leaves 40 of the passes"
    )
    assert Microscope(18, samples=0).describe(*forty) == (
        "every 18 steps, 0 samples: 40 more backward passes on such a step, about +148 % time"
    )


def test_a_task_may_not_be_called_as_their_sum_is():
    Microscope().check(4, ["combined"])  # off
    with pytest.raises(ValueError, match="combined"):
        Microscope(every=1).check(32, ["fine", "combined"])


def test_long_gradients_are_copied_a_piece_at_a_time(monkeypatch):
    """In float64, with signs and sizes, a copy takes six times the memory of the gradients."""
    block, sizes = torch.randn(2, 3, 100), []
    monkeypatch.setattr(microscope, "double", lambda x: sizes.append(x.numel()) or x.double())
    whole, pieces = microscope._Moments(1), microscope._Moments(1)
    whole.add(0, block)
    monkeypatch.setattr(microscope, "COPIED", 48)
    pieces.add(0, block)
    assert sizes[0] == 600 and max(sizes[1:]) == 48 and sum(sizes[1:]) == 600
    torch.testing.assert_close(pieces.read(), whole.read(), rtol=1e-12, atol=1e-12)
