"""A user's own loss, as users write them: reproducible, resumable or refused, and named when it is wrong."""

import copy
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

from mtl.archs.resnet import WideResNet
from mtl.data.digits import Digits
from mtl.engine.build import assemble, open_batches
from mtl.engine.learner import Learner
from mtl.errors import SetupError
from mtl.losses import Equal

SMALL = ("data=digits", "data.limit_train=24", "data.limit_test=8", "data.batch_size=8",
         "arch=wide_resnet", "arch.depth=10", "arch.width=1", "optimizer.lr=0.01", "trainer.epochs=2",
         "logger=none")  # fmt: skip
HEAD = """
import collections, dataclasses, functools, itertools, random
import numpy as np, torch
from torch import nn
"""
# The body of a class `MultiTaskLoss(nn.Module)` whose state decides the weight of the second epoch's losses.
EXACT = {
    "random parameters": """
    def __init__(self):
        super().__init__(); self.net = nn.Linear(2, 2)
    def forward(self, a, b, _, epoch, total):
        l = torch.stack([a, b]); return (2 * torch.softmax(self.net(l.detach()), 0) * l).sum()
""",
    "numpy, random and torch": """
    def forward(self, a, b, _, epoch, total):
        w = np.random.rand() + random.random() + torch.rand(()); return w * a + b
""",
    "generators of its own": """
    def __init__(self):
        super().__init__(); self.n, self.r = np.random.default_rng(3), random.Random(4)
        self.o, self.t = np.random.RandomState(5), torch.Generator().manual_seed(6)
    def forward(self, a, b, _, epoch, total):
        w = self.n.random() + self.r.random() + self.o.rand() + torch.rand((), generator=self.t); return w * a + b
""",
    "numbers, lists, a deque, a dict, None": """
    def __init__(self):
        super().__init__(); self.n, self.old, self.all = 0, None, []
        self.last, self.by, self.d = collections.deque(maxlen=2), {"a": [1.0]}, collections.defaultdict(list)
    def forward(self, a, b, _, epoch, total):
        self.n += 1; self.all.append((a.item(), b.item())); self.last.append(a.item())
        self.by["a"][0] += 0.1; self.d[epoch].append(b.item())
        w = 1 if self.old is None else self.old / a.item()
        self.old = self.all[0][0] + self.last[0] + sum(map(sum, self.d.values())) + self.by["a"][0]
        return w * a + b / self.n
""",
    "tensors and arrays": """
    def __init__(self):
        super().__init__(); self.ema, self.prev, self.array = torch.zeros(2), None, np.zeros((2, 1), dtype=np.float16)
    def forward(self, a, b, _, epoch, total):
        now = torch.stack([a, b]).detach(); self.ema += now; self.array[1] += np.float16(a.item())
        self.scale = np.float32(1.5) if self.prev is None else self.scale * np.float32(1.1)
        self.prev = now if self.prev is None else self.prev * 0.9 + now
        return self.ema[0] * a + self.prev[1] * b + float(self.array.sum() + self.scale) * a
""",
    "two names of one object": """
    def __init__(self):
        super().__init__(); self.x = self.y = []; self.register_buffer("buf", torch.zeros(1)); self.z = self.buf
    def forward(self, a, b, _, epoch, total):
        self.x.append(1.0); self.z += 0.5
        return len(self.y) * a + self.buf[0] * b
""",
    "made at the first batch": """
    def forward(self, a, b, _, epoch, total):
        if not hasattr(self, "ema"):
            self.register_buffer("ema", torch.zeros(2)); self.register_buffer("hidden", torch.ones(1), persistent=False)
            self.p, self.late = nn.Parameter(torch.rand(2)), nn.Linear(1, 1)
        self.ema += torch.stack([a, b]).detach(); self.hidden += 1
        return self.ema[0] * a + self.p[0] * self.hidden * b + self.late.weight.sum().detach() * a
""",
    "helpers and nested modules": """
    def __init__(self):
        super().__init__(); self.h, self.inner, self.hidden = Helper(), Inner(), [Inner()]; self.h.back = self
    def forward(self, a, b, _, epoch, total):
        self.h.count += 1; self.h.data.values.append(a.item()); self.hidden[0](b)
        return self.inner(a) * self.h.count + b * sum(self.h.data.values) * self.hidden[0].k
class Inner(nn.Module):
    k = 0
    def forward(self, x):
        self.k += 1; return x * self.k
class Helper:
    def __init__(self): self.count, self.data = 0, Data([])
@dataclasses.dataclass
class Data:
    values: list
""",
    "class attributes, globals, defaults, closures": """
    history = []
    def forward(self, a, b, _, epoch, total, seen=[]):
        global steps
        steps += 1; seen.append(1); self.history.append(a.item()); MultiTaskLoss.last = b.item()
        return a * (steps + len(seen)) + b * (sum(self.history) + counted())
steps, table = 0, np.zeros(3)
def counter():
    n = 0
    def count():
        nonlocal n; n += 1; return n
    return count
counted = counter()
""",
    "an optimizer of its own": """
    def __init__(self):
        super().__init__(); self.w = torch.ones(2, requires_grad=True); self.opt = torch.optim.Adam([self.w], lr=0.1)
    def forward(self, a, b, _, epoch, total):
        self.opt.zero_grad(); (self.w.detach().requires_grad_() * 1).sum()
        (self.w * torch.stack([a, b]).detach()).sum().backward(); self.opt.step()
        return (self.w.detach() * torch.stack([a, b])).sum()
""",
    "code that stays as it is": """
    def __init__(self):
        super().__init__(); self.f, self.g = lambda x: 2 * x, functools.partial(max, 1)
        self.np, self.m = np, self.double
    def double(self, x): return 2 * x
    def forward(self, a, b, _, epoch, total):
        self.h = self.double; return self.f(a) + self.h(b) + self.m(b) * self.g(2)
""",
}
REFUSED = {  # and the attribute that is to blame
    "log": "open('log.txt', 'a')",
    "cycle": "itertools.cycle([1, 2])",
    "made": "(x for x in [1, 2])",
}


