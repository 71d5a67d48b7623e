"""The engine, driven by the command line: reproducible, resumable, honest about failure – and plain PyTorch below."""

import copy
import json
import multiprocessing
import os
import random
import re
import signal
import time
from contextlib import nullcontext
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
from mtl.engine.learner import Learner
from mtl.engine.trained import NothingTrained
from mtl.tracking import Tracker

# 50 samples make batches of 32 and 18; a run of three epochs takes less than a second.
SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=40", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "arch.dropout=0.3", "optimizer.lr=0.01", "trainer.epochs=3",
         "logger=none")  # fmt: skip
STRATEGIES = ("loss=equal", "loss=static loss.weights={digit:1,odd:0.5}", "loss=single loss.task=odd",
              "loss=uncertainty", "loss=dwa", "loss=pcgrad", "loss=graddrop",
              "loss=custom loss.file=my_loss.py")  # fmt: skip
CUSTOM = """
import torch
class MultiTaskLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.s = torch.nn.Parameter(torch.zeros(3))
    def forward(self, digit, odd, ink, epoch, total_epochs):
        return (torch.exp(-self.s) * torch.stack([digit, odd, ink]) + self.s).sum()
class Late(torch.nn.Module):
    def forward(self, digit, odd, ink, epoch, total_epochs):
        return (digit + odd + ink) * 1e30**epoch
"""
SYNTHETIC = "data=synthetic data.train_size=50 data.test_size=20"  # with random crops
TESTS = {"test/digit_accuracy": max, "test/odd_accuracy": max, "test/ink_mae": min}
every_strategy = pytest.mark.parametrize("options", STRATEGIES)


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing catches it, nothing is written after it."""


@dataclass
class Sparse(Digits):
    """Few labels: many batches lack a task's, some lack all; a `blind` one has no label of `odd` at all."""

    blind: bool = False

    def load(self) -> dict[str, Split]:
        splits = super().load()
        train, i = splits["train"].columns, torch.arange(len(splits["train"]))
        train["digit"][i % 4 != 0] = -100
        train["odd"][(i % 8 != 1) | self.blind] = -100
        train["ink"][i % 16 != 2] = torch.nan
        return splits


@pytest.fixture
def run(cli, tmp_path):
    """`run("a", "loss=dwa seed=1")` runs the small command into the output root a, as a new process would."""
    torch.set_num_threads(1)  # nets this small only lose by sharing
    (tmp_path / "my_loss.py").write_text(CUSTOM)
    return lambda root, options="": cli(*SMALL, f"output_root={root}", *options.split())


@pytest.fixture
def build(run, monkeypatch):
    """`build("loss=dwa")` returns the learner and the batches that the command would train, before the first step."""

    def call(options: str = ""):
        def grab(*arguments):
            built.extend(arguments)
            raise Killed

        built: list = []
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Learner, "train_epoch", grab)
            run("built", options)
        return built[:2]

    return call


def read(root: str) -> SimpleNamespace:
    """What a run has left behind; its rows without the time/* keys."""
    (file,) = Path(root).rglob("run.json")
    path, info = file.parent, json.loads(file.read_text())
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    states = {name: checkpoint.load(path / name) for name in ("last.pt", "best.pt") if (path / name).exists()}
    summary = json.loads((path / "summary.json").read_text())
    return SimpleNamespace(
        path=path, rows=rows, states=states, summary=summary, status=info["status"], error=info["error"]
    )


def assert_same(a: str, b: str) -> None:
    """Two finished runs agree in every bit of their rows and checkpoints."""
    a, b = read(a), read(b)
    assert a.status == b.status == "finished" and len(a.states) == len(b.states) == 2
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
    train_epoch, evaluate, current = Learner.train_epoch, Learner.evaluate, []

    def scripted(self, batches, name):
        return {**evaluate(self, batches, name), f"{name}/digit_accuracy": curves[name][current[-1]]}

    patch.setattr(Learner, "train_epoch", lambda self, b, epoch: current.append(epoch) or train_epoch(self, b, epoch))
    patch.setattr(Learner, "evaluate", scripted)


