"""The engine, driven by the command line: reproducible, resumable, honest about failure, plain PyTorch."""

import copy
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mtl.data.base import Split
from mtl.data.batches import EvaluationBatches
from mtl.data.digits import Digits
from mtl.engine import checkpoint
from mtl.engine.directory import RunDirectory
from mtl.engine.trainer import Learner, Sums
from mtl.tasks import Classification, Regression
from mtl.tracking import Tracker

# 50 samples make batches of 32 and 18; an epoch takes a tenth of a second.
SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=40", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "arch.dropout=0.3", "optimizer.lr=0.01", "logger=none", "trainer.epochs=3")  # fmt: skip
STRATEGIES = {
    "equal": (), "static": ("loss.weights={digit: 1, odd: 0.5}",), "single": ("loss.task=odd",), "uncertainty": (),
    "dwa": (), "pcgrad": (), "graddrop": (), "custom": ("loss.file=my_loss.py",),
}  # fmt: skip
CUSTOM = """
import torch
class MultiTaskLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.s = torch.nn.Parameter(torch.zeros(3))
    def forward(self, digit, odd, ink, epoch, total_epochs):
        return (torch.exp(-self.s) * torch.stack([digit, odd, ink]) + self.s).sum()
"""
every_strategy = pytest.mark.parametrize("options", [(f"loss={k}", *v) for k, v in STRATEGIES.items()], ids=STRATEGIES)


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing catches it, nothing is written after it."""


@dataclass
class Sparse(Digits):
    """Few labels: many batches lack a task's, some lack all; a `blind` one has no label of `odd` at all."""

    blind: bool = False
    tasks = (Classification("digit", 10, True), Classification("odd", 2, True), Regression("ink", partial=True))

    def load(self) -> tuple[Split, Split]:
        train, test = super().load()
        for split in (train, test):
            i = torch.arange(len(split))
            split.targets["digit"][i % 4 != 0] = -100
            split.targets["odd"][(i % 8 != 1) | self.blind] = -100
            split.targets["ink"][i % 16 != 2] = torch.nan
        return train, test


@pytest.fixture(autouse=True)
def _machine(tmp_path):
    torch.set_num_threads(1)  # nets this small only lose by sharing
    log = logging.getLogger("mtl")  # as a new process finds it
    log.handlers.clear()
    log.propagate = True
    (tmp_path / "my_loss.py").write_text(CUSTOM)


@pytest.fixture
def run(cli):
    """`run("a", "loss=dwa")` runs the small command into the output root a."""
    return lambda root, *options: cli(*SMALL, f"output_root={root}", *options)


@pytest.fixture
def build(run, monkeypatch):
    """`build("loss=dwa")` returns the learner and the batches that the command would train, before the first step."""

    def call(*options: str):
        def grab(*arguments):
            built.extend(arguments)
            raise Killed

        built: list = []
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Learner, "train_epoch", grab)
            run("built", *options)
        return built[:2]

    return call


def read(root: str) -> SimpleNamespace:
    """What a run has left behind; its rows without the time/* keys."""
    (file,) = Path(root).rglob("run.json")
    rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        path=file.parent,
        run=json.loads(file.read_text()),
        summary=json.loads((file.parent / "summary.json").read_text()),
        rows=[{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows],
        states={name: checkpoint.load(file.parent / name) for name in ("last.pt", "best.pt")},
    )


def assert_same(a: str, b: str) -> None:
    """Two finished runs agree in every bit of rows and checkpoints."""
    a, b = read(a), read(b)
    assert a.run["status"] == b.run["status"] == "finished"
    torch.testing.assert_close([a.rows, a.states], [b.rows, b.states], rtol=0, atol=0)


def after_epoch(patch, epoch: int, action) -> None:
    """Call `action` when `epoch`, counted from 1, has been trained but nothing of it is on disk."""
    real = Learner.train_epoch

    def train_epoch(self, batches, index):
        row = real(self, batches, index)
        if index + 1 == epoch:
            action()
        return row

    patch.setattr(Learner, "train_epoch", train_epoch)


def fail() -> None:
    raise RuntimeError("out of\ncheese")