@pytest.fixture
def run(cli, tmp_path):
    """`run(body)` trains with the class of that body."""
    torch.set_num_threads(1)

    def call(body: str, *options: str, root: str = "out"):
        write(tmp_path, body)
        return cli(*SMALL, "loss=custom", "loss.file=my_loss.py", f"output_root={root}", *options)

    return call


def write(folder: Path, body: str) -> None:
    (folder / "my_loss.py").write_text(f"{HEAD}\nclass MultiTaskLoss(nn.Module):\n{body}")


CONFIG: dict = {}  # composed once


@pytest.fixture
def build(run, tmp_path):
    """`build(body)` returns the learner and the batches of a new process, before the first step."""
    if not CONFIG:
        run("    def forward(self, a, b, c, epoch, total): return a + b + c", "trainer.epochs=1", root="first")
        (file,) = Path("first").rglob("config.yaml")
        CONFIG.update(yaml.safe_load(file.read_text()))

    def call(body: str = "", **nodes):
        write(tmp_path, body)
        config = copy.deepcopy(CONFIG)
        config["loss"]["file"] = str(tmp_path / "my_loss.py")
        config["trainer"]["epochs"] = 3
        config |= {k: yaml.safe_load((ROOT / f"conf/{k}/{v}.yaml").read_text()) if isinstance(v, str) else v
                   for k, v in nodes.items()}  # fmt: skip
        benchmark, learner = assemble(config)
        return learner, open_batches(benchmark, learner)[0]

    return call


def epochs(learner: Learner, batches, numbers) -> list[dict]:
    rows = []
    for epoch in numbers:
        row = learner.train_epoch(batches, epoch)
        learner.epoch_end(row)
        rows.append({k: v for k, v in row.items() if not k.startswith("time/")})
    return rows