@pytest.mark.parametrize("options", ["loss=graddrop", SYNTHETIC])
def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(run, options):
    """Whatever the state of the global generator; order, crops, dropout and GradDrop's draws included."""
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(7)
        assert run(root, f"{options} seed={seed} trainer.epochs=2").code == 0
    assert_same("a", "b")
    a, c = read("a"), read("c")
    assert not [k for x, y in zip(a.rows, c.rows, strict=True) for k in x if k.endswith("_loss") and x[k] == y[k]]
    tensors = zip(a.states["last.pt"]["model"].items(), c.states["last.pt"]["model"].values(), strict=True)
    assert all(torch.equal(x, y) == key.endswith("num_batches_tracked") for (key, x), y in tensors)


ADAPTIVE = (
    "loss=uncertainty optimizer=adam schedule=one_cycle",
    "loss=uncertainty optimizer=adamw schedule=polynomial",
)


OTHERS = (  # statistics of the losses, weights learned by looking ahead, an optimizer for each task, momentum of signs
    "loss=annealed_guarded",
    "loss=moml",
    "optimizer=mtl_io loss=equal",
    "optimizer=signsgd loss=equal",
)


@pytest.mark.parametrize("options", [*STRATEGIES, *ADAPTIVE, *OTHERS, SYNTHETIC])
def test_an_interrupted_run_goes_on_exactly(run, monkeypatch, options):
    """Ctrl-C in epoch 2, then SIGTERM after it: the third start ends where an uninterrupted run ends, to the bit."""
    assert run("whole", options).code == 0
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run("parts", options).code == 130
    assert read("parts").status == "interrupted" and read("parts").summary["epochs"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", lambda self, row: signal.raise_signal(signal.SIGTERM))
        assert run("parts", options).code == 143
    assert read("parts").status == "interrupted" and read("parts").summary["epochs"] == 2
    assert "after epoch 2" in run("parts", options).out
    assert_same("whole", "parts")


def half_a_row(directory: RunDirectory, row: dict) -> None:
    directory.metrics.open("a").write(json.dumps(row)[:40])


def half_a_file(state: dict, path: Path) -> None:
    path.with_suffix(".tmp").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("owner", "name", "done"),
    [(RunDirectory, "append", half_a_row), (checkpoint, "save", half_a_file), (checkpoint, "save", checkpoint.save)],
    ids=("in the row", "between row and last.pt", "between last.pt and best.pt"),
)
def test_a_kill_while_an_epoch_is_saved_costs_that_epoch_at_most(run, monkeypatch, owner, name, done):
    """One run, killed at the same spot of every epoch, each of them the best so far."""
    script(monkeypatch, test=[10.0, 20.0, 30.0])
    assert run("whole").code == 0
    real = getattr(owner, name)
    for epoch in (1, 2, 3):

        def deadly(*arguments, epoch=epoch):
            (content,) = (a for a in arguments if isinstance(a, dict))  # a row or a state
            if content["epoch"] == epoch:
                done(*arguments)
                raise Killed
            real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, deadly)
            run("parts")
    assert run("parts").code == 0
    assert_same("whole", "parts")
    assert read("parts").states["best.pt"]["epoch"] == 3


def test_no_epoch_is_trained_twice_when_a_row_is_lost(run, monkeypatch):
    """last.pt is synced to disk, a row is not: a power cut may tear the last one. Refusing would do as well."""
    with monkeypatch.context() as patch:
        after_epoch(patch, 3, fail)
        run("parts")
    metrics = read("parts").path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    if run("parts").code == 0:
        assert run("whole").code == 0
        assert_same("whole", "parts")


def save_for_ever(path: Path) -> None:
    for number in range(10**6):
        checkpoint.save({"number": number, "tensor": torch.full((500_000,), float(number))}, path)


