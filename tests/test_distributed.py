"""Runs over two processes against the same runs in one. torchrun starts this file: see `__main__` at its end."""

import copy
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import shipped
import torch
import yaml
from conftest import ROOT
from torch import Tensor, nn

from mtl.archs.model import Model, Outputs
from mtl.archs.resnet import WideResNet
from mtl.cli.command import Terminated
from mtl.data.base import Benchmark, Split
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.data.boxes import Shapes
from mtl.data.inputs import Image
from mtl.data.rooms import Rooms
from mtl.data.union import Union
from mtl.engine.backward import Switches
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.engine.reach import reach
from mtl.losses.hooks import defines
from mtl.parallel import split_batch
from mtl.parallel.signals import ENDING
from mtl.tasks import Classification, Regression, Task
from mtl.views import Crop, Flip

# ---------------------------------------------------------------------------- every method, in float64, in one torchrun


@dataclass
class Few(Benchmark):
    """30 training images in batches of 11, 11 and 8: uneven parts, also of halves and thirds. Few have labels."""

    batch_size: int = 11
    arch = {"_target_": f"{__name__}.Net"}
    tasks = (Classification("digit", 3), Classification("odd", 2), Regression("ink"))
    inputs = {"image": Image((1, 6, 6), mean=(0.5,), std=(0.25,))}
    augment = (Crop(1), Flip())

    def load(self) -> dict[str, Split]:
        def split(size: int) -> Split:
            i, noise = torch.arange(size), torch.Generator().manual_seed(size)
            images = torch.randint(0, 256, (size, 6, 6, 1), dtype=torch.uint8, generator=noise)
            digit, odd = torch.where(i % 3 == 0, i % 5 % 3, -100), torch.where((i == 1) | (i == 14), i % 2, -100)
            ink = torch.where(i % 4 == 2, i / 10 - 1, torch.nan)
            return Split({"image": images, "digit": digit, "odd": odd, "ink": ink})

        return {"train": split(30), "test": split(11)}


@dataclass
class Full(Few):
    """With all labels."""

    def load(self) -> dict[str, Split]:
        for split in (splits := super().load()).values():
            i = torch.arange(len(split))
            split.columns.update(digit=i % 5 % 3, odd=i % 2, ink=i / 10 - 1)
        return splits


@dataclass
class Classes(Few):
    """For methods that understand accuracies only."""

    tasks = Few.tasks[:2]


class Parted(Union):
    """Two data sets as one; in a batch, each sample has the labels of its own part."""

    arch = {"_target_": f"{__name__}.Net"}

    def __init__(self):
        super().__init__(batch_size=10, balanced=True, separate=True, parts={"full": Full(), "few": Few()})


class Boxes(Shapes):
    """Detection and segmentation: one tensor of features from a network with a pyramid."""

    arch = {"_target_": "mtl.archs.retina.Retina", "name": "shufflenet_v2_x0_5", "width": 4, "levels": [3, 4],
            "head_layers": 1}  # fmt: skip
    optimizer = {"lr": 1e-3}  # with 0.1, rounding grows a thousandfold in each step

    def __init__(self):
        super().__init__(batch_size=5, train_size=5, test_size=3, size=32)


class Maps(Rooms):
    """Classes, depth and normals; batches of 3 and 2, evaluated in batches of 2 and 1; some images lack some labels."""

    arch = {"_target_": "mtl.archs.fcn.FCN", "width": 2}
    optimizer = {"lr": 1e-2}

    def __init__(self):
        super().__init__(batch_size=3, eval_batch_size=2, train_size=5, test_size=3, height=8, width=12)

    @property
    def tasks(self) -> Sequence[Task]:
        segmentation, depth, normals = super().tasks
        return segmentation, replace(depth, reduction="batch_mean"), normals

    def load(self) -> dict[str, Split]:
        for split in (splits := super().load()).values():
            split.columns["segmentation"][1, 2:] = -100
            split.columns["depth"][2], split.columns["normals"][:2, :, 3:] = 0.0, torch.nan
        return splits