def script(patch, **curves: list[float]) -> None:
    """Let evaluation report these digit accuracies, one an epoch, so that the best epoch is known."""
    real, train_epoch, current = Learner.evaluate, Learner.train_epoch, []
    patch.setattr(Learner, "train_epoch", lambda self, b, epoch: current.append(epoch) or train_epoch(self, b, epoch))

    def evaluate(self, batches, name):
        return {**real(self, batches, name), f"{name}/digit_accuracy": curves[name][current[-1]]}

    patch.setattr(Learner, "evaluate", evaluate)


# -- the same command, the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [("loss=graddrop",), ("data=synthetic", "data.train_size=50", "data.test_size=20")]
)
def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(run, options):
    """Whatever the state of the global generator; order, crops, dropout and GradDrop's draws included."""
    for root, more in (("a", ()), ("b", ()), ("c", ("seed=1",))):
        torch.rand(7)
        assert run(root, *options, "trainer.epochs=2", *more).code == 0
    assert_same("a", "b")
    a, c = read("a"), read("c")
    for row, other in zip(a.rows, c.rows, strict=True):
        assert not any(row[key] == other[key] for key in row if key.startswith("train/") and key.endswith("_loss"))
    for name, tensor in a.states["last.pt"]["model"].items():
        assert name.endswith("num_batches_tracked") or not torch.equal(tensor, c.states["last.pt"]["model"][name]), name


OPTIMIZERS = [("loss=uncertainty", f"optimizer={o}", f"schedule={s}")
              for o, s in (("adam", "one_cycle"), ("adamw", "polynomial"))]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [*((f"loss={k}", *v) for k, v in STRATEGIES.items()), *OPTIMIZERS, ("data=synthetic", "data.train_size=50", "data.test_size=20")],
    ids=" ".join,
)
def test_an_interrupted_run_goes_on_exactly(run, monkeypatch, options):
    """Ctrl-C in epoch 2, SIGTERM after it: the third start ends where an uninterrupted run ends, to the bit."""
    assert run("whole", *options).code == 0
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run("parts", *options).code == 130
    assert (read("parts").run["status"], len(read("parts").rows)) == ("interrupted", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, row: signal.raise_signal(signal.SIGTERM))
        assert run("parts", *options).code == 143
    assert read("parts").summary["status"] == "interrupted" and read("parts").summary["epochs"] == 2
    assert "after epoch 2" in run("parts", *options).out
    assert_same("whole", "parts")


def _half_a_row(directory, row):
    with directory.metrics.open("a") as file:
        file.write(json.dumps(row)[:40])


@pytest.mark.parametrize(
    ("owner", "name", "epoch_of", "left"),
    [
        (RunDirectory, "append", lambda directory, row: row["epoch"], _half_a_row),
        (checkpoint, "save", lambda state, path: state["epoch"], lambda s, p: p.with_suffix(".tmp").write_bytes(b"PK")),
        (checkpoint, "link", lambda last, best: checkpoint.load(last)["epoch"], lambda last, best: None),
    ],
    ids=("in the row", "between row and last.pt", "between last.pt and best.pt"),
)
def test_a_kill_while_an_epoch_is_saved_costs_nothing_but_that_epoch(run, monkeypatch, owner, name, epoch_of, left):
    """One run, killed at the same spot of every epoch, each of them the best so far."""
    script(monkeypatch, test=[10.0, 20.0, 30.0])
    assert run("whole").code == 0
    real = getattr(owner, name)
    for epoch in (1, 2, 3):

        def killed(*arguments, epoch=epoch):
            if epoch_of(*arguments) != epoch:
                return real(*arguments)
            left(*arguments)
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, killed)
            run("parts")
    assert run("parts").code == 0
    assert_same("whole", "parts")
    assert read("parts").states["best.pt"]["epoch"] == 3


def test_a_row_lost_behind_the_checkpoint_does_not_train_its_epoch_twice(run, monkeypatch):
    """last.pt is synced to disk and the rows are not: after a power cut the last one may be missing or torn."""
    assert run("whole").code == 0
    with monkeypatch.context() as patch:
        after_epoch(patch, 3, fail)
        assert run("parts").code == 1
    metrics = read("parts").path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    if run("parts").code == 0:  # refusing would do as well
        assert_same("whole", "parts")