def test_a_kill_in_mid_save_leaves_a_whole_checkpoint(tmp_path):
    """A process that does nothing but save dies at random moments; what it leaves is always complete."""
    path = tmp_path / "last.pt"
    for _ in range(8):
        path.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        process.start()
        while not path.exists():
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        state = checkpoint.load(path)
        assert torch.equal(state["tensor"], torch.full((500_000,), float(state["number"])))


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [{"epoch": 1, "model": Code()}, b"PK damaged"], ids=("code", "damaged"))
def test_a_bad_checkpoint_is_refused_in_one_line(run, monkeypatch, content):
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, fail)
        run("a")
    last = read("a").path / "last.pt"
    last.write_bytes(content) if isinstance(content, bytes) else torch.save(content, last)
    result = run("a")
    assert not Path("executed").exists()
    assert result.code == 1 and "last.pt" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("curves", "chosen"), [([[1.0, 3.0, 3.0]], 2), ([[3.0, 1.0, 2.0]], 1), ([[3.0, 1.0, 2.0], [5.0, 6.0, 7.0]], 3)]
)
def test_best_and_summary_follow_from_the_rows(run, monkeypatch, curves, chosen):
    """best.pt is all of the first epoch with the best first-task accuracy, on validation data if there is any."""
    curves = dict(zip(("test", "val"), curves, strict=False))
    script(monkeypatch, **curves)
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda s, path: save(s, path) or saved.append(path.read_bytes()))
    assert run("a", f"data.val_fraction={0.2 * ('val' in curves)}").code == 0
    a = read("a")
    assert (a.path / "best.pt").read_bytes() == saved[chosen - 1] and a.states["best.pt"]["epoch"] == chosen
    assert a.summary["last"] == {key: a.rows[-1][key] for key in TESTS}
    columns = {key: [row[key] for row in a.rows] for key in TESTS}
    best = {
        k: {"value": TESTS[k](values), "epoch": values.index(TESTS[k](values)) + 1} for k, values in columns.items()
    }
    assert a.summary["best"] == best
    selected = {"by": "val/digit_accuracy", "epoch": chosen, **{key: a.rows[chosen - 1][key] for key in TESTS}}
    assert a.summary["selected"] == (selected if "val" in curves else None)


def test_a_failed_run_says_so_waits_for_its_lock_and_can_be_repeated(run, monkeypatch):
    """The lock belongs to an open file, so that a second holder in this process stands for another process."""
    with monkeypatch.context() as patch:
        after_epoch(patch, 2, fail)
        failed = run("parts")
    parts, trace = read("parts"), (read("parts").path / "train.log").read_text()
    assert failed.code == 1 and re.fullmatch(r"error: RuntimeError: out of cheese .*train\.log\)\n", failed.err)
    assert "Traceback" in trace and "Traceback" not in failed.out
    assert parts.status == parts.summary["status"] == "failed" and "cheese" in parts.error and len(parts.rows) == 1

    def content():
        files = [file for file in parts.path.iterdir() if file.name != ".lock"]
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}

    before = content()
    with RunDirectory(parts.path):
        busy = run("parts")
    assert busy.code == 1 and re.fullmatch(r"error: another process is training .*\n", busy.err)
    assert content() == before
    assert run("parts").code == run("whole").code == 0 and read("parts").error is None
    assert_same("whole", "parts")


DIVERGING = [(f"loss={loss} optimizer.lr=1e20", loss, 1) for loss in ("equal", "pcgrad", "uncertainty")]


@pytest.mark.parametrize(
    ("options", "loss", "epoch"), [*DIVERGING, (f"{STRATEGIES[-1]} loss.class_name=Late", "custom-my_loss", 2)]
)
def test_divergence_is_named(run, options, loss, epoch):
    """And no row holds what is no number; last.pt is mentioned only if there is one."""
    result = run("a", options)
    a = read("a")
    assert (result.code, a.status, result.err) == (1, "diverged", f"error: {a.error}\n")
    what = r"(digit loss|odd loss|ink loss|gradient norm) became (nan|inf)"
    assert re.match(rf"wide_resnet-{loss}-s42-\w+: {what} in epoch {epoch}\b", a.error), a.error
    assert len(a.rows) == epoch - 1
    assert ("last.pt" in a.error) == ("last.pt" in a.states) == (epoch > 1)