def saved(learner: Learner, epoch: int) -> dict:
    content = io.BytesIO()
    torch.save({"epoch": epoch, **learner.state()}, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


@pytest.mark.parametrize("body", EXACT.values(), ids=EXACT)
def test_a_custom_loss_is_a_function_of_the_seed_and_resumes_exactly(build, body):
    """Whatever it draws from, and wherever it keeps its state."""
    learner, batches = build(body)
    whole = epochs(learner, batches, range(1))
    checkpoint = saved(learner, 1)
    assert "unsavable" not in checkpoint
    whole += epochs(learner, batches, range(1, 3))

    np.random.seed(77), torch.manual_seed(77)
    learner, batches = build(body)
    parts = epochs(learner, batches, range(1))
    learner, batches = build(body)
    learner.load_state(copy.deepcopy(checkpoint))
    parts += epochs(learner, batches, range(1, 2))
    checkpoint, (learner, batches) = saved(learner, 2), build(body)  # once more, from what was restored
    learner.load_state(checkpoint)
    parts += epochs(learner, batches, range(2, 3))
    assert parts == whole
    assert whole[1]["weights/digit"] != whole[0]["weights/digit"] or "code" in body or "double" in body


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_what_cannot_be_saved_is_named_and_not_resumed(build, caplog, name, value):
    body = f"""
    def __init__(self):
        super().__init__(); self.{name} = {value}
    def forward(self, a, b, _, epoch, total): return a + b
"""
    with caplog.at_level("INFO", "mtl"):
        learner, batches = build(body)
        epochs(learner, batches, range(2))
    said = [r.getMessage() for r in caplog.records if "cannot be resumed" in r.getMessage()]
    assert len(said) == 1 and f"loss.module.{name} is a" in said[0]
    checkpoint = saved(learner, 2)
    with pytest.raises(SetupError, match=rf"cannot be resumed exactly: loss\.module\.{name} is a"):
        build(body)[0].load_state(checkpoint)
    build(body)[0].load_state({**checkpoint, "epoch": 0})  # only handed to another process


def test_a_run_that_cannot_be_resumed_says_so_in_one_line(run, monkeypatch):
    body = """
    def __init__(self):
        super().__init__(); self.made = None
    def forward(self, a, b, _, epoch, total):
        self.made = lambda: 0
        return a + b if epoch == 0 else 1 / self.made()
"""
    first, again = run(body), run(body)
    assert first.code == 1 and "loss.module.made is a function" in first.out
    assert re.search(r"ZeroDivisionError: division by zero \(.*my_loss\.py:12 in forward; traceback", first.err), (
        first.err
    )
    assert again.code == 1 and again.err.count("\n") == 1 and "cannot be resumed exactly: loss.module.made" in again.err


@pytest.mark.parametrize(
    "body",
    [
        "a += 0.3 * b; return a",
        "b.mul_(0.3); a += b; return a",
        "b *= 0.3; total = a; total += b; return total",
    ],
)
def test_a_loss_may_work_in_place(build, body):
    (learner, batches), (plain, same) = (
        build(f"    def forward(self, a, b, _, epoch, total): {body}"),
        build("    def forward(self, a, b, _, epoch, total): return a + 0.3 * b"),
    )
    row, expected = epochs(learner, batches, range(1))[0], epochs(plain, same, range(1))[0]
    assert row == pytest.approx(expected, rel=1e-5)
    assert [row[f"weights/{t}"] for t in ("digit", "odd", "ink")] == pytest.approx([1, 0.3, 0])


WRONG = {  # and the line to blame, counted from the class
    "torch.tensor([a, b]).sum() + self.s": 4,
    "a.detach() + b.item() + self.s": 4,
    "self.s * 1": 3,
    "torch.stack([a, b])": 3,
    "3.0": 3,
}


@pytest.mark.parametrize(("total", "line"), WRONG.items())
def test_a_total_that_trains_nothing_is_refused(build, total, line):
    body = f"""
    def __init__(self): super().__init__(); self.s = nn.Parameter(torch.ones(()))
    def forward(self, a, b, _, epoch, total):
        return {total}
"""
    learner, batches = build(body)
    with pytest.raises(TypeError) as info:
        learner.train_epoch(batches, 0)
    message = str(info.value)
    assert re.search(r"^MultiTaskLoss\.forward returned .*my_loss\.py:9\)", message), message
    assert (f"line {line + 6}" in message) == (line == 4), message


def test_a_loss_that_reaches_no_total_is_mentioned_once(build, caplog):
    learner, batches = build("    def forward(self, a, b, _, epoch, total): return a + b.item()")
    with caplog.at_level("INFO", "mtl"):
        epochs(learner, batches, range(2))
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("WARNING")]
    assert re.search(r"my_loss\.py:7: the total never depends on the loss of odd, ink", said), said