# -- checkpoints -----------------------------------------------------------------------------------------------------


def _save_for_ever(path: Path) -> None:
    for number in range(10**6):
        checkpoint.save({"number": number, "tensor": torch.full((500_000,), float(number))}, path)


def test_a_kill_in_mid_save_leaves_a_whole_checkpoint(tmp_path):
    """A process that does nothing but save dies at random moments; what it leaves is always complete."""
    path = tmp_path / "last.pt"
    for _ in range(8):
        path.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(path,))
        process.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        state = checkpoint.load(path)
        assert state["tensor"].shape == (500_000,) and (state["tensor"] == state["number"]).all()


class _Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_is_refused_in_one_line(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, fail)
        run("a")
    last = read("a").path / "last.pt"
    torch.save({"epoch": 1, "model": _Code(tmp_path / "executed")}, last)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(last)
    result = run("a")
    assert result.code == 1 and "last.pt" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("options", "curves", "chosen"),
    [
        ((), {"test": [10.0, 30.0, 30.0]}, 2),
        ((), {"test": [30.0, 10.0, 20.0]}, 1),
        (("data.val_fraction=0.2",), {"test": [30.0, 10.0, 20.0], "val": [5.0, 6.0, 7.0]}, 3),
    ],
    ids=("first of two equals", "first", "by validation"),
)
def test_best_and_summary_follow_from_the_rows(run, monkeypatch, options, curves, chosen):
    """best.pt is the whole state after the epoch with the best first-task accuracy, on validation data if there is any."""
    script(monkeypatch, **curves)
    seen, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda s, path: save(s, path) or seen.append(path.read_bytes()))
    assert run("a", *options).code == 0
    a = read("a")
    assert (a.path / "best.pt").read_bytes() == seen[chosen - 1] and a.states["best.pt"]["epoch"] == chosen
    tests = {"test/digit_accuracy": max, "test/odd_accuracy": max, "test/ink_mae": min}
    assert a.summary["last"] == {key: a.rows[-1][key] for key in tests}
    for key, better in tests.items():
        column = [row[key] for row in a.rows]
        assert a.summary["best"][key] == {"value": better(column), "epoch": column.index(better(column)) + 1}
    selected = {"by": "val/digit_accuracy", "epoch": chosen, **{key: a.rows[chosen - 1][key] for key in tests}}
    assert a.summary["selected"] == (selected if "val" in curves else None)


# -- runs that do not go well ----------------------------------------------------------------------------------------


def test_a_failing_run_says_so_in_one_line_and_can_be_repeated(run, monkeypatch):
    assert run("whole").code == 0
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, fail)
        failed = run("parts")
    a, log = read("parts"), (read("parts").path / "train.log").read_text()
    assert failed.code == 1 and re.fullmatch(r"error: RuntimeError: out of cheese .*train\.log\)\n", failed.err)
    assert "Traceback" in log and "cheese" in log and "Traceback" not in failed.out
    assert a.run["status"] == a.summary["status"] == "failed" and "cheese" in a.run["error"] and len(a.rows) == 1
    assert run("parts").code == 0 and read("parts").run["error"] is None
    assert_same("whole", "parts")


@pytest.mark.parametrize("loss", ["equal", "pcgrad", "uncertainty"])
def test_divergence_is_named(run, loss):
    result = run("a", f"loss={loss}", "optimizer.lr=1e20")
    a_run = json.loads(next(Path("a").rglob("run.json")).read_text())
    assert result.code == 1 and a_run["status"] == "diverged" and a_run["error"] in result.err
    line = rf"error: wide_resnet-{loss}-s42-\w+: (digit|odd|ink) loss became (nan|inf) in epoch (\d).*\n"
    match = re.fullmatch(line, result.err)
    assert match, result.err
    (directory,) = {file.parent for file in Path("a").rglob("run.json")}
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == int(match[3]) - 1
    assert ("last.pt" in result.err) == (directory / "last.pt").exists()