@every_strategy
def test_an_epoch_moves_every_parameter(build, options):
    learner, batches = build(f"{options} optimizer.weight_decay=0")  # decay alone would move most of them
    modules = torch.nn.ModuleList([learner.model, learner.strategy])
    before = copy.deepcopy(dict(modules.named_parameters()))
    learner.train_epoch(batches, 0)
    assert not [name for name, p in modules.named_parameters() if torch.equal(p, before[name])]
    assert list(learner.model.heads) == (["odd"] if "single" in options else ["digit", "odd", "ink"])


@pytest.mark.parametrize(("options", "tasks"), [(STRATEGIES[2], ["odd"]), ("loss=equal", ["digit", "odd", "ink"])])
def test_training_equals_a_plain_loop(build, double, options, tasks):
    """Two epochs of PyTorch as everybody writes it; a row holds means over the samples, not over the batches."""
    learner, batches = build(f"{options} arch.dropout=0 trainer.epochs=2")
    double(learner)
    model = copy.deepcopy(learner.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for epoch, rate in enumerate((0.01, 0.005)):
        optimizer.param_groups[0]["lr"] = rate
        expected = dict.fromkeys((f"train/{task}_loss" for task in tasks), 0.0)
        for batch in batches.epoch(epoch):
            losses = [
                F.smooth_l1_loss(y[:, 0], batch[t]) if t == "ink" else F.cross_entropy(y, batch[t])
                for t, y in zip(tasks, model(batch).predictions, strict=True)
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            for task, loss in zip(tasks, losses, strict=True):
                expected[f"train/{task}_loss"] += loss.item() * len(batch["image"]) / 50
        row = learner.train_epoch(batches, epoch)
        assert {key: row[key] for key in (*expected, "lr")} == pytest.approx({**expected, "lr": rate}, rel=1e-10)
        torch.testing.assert_close(list(learner.model.parameters()), list(model.parameters()), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "lr", "decay"),
    [
        ("loss=uncertainty", 0.01, 0.0),
        ("loss=uncertainty loss.lr=0.025 loss.weight_decay=null", 0.025, 5e-4),
        (STRATEGIES[-1], 0.01, 5e-4),
        (f"{STRATEGIES[-1]} loss.lr=0.2 loss.weight_decay=0", 0.2, 0.0),
    ],
)
def test_the_methods_parameters_are_a_group_of_their_own(build, options, lr, decay):
    learner, batches = build(options)
    groups = learner.optimizer.param_groups
    for group, module in zip(groups, (learner.model, learner.strategy), strict=True):
        assert [*map(id, group["params"])] == [*map(id, module.parameters())]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 5e-4), (lr, decay)]
    learner.train_epoch(batches, 1)  # a third of the cosine: three quarters of the rate
    assert [g["lr"] for g in groups] == pytest.approx([0.0075, 0.75 * lr])


def test_an_epochs_losses_reach_the_strategy(build):
    """DWA: the weights of the third epoch follow from the losses that the rows of the first two hold."""
    learner, batches = build("loss=dwa")
    rows = []
    for epoch in range(3):
        rows.append(learner.train_epoch(batches, epoch))
        learner.epoch_end(rows[-1])
    losses = torch.tensor([[row[f"train/{task}_loss"] for task in ("digit", "odd", "ink")] for row in rows])
    weights = torch.tensor([[row[f"weights/{task}"] for task in ("digit", "odd", "ink")] for row in rows])
    expected = torch.ones(3, 3)
    expected[2] = 3 * torch.softmax(losses[1] / losses[0] / 2, 0)
    torch.testing.assert_close(weights, expected)