class Attention(Maps):
    """SegNet-MTAN on images that it halves to one pixel."""

    arch = {"_target_": "mtl.archs.segnet.SegNetMTAN", "width": 2}
    # Its many batch norms over three pixels make rounding grow, in one process as in two.
    optimizer = {"lr": 1e-6}

    def __init__(self):
        super().__init__()
        self.height = self.width = 32

    @property
    def tasks(self) -> Sequence[Task]:
        return super().tasks[:2]


class Stitched(Maps):
    """A backbone for each task. The last evaluation batch has one image, so that one process has none."""

    sharing = "cross_stitch"


class Layered(Maps):
    """Experts that all tasks share, and experts of one task."""

    sharing = "ple"


class Mixed(Few):
    """Experts with batch norm and dropout, under the microscope. Many batches lack a task."""

    sharing, microscope = "mmoe", {"every": 1, "samples": 1}


class Net(nn.Module):
    """Batch norm and dropout of both dimensions; no bias before a batch norm, whose gradient would be mere rounding."""

    out_features = 6

    def __init__(self, in_channels: int):
        super().__init__()
        self.images = nn.Sequential(nn.Conv2d(in_channels, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                                    nn.Dropout2d(0.2), nn.Conv2d(4, 6, 3), nn.Dropout(0.1, inplace=True))  # fmt: skip
        self.vectors = nn.Sequential(
            nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Dropout(0.2)
        )

    def forward(self, x):
        return self.vectors(self.images(x).mean((2, 3)))


NEEDED = {
    "static": {"weights": {"digit": 1.0, "odd": 0.5}},
    "single": {"task": "odd"},
    "pivrg": {"baselines": [60.0, 70.0, 0.4]},
    "amtl": {"potentials": [60.0, 70.0, 0.4]},
    # The same rules, sooner.
    "stch": {"warmup_epochs": 0},
    "rotograd": {"burn_in": 3},
    "annealed_calibrated": {"calibration": 2},
}
LOSSES = sorted({*shipped.options("loss")} - {"custom"})
# (loss, optimizer, switches, benchmark): every method, every optimizer, every switch.
CASES = [(loss, "sgd", {}, Classes if loss == "dtp" else Few) for loss in LOSSES]
CASES += [("pcgrad", optimizer, {}, Few) for optimizer in ("adam", "adatask", "signsgd")]
CASES += [("equal", "mtl_io", {}, Few), ("equal", "sgd", {}, Full), ("graddrop", "sgd", {}, Full)]
CASES += [(loss, "sgd", {"gradients": "features"}, Few) for loss in ("mgda", "pcgrad", "graddrop", "consmtl")]
CASES += [(loss, "sgd", {"transform": "log"}, Few) for loss in ("equal", "rep_mtl", "cagrad")]
CASES += [("dwa", "sgd", {"heads": "own"}, Few), ("pcgrad", "sgd", {"heads": "weighted", "scale": "sum"}, Few)]
CASES += [("uncertainty", "adatask", {"scale": "norm"}, Full)]
CASES += [("pcgrad", "sgd", {}, Parted), ("uncertainty", "sgd", {}, Boxes), ("pcgrad", "sgd", {}, Maps)]
# Models that are divided as a whole.
CASES += [("pcgrad", "sgd", {}, Attention), ("pcgrad", "adam", {"heads": "weighted"}, Stitched)]
CASES += [("dwa", "adatask", {}, Layered), ("auto_lambda", "sgd", {}, Mixed)]


def build(case, processes=None) -> tuple[Learner, TrainingBatches, EvaluationBatches]:
    from mtl.config import schema
    from mtl.engine.build import build_learner

    loss, optimizer, switches, kind = case
    benchmark = kind()
    chosen = {"loss": loss, "optimizer": optimizer, "schedule": "cosine", "microscope": "default"}
    chosen["sharing"] = getattr(kind, "sharing", "hard")
    nodes = {g: yaml.safe_load((ROOT / "conf" / g / f"{name}.yaml").read_text()) for g, name in chosen.items()}
    nodes["loss"] = {**nodes["loss"], **NEEDED.get(loss, {})}
    nodes["microscope"].update(getattr(kind, "microscope", {}))
    nodes["optimizer"] = {**nodes["optimizer"], **getattr(kind, "optimizer", {})}
    strategy = schema.build(nodes["loss"], "loss", tasks=[t.name for t in benchmark.tasks])
    tasks = [t for t in benchmark.tasks if t.name in strategy.names]
    config = {"seed": 3, "arch": kind.arch, **nodes}
    cpu = torch.device("cpu")
    learner = build_learner(config, benchmark, tasks, strategy, Execution(3), cpu, Switches(**switches))
    learner.model.double(), strategy.double()
    learner.processes = processes
    splits = benchmark.splits()
    smallest = 2 * max(strategy.samples, 2 if defines(strategy, "look_ahead") else 1)
    train = TrainingBatches(splits["train"], benchmark, cpu, 3, smallest)
    return learner, train, EvaluationBatches(splits["test"], benchmark, cpu)


def numbers(state) -> Tensor:
    """All numbers in nested containers, as one vector; without times, and without signs, which rounding may turn."""
    if isinstance(state, dict):
        state = [state[key] for key in state if not re.search("^time/|/sign_conflict/", str(key))]
    if isinstance(state, list | tuple):
        return torch.cat([torch.zeros(0), *map(numbers, state)])
    if isinstance(state, Tensor | float | int):
        return torch.as_tensor(state, dtype=torch.float64).flatten()
    return torch.zeros(0)


def train(case, processes=None) -> Tensor:
    learner, batches, evaluation = build(case, processes)
    rows = []
    for epoch in range(3):
        rows.append({**learner.train_epoch(batches, epoch), **learner.evaluate(evaluation, "test")})
        learner.epoch_end(rows[-1])
    return numbers([rows, learner.state()])


def one_image(processes) -> float:
    """The largest difference in features, gradients and running statistics; the first process has no image at all."""
    backbone = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True), nn.Dropout(0.3), nn.Flatten())
    image, found = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)), []
    for forward in (backbone, lambda x: processes.forward(backbone, [x])):
        torch.manual_seed(1)
        backbone[1].reset_running_stats()
        features = forward(image)
        gradients = torch.autograd.grad(features.square().sum(), [*backbone[0].parameters(), *backbone[1].parameters()])
        found.append(numbers([features, gradients, backbone.state_dict()]))
    assert found[0].norm() > 1
    return (found[0] - found[1]).abs().max().item()