def test_a_resumed_run_does_not_complain_of_losses_before_its_first_batch(build, caplog):
    learner, batches = build(body := "    def forward(self, a, b, c, epoch, total): return a + b + c")
    epochs(learner, batches, range(1))
    checkpoint, (learner, batches) = saved(learner, 1), build(body)
    learner.load_state(checkpoint)
    with caplog.at_level("INFO", "mtl"):
        epochs(learner, batches, range(1, 3))
    assert not [r.getMessage() for r in caplog.records if "never depends" in r.getMessage()]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (
            "    def __init__(self): super().__init__(); self.x = {}['k']",
            r"my_loss\.py cannot be built: KeyError.*my_loss\.py:7 in __init__",
        ),
        ("    x = 1 +", r"my_loss\.py does not load: SyntaxError.*my_loss\.py:7"),
        ("    x = 1 / 0", r"my_loss\.py does not load: ZeroDivisionError.*my_loss\.py:7 in "),
    ],
)
def test_a_file_that_fails_names_its_line(run, body, where):
    result = run(body)
    assert result.code == 2 and result.err.count("\n") == 1 and re.search(where, result.err), result.err


IDLE = {  # options: the words of the reason, and whether it is said in the first epoch
    "optimizer.lr=0": "optimizer.lr=0",
    f"loss=equal loss._target_={__name__}.Nothing": "gradients are 0",
    f"data._target_={__name__}.Unlabelled": "no training sample has a label",
}


class Nothing(Equal):
    """Depends on the losses, with a slope of 0."""

    def forward(self, losses, present=None):
        return 0 * super().forward(losses, present)


@dataclass
class Unlabelled(Digits):
    def load(self):
        splits = super().load()
        train = splits["train"].columns
        train["digit"][:], train["odd"][:], train["ink"][:] = -100, -100, torch.nan
        return splits


@pytest.mark.parametrize(("options", "why"), IDLE.items())
def test_a_run_that_trains_nothing_fails_and_says_why(cli, options, why):
    result = cli(*SMALL, *options.split())
    assert result.code == 1 and result.err.count("\n") == 1 and why in result.err, (result.out, result.err)


WARM = "schedule.warmup_epochs=1 schedule.interval=step data.batch_size=24"  # all of the first epoch at rate 0


@pytest.mark.parametrize("options", [WARM, "optimizer=mtl_io", "optimizer=adatask", "loss=single loss.task=odd"])
def test_a_run_that_trains_late_or_in_turns_is_no_failure(cli, options):
    result = cli(*SMALL, *options.split())
    assert result.code == 0 and "WARNING" not in result.out, (result.out, result.err)


class Frozen(WideResNet):
    """A backbone of which all, or the first block, or nothing trains."""

    def __init__(self, in_channels: int, trains: str):
        super().__init__(in_channels, depth=10, width=1)
        for name, p in self.named_parameters():
            p.requires_grad_(trains == "all" or (trains == "block" and "blocks.0" in name))


# Each family; gradients of the features; several samples; looking ahead and back; one task after the other.
FAMILIES = ("equal", "uncertainty", "pcgrad", "graddrop", "imtl", "rotograd", "db_mtl", "mgda", "sdmgrad", "moml",
            "famo", "gradnorm", "consmtl", "rep_mtl", "adatask", "mtl_io")  # fmt: skip


@pytest.mark.parametrize("trains", ["block", "nothing"])
@pytest.mark.parametrize("loss", FAMILIES)
def test_the_heads_of_a_frozen_backbone_train(build, loss, trains):
    nodes = {"optimizer": loss, "loss": "equal"} if loss in ("adatask", "mtl_io") else {"loss": loss}
    learner, batches = build(arch={"_target_": f"{__name__}.Frozen", "trains": trains}, **nodes)
    before = copy.deepcopy(dict(learner.model.named_parameters()))
    (row,) = epochs(learner, batches, range(1))
    moved = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in before.items() if p.requires_grad} and any("heads" in name for name in moved)
    assert (row["grad/norm"] > 0) == (trains == "block")
    assert all(np.isfinite(value) for value in row.values())