def test_evaluation_is_the_mean_over_all_samples(build):
    """40 samples in batches of 13, against one forward pass of them all."""
    learner, batches = build()
    learner.train_epoch(batches, 0)
    benchmark = Digits(limit_test=40, eval_batch_size=13)
    split = benchmark.splits()["test"]
    row = learner.evaluate(EvaluationBatches(split, benchmark, learner.device), "test")
    with torch.no_grad():
        images = ((split.column("image") / 255 - 0.305) / 0.376).permute(0, 3, 1, 2)
        *outputs, ink = learner.model.eval()({"image": images}).predictions
    targets = split.batch(slice(None))
    expected = {
        "test/ink_loss": F.smooth_l1_loss(ink[:, 0], targets["ink"]),
        "test/ink_mae": F.l1_loss(ink[:, 0], targets["ink"]),
    }
    for task, y in zip(("digit", "odd"), outputs, strict=True):
        expected[f"test/{task}_loss"] = F.cross_entropy(y, targets[task])
        expected[f"test/{task}_accuracy"] = 100 * (y.argmax(1) == targets[task]).float().mean()
    assert row == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("blind", [False, True])
@every_strategy
def test_missing_labels_leave_no_mark(build, options, blind):
    """Finite parameters whatever is missing, and a head without a single label stays as it was made."""
    sparse = f"data._target_={__name__}.Sparse +data.blind={blind} data.batch_size=5 data.limit_train=80"
    learner, batches = build(f"{options} {sparse} optimizer.weight_decay=0")
    labels = [[bool(t.count(batch[t.name])) for t in Sparse.tasks] for batch in batches.epoch(0)]
    assert (
        [] != [batch for batch in labels if not any(batch)] != labels
    )  # a batch without any label at all, but not all
    head = learner.model.heads["odd"].state_dict()
    before = copy.deepcopy(head)
    rows = []
    for epoch in range(3):
        rows.append(learner.train_epoch(batches, epoch))
        with pytest.raises(NothingTrained) if blind and "loss.task=odd" in options else nullcontext():
            learner.epoch_end(rows[-1])
    assert all(p.isfinite().all() for module in (learner.model, learner.strategy) for p in module.parameters())
    nan = {key for row in rows for key, value in row.items() if value != value}
    assert nan == ({"train/odd_loss", "train/odd_accuracy"} if blind else set())
    assert [torch.equal(before[name], head[name]) for name in head] == [blind, blind]


@pytest.mark.parametrize("loss", ["equal", "pcgrad"])
def test_the_layout_changes_nothing_but_rounding(build, double, loss):
    losses, layouts = [], []
    both = [build(f"loss={loss} arch.dropout=0 {more}") for more in ("", "trainer.channels_last=false")]
    for learner, batches in both:
        layouts.append(learner.model.backbone.blocks[0].conv1.weight.is_contiguous())
        row = double(learner).train_epoch(batches, 0)
        losses.append([row[f"train/{task}_loss"] for task in ("digit", "odd", "ink")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and layouts == [False, True]


@pytest.mark.parametrize("loss", ["equal", "pcgrad"])
def test_half_precision_changes_little(build, loss):
    """Parameters and gradients stay fp32; the option does take effect."""
    losses = []
    for more in ("", "trainer.precision=bf16"):
        learner, batches = build(f"loss={loss} arch.dropout=0 {more}")
        row = learner.train_epoch(batches, 0)
        losses.append([row[f"train/{task}_loss"] for task in ("digit", "odd", "ink")])
        assert {t.dtype for p in learner.model.parameters() for t in (p, p.grad)} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


@every_strategy
def test_no_step_waits_for_the_device(build, monkeypatch, options):
    """The host reads as often in an epoch of six steps as in one of two."""
    monkeypatch.setattr("mtl.engine.guard.host", lambda flags: None)  # as on a GPU: flags are not read at once
    counts = {}
    for size in (64, 192):
        learner, batches = build(f"{options} data.limit_train={size}")
        reads: list[str] = []
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
                real = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda *a, f=real, to=reads, n=name: to.append(n) or f(*a))
            learner.train_epoch(batches, 0)
        counts[len(batches)] = reads
    assert [] != counts[2] == counts[6]