def metric_states(rank: int) -> float:
    """Metrics of maps, of which each process has seen uneven batches of its own. Their states are added up."""
    splits, largest = Maps().load(), 0.0
    for task in Maps().tasks:
        target, (metric,) = splits["train"].columns[task.name], task.metrics
        draws = torch.Generator().manual_seed(2)
        prediction = torch.randn(5, task.outputs, *target.shape[1:3], generator=draws)
        whole, mine = metric.zero(), metric.zero()
        for n, part in enumerate((slice(0, 1), slice(1, 3), slice(3, 5))):
            for state in [whole] if n % 2 != rank else [whole, mine]:
                metric.update(state, prediction[part], target[part])
        torch.distributed.all_reduce(mine)
        together, expected = (numbers(metric.compute(state)) for state in (mine, whole))
        assert expected.norm() > 0.1
        largest = max(largest, (together - expected).abs().max().item())
    return largest


def compare_all(report: Path) -> None:
    """For each case: the largest difference between one process and two, and whether the two agree in all bits."""
    import torch.distributed as dist

    from mtl.parallel.processes import Processes

    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # the engine's float32: rounding would hide a small mistake behind a large tolerance
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    processes = Processes(rank, 2, rank, dist.distributed_c10d._get_default_store())
    results = {}
    for number, case in enumerate(CASES):
        # One process computes the reference while the other computes that of the next case.
        references = [train(CASES[number + rank])] if number % 2 == 0 and number + rank < len(CASES) else []
        if number % 2 == 0:
            gathered: list = [None, None]
            dist.all_gather_object(gathered, references)
        (expected,) = gathered[number % 2]
        ours = train(case, processes)
        assert expected.shape == ours.shape
        assert torch.equal(expected.isfinite(), ours.isfinite())
        scale = expected.abs().clamp(min=1.0)
        error = ((ours - expected) / scale).nan_to_num(0.0).abs().max().item()
        digests: list = [None, None]
        dist.all_gather_object(digests, hashlib.sha256(ours.numpy().tobytes()).hexdigest())
        results[str(case)] = (error, len(set(digests)) == 1)
    results["one image"] = (one_image(processes), True)
    results["metric states"] = (metric_states(rank), True)
    dist.destroy_process_group()
    if rank == 0:
        report.write_text(json.dumps(results))