def test_a_busy_run_is_left_alone(run, monkeypatch):
    """The lock belongs to an open file, so a second holder in this process stands for another process."""
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, fail)
        run("a")

    def content():
        files = [file for file in Path("a").rglob("*") if file.is_file() and file.name != ".lock"]
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = content()
    with RunDirectory(read("a").path):
        second = run("a")
    assert second.code == 1 and re.fullmatch(r"error: another process is training .*\n", second.err)
    assert content() == before
    assert run("a").code == 0


# -- the step --------------------------------------------------------------------------------------------------------


@every_strategy
def test_an_epoch_moves_every_parameter(build, options):
    learner, batches = build(*options, "optimizer.weight_decay=0")  # decay alone would move most of them
    trained = [learner.model, learner.strategy]
    before = [copy.deepcopy(dict(module.named_parameters())) for module in trained]
    learner.train_epoch(batches, 0)
    for module, old in zip(trained, before, strict=True):
        assert not [name for name, p in module.named_parameters() if torch.equal(p, old[name])]
    assert list(learner.model.heads) == (["odd"] if "loss=single" in options else ["digit", "odd", "ink"])


@pytest.mark.parametrize(("loss", "tasks"), [("single", ("odd",)), ("equal", ("digit", "odd", "ink"))])
def test_training_equals_a_plain_loop(build, loss, tasks):
    """Two epochs of PyTorch as everybody writes it; the row holds means over the samples, not over the batches."""
    learner, batches = build(f"loss={loss}", *STRATEGIES[loss], "arch.dropout=0", "trainer.epochs=2")
    model = copy.deepcopy(learner.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for epoch, rate in enumerate((0.01, 0.005)):
        optimizer.param_groups[0]["lr"] = rate
        sums = dict.fromkeys(tasks, 0.0)
        for images, targets in batches.epoch(epoch):
            optimizer.zero_grad()
            total = 0.0
            for task, prediction in zip(tasks, model(images), strict=True):
                target = targets[task]
                loss = F.mse_loss(prediction[:, 0], target) if task == "ink" else F.cross_entropy(prediction, target)
                total = total + loss
                sums[task] += loss.item() * len(images)
            total.backward()
            optimizer.step()
        row = learner.train_epoch(batches, epoch)
        assert row["lr"] == pytest.approx(rate)
        assert {t: row[f"train/{t}_loss"] for t in tasks} == pytest.approx({t: sums[t] / 50 for t in tasks}, rel=1e-5)
        torch.testing.assert_close(list(learner.model.parameters()), list(model.parameters()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "lr", "decay"),
    [
        (("loss=uncertainty",), 0.01, 0.0),
        (("loss=uncertainty", "loss.lr=0.025", "loss.weight_decay=null"), 0.025, 5e-4),
        (("loss=custom", "loss.file=my_loss.py"), 0.01, 5e-4),
        (("loss=custom", "loss.file=my_loss.py", "loss.lr=0.2", "loss.weight_decay=0.0"), 0.2, 0.0),
    ],
)
def test_the_methods_parameters_are_a_group_of_their_own(build, options, lr, decay):
    learner, batches = build(*options)
    shared, own = learner.optimizer.param_groups
    assert [*map(id, own["params"])] == [*map(id, learner.strategy.parameters())]
    assert [*map(id, shared["params"])] == [*map(id, learner.model.parameters())]
    assert (shared["lr"], shared["weight_decay"], own["lr"], own["weight_decay"]) == (0.01, 5e-4, lr, decay)
    learner.train_epoch(batches, 1)  # a third of the cosine: three quarters of the rate
    assert (shared["lr"], own["lr"]) == pytest.approx((0.0075, 0.75 * lr))


def test_evaluation_is_the_mean_over_all_samples(build, monkeypatch):
    """Against one forward pass of the whole test set; 40 samples in batches of 13."""
    learner, batches = build()
    learner.train_epoch(batches, 0)
    monkeypatch.setattr(EvaluationBatches, "batch_size", 13)
    benchmark = Digits(limit_test=40)
    split = benchmark.splits()["test"]
    row = learner.evaluate(EvaluationBatches(split, benchmark, learner.device), "test")
    with torch.no_grad():
        outputs = learner.model.eval()(((split.images / 255 - 0.305) / 0.376).permute(0, 3, 1, 2))
    expected = {}
    for task, output in zip(("digit", "odd"), outputs, strict=False):
        target = split.targets[task]
        expected[f"test/{task}_loss"] = F.cross_entropy(output, target).item()
        expected[f"test/{task}_accuracy"] = 100 * (output.argmax(1) == target).float().mean().item()
    error = outputs[2][:, 0] - split.targets["ink"]
    expected |= {"test/ink_loss": error.square().mean().item(), "test/ink_mae": error.abs().mean().item()}
    assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("blind", [False, True])
@every_strategy
def test_missing_labels_leave_no_mark(build, options, blind):
    """Finite parameters whatever is missing, and a head without a single label stays as it was made."""
    data = (f"data._target_={__name__}.Sparse", f"+data.blind={blind}", "data.batch_size=5", "data.limit_train=80")
    learner, batches = build(*options, *data, "optimizer.weight_decay=0")
    missing = [
        t.loss(torch.zeros(5, t.outputs), y[t.name]).item() == 0 for _, y in batches.epoch(0) for t in Sparse.tasks
    ]
    lacking = [missing[i : i + 3] for i in range(0, len(missing), 3)]
    assert any(map(all, lacking)) and not all(map(any, lacking)) or blind
    before = copy.deepcopy(learner.model.heads["odd"].state_dict())
    rows = [learner.train_epoch(batches, epoch) for epoch in range(3)]
    state = [*learner.model.parameters(), *learner.strategy.parameters()]
    assert all(p.isfinite().all() for p in state)
    nan = {key for row in rows for key, value in row.items() if value != value}
    assert nan == ({"train/odd_loss", "train/odd_accuracy"} if blind else set())
    same = [torch.equal(before[name], p) for name, p in learner.model.heads["odd"].state_dict().items()]
    assert all(same) if blind else not any(same)


@pytest.mark.parametrize("loss", ["equal", "pcgrad"])
@pytest.mark.parametrize(
    ("option", "tolerance"), [("trainer.channels_last=false", 1e-4), ("trainer.precision=bf16", 0.03)]
)
def test_layout_and_precision_change_little(build, option, tolerance, loss):
    rows, layouts = [], []
    for more in ((), (option,)):
        learner, batches = build(f"loss={loss}", "arch.dropout=0", "data.limit_train=64", *more)
        row = learner.train_epoch(batches, 0)
        rows.append([row[f"train/{task}_loss"] for task in ("digit", "odd", "ink")])
        layouts.append(learner.model.backbone.conv.weight.is_contiguous())
        assert {t.dtype for p in learner.model.parameters() for t in (p, p.grad)} == {torch.float32}
    assert rows[0] == pytest.approx(rows[1], rel=tolerance)
    assert rows[0] != rows[1] if "bf16" in option else layouts == [True, True]


def test_sums_are_read_at_once(monkeypatch):
    """Every shape comes back as it was added up, in one transfer."""
    sums, calls, tolist = Sums(), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(self) or tolist(self))
    for factor in (1, 2):
        sums.add("scalar", torch.tensor(1.5 * factor, requires_grad=True))
        sums.add("row", factor * torch.tensor([True, False, True]))
        sums.add("matrix", factor * torch.ones(2, 2, dtype=torch.int64))
    assert sums.read() == {"scalar": [4.5], "row": [3.0, 0.0, 3.0], "matrix": [3.0] * 4}
    assert len(calls) == 1 and Sums().read() == {}


@every_strategy
def test_no_step_waits_for_the_device(build, monkeypatch, options):
    """The host reads as often in an epoch of six steps as in one of two."""
    counts = []
    for size in (64, 192):
        learner, batches = build(*options, f"data.limit_train={size}")
        reads = []
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
                real = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda *a, real=real, name=name: reads.append(name) or real(*a))
            learner.train_epoch(batches, 0)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0