# ----------------------------------------------------------------------------------------------------- runs by torchrun


class Smooth(WideResNet):
    """Without ReLU's kink, over which rounding moves an activation on one CPU and not on another."""

    def forward(self, x):
        with mock.patch.object(nn.functional, "relu", nn.functional.silu):
            return super().forward(x)


SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=41", "data.batch_size=32", "arch=wide_resnet",
         "arch._target_=test_distributed.Smooth",
         "arch.depth=10", "arch.width=1", "arch.dropout=0.3", "optimizer.lr=0.01", "trainer.epochs=3", "loss=gradnorm",
         "trainer.device=cpu", "logger=none")  # fmt: skip


def torchrun(*arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], env=settings, **pipes)


def after_epoch(epoch: int, action) -> None:
    """Call `action(learner, batches)` instead of training this epoch, counted from 0."""
    real = Learner.train_epoch
    Learner.train_epoch = lambda self, batches, e: real(self, batches, e) if e != epoch else action(self, batches)


def fail(learner, batches) -> None:
    raise RuntimeError("out of\ncheese")


def train_for_ever(learner, batches) -> None:
    batch, *_ = batches.epoch(0)
    while True:
        learner.predict(batch)


def read(root: str) -> tuple[Path, dict, list[dict]]:
    (file,) = Path(root).rglob("run.json")
    rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    return file.parent, json.loads(file.read_text()), rows


def assert_close(a: str, b: str) -> None:
    """Finished runs with the same numbers, but for the rounding of float32, whose sums have another order."""
    (path, info, rows), (other, _, others) = read(a), read(b)
    assert info["status"] == "finished"
    assert path.relative_to(a) == other.relative_to(b)  # the same identity
    for row, expected in zip(rows, others, strict=True):
        keys = [key for key in expected if not key.startswith("time/")]
        assert {k: row[k] for k in keys} == pytest.approx({k: expected[k] for k in keys}, rel=2e-4, abs=2e-5)
    files = sorted(f.name for f in path.iterdir())
    assert files == sorted(f.name for f in other.iterdir())


@pytest.fixture
def whole(cli):
    torch.set_num_threads(1)
    assert cli(*SMALL, "output_root=whole").code == 0


def test_a_failing_process_ends_the_run(cli, whole, monkeypatch):
    """Begun by one process, taken up by two of which the second fails, finished by one."""
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", Learner.train_epoch)  # restored afterwards
        after_epoch(1, fail)
        assert cli(*SMALL, "output_root=a").code == 1
    assert len(read("a")[2]) == 1
    process = torchrun(*SMALL, "output_root=a", FAIL="1:2")
    out, err = process.communicate(timeout=900)
    path, info, rows = read("a")
    assert "after epoch 1" in out and "2 processes" in out and out.count("\nrun ") == 0 and out.count("epoch 2/3") == 1
    (line,) = re.findall(r"^error: .*", err, re.MULTILINE)
    assert "process 1: RuntimeError: out of cheese" in line
    assert (info["status"], len(rows), info["processes"]) == ("failed", 2, 2)
    assert 'raise RuntimeError("out of\\ncheese")' in (path / "train.log").read_text()
    # torchrun's own code is 1 whatever its processes' are; it names theirs.
    assert process.returncode == 1 and set(re.findall(r"exitcode\s*: (-?\d+)", err)) == {"1"}
    assert cli(*SMALL, "output_root=a").code == 0
    assert_close("a", "whole")


def test_every_method_and_a_stopped_run(whole, tmp_path):
    """SIGTERM to torchrun; the next torchrun takes the run up, and compares all methods before."""
    process = torchrun(*SMALL, "output_root=b", LOOP="1")
    while not list(Path("b").rglob("last.pt")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "the same command goes on from there: torchrun --nproc-per-node=2" in out
    _, info, rows = read("b")
    assert (info["status"], len(rows), "\nerror:" in err) == ("interrupted", 1, False)

    report = tmp_path / "report.json"
    process = torchrun(*SMALL, "output_root=b", REPORT=str(report))
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert out.count("resumed   after epoch 1") == out.count("epoch 3/3") == 1
    assert_close("b", "whole")
    results = json.loads(report.read_text())
    assert len(results) == len(CASES) + 2
    assert not {case: error for case, (error, _) in results.items() if not error < 1e-11}
    assert not [case for case, (_, same) in results.items() if not same]


def test_some_batches_lack_a_task_and_parts_are_uneven():
    _, batches, _ = build(CASES[0])
    counts = [[int(t.count(batch[t.name])) for t in Few.tasks] for batch in batches.epoch(0)]
    assert [len(batch["image"]) for batch in batches.epoch(0)] == [11, 11, 8]
    assert any(0 in batch for batch in counts)


# ------------------------------------------------------------------------------------------- refused before any process


@pytest.fixture
def started(monkeypatch):
    """As torchrun would leave the environment, without any other process."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_a_grid_is_refused(cli, started, tmp_path):
    result = cli(*SMALL, "-m", "seed=0,1")
    assert result.code == 2 and result.err.count("\n") == 1 and result.err.startswith("error: -m: ")
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_reads_the_finished_files(cli, started, monkeypatch):
    """The others are done before it has written them."""
    from mtl.cli import cell
    from mtl.engine.outcome import Outcome

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cell, "prepared", lambda *_: nullcontext(Outcome("finished", 0, "not/there/yet")))
    assert cli(*SMALL).code == 0
    monkeypatch.setenv("RANK", "0")
    assert cli(*SMALL).code != 0  # else nothing would be tested


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_one_device_for_all_is_refused(started, name):
    from mtl.errors import ConfigError
    from mtl.parallel.processes import Processes

    with pytest.raises(ConfigError, match=f"^trainer.device={name}: torchrun started 2 processes"):
        Processes(0, 2, 0, None).device(name)


class Noisy(nn.Module):
    """Own code that draws: stochastic depth."""

    def forward(self, x):
        return x * (torch.rand(len(x), *[1] * (x.dim() - 1)) > 0.5)


class Last(nn.Module):
    """The output of a module that returns several things."""

    def __init__(self, inner, *more):
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, x):
        return self.inner(x, *[x] * len(self.more))[0]


@pytest.mark.parametrize(("module", "name"), [
    (nn.AlphaDropout(), "alpha_dropout"), (nn.RReLU(), "rrelu"), (Noisy(), "rand"),
    (Last(nn.LSTM(4, 4, 2, dropout=0.2)), "lstm"), (Last(nn.GRU(4, 4, 2, dropout=0.2)), "gru"),
    (Last(nn.MultiheadAttention(4, 2, dropout=0.1), 1, 1), "multi_head_attention_forward"),
    (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1), "multi_head_attention_forward"),
    (nn.Sequential(nn.Flatten(0, 1), nn.Dropout()), "dropout"),
    (nn.Dropout(), None), (nn.Dropout1d(), None), (Last(nn.LSTM(4, 4, 2)), None),
    (Last(nn.MultiheadAttention(4, 2), 1, 1), None), (nn.Sequential(nn.BatchNorm1d(3), nn.Dropout1d()), None),
])  # fmt: skip
def test_a_backbone_whose_draws_cannot_be_divided_is_refused(module, name):
    """And looking for that changes nothing: buffers, mode, random stream."""
    from mtl.errors import ConfigError
    from mtl.parallel.processes import Processes

    images = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    before, stream = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    look = lambda: Processes(0, 2, 0, None).check(module, [images])  # noqa: E731
    if name is None:
        look()
    else:
        with pytest.raises(ConfigError, match=f"^arch: {name} would draw"):
            look()
    assert module.training and torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def alone(tensor: Tensor) -> Tensor:
    """The sum over a single process."""
    return tensor


def test_a_whole_model_keeps_each_graph_within_its_owners():
    learner, *_ = build(("pcgrad", "sgd", {}, Stitched))
    model, names = learner.model.float(), [task.name for task in learner.tasks]
    owned = [list(model.shared_parameters()), *(list(model.own_parameters(name)) for name in names)]
    batch = {"image": torch.rand(2, 3, 8, 12)}
    expected = model.eval()(batch).predictions
    found = split_batch.predictions(model, batch, owned, 0, 1, alone)
    for own, one, other in zip(owned[1:], found, expected, strict=True):
        assert torch.equal(one, other)
        assert {*reach(one.sum()).leaves} == {id(p) for p in (*owned[0], *own)}


def test_a_parameter_that_a_pass_does_not_reach_gets_no_gradient():
    """With a gradient of 0, weight decay and momentum would still move it."""
    backbone = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    backbone.forward = lambda x: backbone["used"](x)
    split_batch.forward(backbone, [torch.ones(3, 2)], 0, 1, alone).sum().backward()
    assert backbone["idle"].weight.grad is None and backbone["used"].weight.grad.norm() > 0


class Kept(nn.Module):
    """Uses its weight from a plain list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.weights = [self.weight]

    def forward(self, x):
        return x * self.weights[0]


def test_a_parameter_whose_gradient_would_not_be_summed_is_refused():
    from mtl.errors import ConfigError
    from mtl.parallel.processes import Processes

    with pytest.raises(ConfigError, match=r"^arch: Kept uses a parameter that it keeps outside"):
        Processes(0, 2, 0, None).check(Kept(), [torch.ones(2, 4)])


class Odd(Model):
    """Returns `made(x)` as the prediction of its only task, besides the features."""

    def __init__(self, made):
        super().__init__()
        self.layer, self.made = nn.Linear(6, 3), made

    def forward(self, batch):
        features = self.layer(batch["image"])
        return Outputs([self.made(features)], features)

    def shared_parameters(self):
        return self.layer.parameters()

    def own_parameters(self, task):
        return []


@pytest.mark.parametrize(("made", "what"), [
    (lambda x: {"a": [x, x.T]}, r"a tensor \(3, 2\) for 2 samples"),
    (lambda x: (x, [0.5, 0.5]), "an object of class float"),
    (lambda x: {"a": (x, None)}, None),
])  # fmt: skip
def test_a_prediction_that_cannot_be_put_together_is_refused(made, what):
    from mtl.errors import ConfigError
    from mtl.parallel.processes import Processes

    model, batch, processes = Odd(made), {"image": torch.ones(2, 6)}, Processes(0, 2, 0, None)
    refused = (
        nullcontext()
        if what is None
        else pytest.raises(
            ConfigError, match=f"^arch: the prediction of task 'a' holds {what}, which several processes"
        )
    )
    with refused:
        processes.check_model(model, batch, ["a"])
    refused = nullcontext() if what is None else pytest.raises(ValueError, match=f"^a prediction holds {what}")
    with refused:
        split_batch.predictions(model, batch, [model.layer.parameters(), []], 0, 1, alone)


AT_ONCE, FEATURES = "^step.parallel=2: .* use step.parallel=1", "^loss: .* divide MMoE as a whole; use sharing=hard"


@pytest.mark.parametrize(("loss", "switches", "kind", "text"), [
    ("consmtl", {}, Mixed, FEATURES), ("mgda", {"gradients": "features"}, Mixed, FEATURES), ("equal", {}, Mixed, None),
    ("pcgrad", {"parallel": 2}, Mixed, AT_ONCE), ("pcgrad", {"parallel": 2}, Few, AT_ONCE),
    ("mgda", {"parallel": 2, "gradients": "features"}, Few, None), ("equal", {"parallel": 2}, Few, None),
])  # fmt: skip
def test_a_step_that_processes_cannot_divide_is_refused(loss, switches, kind, text):
    from mtl.engine.build import _divide
    from mtl.errors import ConfigError
    from mtl.parallel.processes import Processes

    learner, *_ = build((loss, "sgd", switches, kind))
    learner.model.float()
    with nullcontext() if text is None else pytest.raises(ConfigError, match=text):
        _divide(learner, kind(), Processes(0, 2, 0, None))


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def handlers(monkeypatch):
    """Processes that do not end this one, and its handlers as they were afterwards."""
    monkeypatch.setattr("mtl.parallel.processes.atexit.register", lambda *_: None)
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_each_signal_ends_training_with_its_own_code_in_all_processes(handlers, number):
    from mtl.cli.command import _code
    from mtl.parallel.processes import Processes

    store, images = torch.distributed.HashStore(), torch.zeros(2, 3)
    signal.signal(number, lambda *_: pytest.fail("ends the process at once"))
    leader = Processes(0, 2, 0, store)
    with pytest.raises((KeyboardInterrupt, Terminated)) as ended, leader.guard():
        signal.raise_signal(number)
        leader.forward(nn.Identity(), [images])
    assert _code(ended.value) == _code(Processes(1, 2, 1, store)._news()) == 128 + number


def test_under_nohup_a_closed_terminal_ends_nothing(handlers):
    from mtl.parallel.processes import Processes
    from mtl.parallel.signals import deferred

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    processes = Processes(0, 1, 0, torch.distributed.HashStore())
    with processes.guard(), deferred():
        signal.raise_signal(signal.SIGHUP)
    assert not processes._signals and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_closed_terminal_waits_for_files_that_belong_together(handlers):
    from mtl.parallel.signals import deferred

    events = []
    signal.signal(signal.SIGHUP, lambda *_: events.append("ended"))
    with deferred():
        signal.raise_signal(signal.SIGHUP)
        events.append("written")
    assert events == ["written", "ended"]


def test_a_deterministic_run_tells_cublas(monkeypatch):
    """Torch refuses matrix products on a GPU without it; what the user has set stays."""
    for value in (None, ":16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value or "")
        if value is None:
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        Execution(device="cpu", deterministic=True).open_device()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (value or ":4096:8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if report := os.environ.get("REPORT"):
        number_type, to_float = torch.get_default_dtype(), Tensor.float
        compare_all(Path(report))
        torch.set_default_dtype(number_type)
        Tensor.float = to_float
    if plan := os.environ.get("FAIL"):  # "rank:epoch"
        rank, epoch = plan.split(":")
        if os.environ["RANK"] == rank:
            after_epoch(int(epoch), fail)
    if "LOOP" in os.environ:
        after_epoch(1, train_for_ever)

    import train as script
    from mtl.cli.command import launch

    sys.exit(launch(script.main))
