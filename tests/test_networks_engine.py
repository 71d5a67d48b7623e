"""The optimizers that keep state for each task, against `oracles/networks.py`; they and the methods of
`test_networks.py` in the engine: short runs, resuming, missing labels, refusals."""

import copy
import io
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import networks as oracle
from test_networks import backward, close, problem
from torch import nn

import mtl
from mtl.data.base import Split
from mtl.data.batches import EvaluationBatches
from mtl.data.digits import Digits
from mtl.engine import checkpoint
from mtl.engine.accumulate import accumulate
from mtl.engine.backward import gradients
from mtl.engine.learner import Learner
from mtl.losses import LDCMTL, ConsMTL, Equal, RepMTL, Static
from mtl.optim.signum import Signum
from mtl.optim.taskwise import MTLIO, AdaTask

# --------------------------------------------------------------------------------------------------------- optimizers

BETAS, EPS, LR = (0.8, 0.95), 1e-3, 0.05
RULES = {"adam": lambda: oracle.Adam(BETAS, EPS), "adagrad": lambda: oracle.AdaGrad(EPS),
         "rmsprop": lambda: oracle.RMSProp(BETAS[1], EPS), "sgd": lambda: oracle.Momentum(BETAS[0])}  # fmt: skip
TORCH = {
    "adam": lambda p, d: torch.optim.AdamW(p, LR, BETAS, EPS, weight_decay=d),
    "adagrad": lambda p, d: torch.optim.Adagrad(p, LR, eps=EPS),
    "rmsprop": lambda p, d: torch.optim.RMSprop(p, LR, BETAS[1], EPS),
    "sgd": lambda p, d: torch.optim.SGD(p, LR, BETAS[0]),
}
every_base = pytest.mark.parametrize("base", RULES)


def update(twin, strategy, optimizer, batch, labelled=None):
    """One `mtl.Step`."""
    step = mtl.Step(strategy, optimizer, twin.shared, twin.heads)
    return step(lambda part: mtl.Losses(*reversed(twin(batch, strategy))), len(batch[0]), labelled)


def adatask(twin, base, decay=0.0, eps=EPS, kind=AdaTask):
    return kind(twin.parameters(), LR, base, BETAS, eps, decay)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_base
def test_adatask_of_one_task_is_the_base_optimizer(base, decay):
    if decay and base != "adam":
        pytest.skip("PyTorch's own has no decoupled decay")
    _, ours, batches = problem(5, outputs=(2,))
    plain = copy.deepcopy(ours)
    optimizer, other = adatask(ours, base, decay), TORCH[base](plain.parameters(), decay)
    for batch in batches:
        plain.zero_grad()
        plain(batch)[1][0].backward()
        update(ours, Equal(1), optimizer, batch)
        other.step()
        close(ours.numpy(), plain.numpy(), 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_base
def test_adatask(base, decay):
    """Weighted tasks, some of them absent: they keep their accumulators bit by bit, and their heads rest."""
    net, twin, batches = problem(6)
    optimizer, expected = adatask(twin, base, decay), oracle.AdaTask(net, RULES[base])
    weights = np.array([1, 0.5, 20])
    strategy = Static(3, weights.tolist()).double()
    for batch, present in zip(batches, ([1, 1, 0], [1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1]), strict=True):
        there, p = torch.tensor(present) > 0, twin.numpy()
        scaled = zip(weights * present, net.gradients(p, batch), strict=True)
        gradients = [{n: w * x for n, x in g.items()} for w, g in scaled]
        before = {q: {n: t.clone() for n, t in optimizer.state.get(q, {}).items()} for q in twin.shared}
        update(twin, strategy, optimizer, batch, there.expand(len(batch[0]), -1))
        for q in twin.shared:
            assert all(torch.equal(old[~there], optimizer.state[q][n][~there]) for n, old in before[q].items())
        close(twin.numpy(), expected.step(p, gradients, LR, decay, present), 1e-11)


@every_base
def test_adatask_is_blind_to_a_constant_factor(base):
    """On one task's loss; but for sgd, whose step has no denominator."""
    ends = []
    for factor in (1, 1e4):
        _, twin, batches = problem(4)
        optimizer = adatask(twin, base, eps=1e-30)
        for batch in batches:
            update(twin, Static(3, [1.0, factor, 1.0]).double(), optimizer, batch)
        ends.append(oracle.flat(twin.numpy()))
    assert np.allclose(*ends, rtol=0, atol=1e-9) == (base != "sgd")


@pytest.mark.parametrize("strategy", [LDCMTL(3, 0.4), ConsMTL(3)])
def test_gradients_do_not_depend_on_the_optimizer(strategy):
    """One that needs each task's gradient leaves the sum as it is."""
    _, twin, (batch,) = problem(1)
    found = []
    for each in (False, True):
        twin.zero_grad()
        strategy.double().zero_grad()
        z, losses = twin(batch, strategy)
        step = gradients(losses, strategy, twin.shared, twin.heads, None, z, each=each)
        assert all(p.grad is None for p in twin.parameters())  # nothing is written yet
        accumulate(step)
        found.append([*twin.grads().values(), *(p.grad.numpy() for p in strategy.parameters())])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-12)
    whole = torch.cat([p.grad.flatten() for p in twin.shared])
    torch.testing.assert_close(step.rows.sum(0), whole, rtol=1e-12, atol=1e-14)


def test_a_regulariser_has_no_task_to_go_to():
    _, twin, (batch,) = problem(1)
    with pytest.raises(ValueError, match=r"^RepMTL adds a regulariser that belongs to no task.*$"):
        update(twin, RepMTL(3), adatask(twin, "adam"), batch)


@every_base
def test_adatask_goes_on_from_its_state(base):
    _, twin, batches = problem(4)
    optimizer = adatask(twin, base)
    for batch in batches[:3]:
        update(twin, Equal(3), optimizer, batch)
    file = io.BytesIO()
    torch.save({"model": twin.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state, (_, other, _) = torch.load(file, weights_only=True), problem(1, seed=1)
    other.load_state_dict(state["model"])
    again = adatask(other, base)
    again.load_state_dict(state["optimizer"])
    for net, rule in ((twin, optimizer), (other, again)):
        update(net, Equal(3), rule, batches[3])
    ends = [(rule.state_dict(), net.state_dict()) for net, rule in ((twin, optimizer), (other, again))]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@every_base
def test_mtl_io(base):
    """Against the explicit loop, and one torch.optim.Adam a task over all parameters."""
    net, twin, batches = problem(4)
    plain = copy.deepcopy(twin)
    optimizer, expected = adatask(twin, base, kind=MTLIO), oracle.MTLIO(net, RULES[base])
    others, p = [TORCH[base](plain.parameters(), 0.0) for _ in net.tasks], twin.numpy()
    for batch in batches:
        for k in net.tasks:
            twin.zero_grad()
            twin(batch)[1][k].backward()
            optimizer.step_task(k, 3)
            plain.zero_grad()
            plain(batch)[1][k].backward()
            others[k].step()
        p = expected.step(p, batch, LR)
        close(twin.numpy(), p, 1e-11)
        close(plain.numpy(), p, 1e-11)


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.0)])
def test_signum(momentum, decay):
    net, twin, batches = problem(5)
    optimizer = Signum(twin.parameters(), LR, momentum, decay)
    rules, p = {n: oracle.Signum(momentum) for n in twin.p}, twin.numpy()
    for batch in batches:
        g = oracle.combine([1, 1, 1], net.gradients(p, batch))
        p = {n: rules[n].step(p[n], g[n], LR, decay) for n in p}
        backward(twin, Equal(3), batch)
        optimizer.step()
        close(twin.numpy(), p, 1e-13)


# ----------------------------------------------------------------------------------------------------------- engine

SMALL = ("data=digits", "data.limit_train=128", "data.limit_test=40", "data.batch_size=64", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "optimizer.lr=0.01", "trainer.epochs=2", "trainer.device=cpu",
         "logger=none")  # fmt: skip
RUNS = ("loss=graddrop step.gradients=features", "loss=rotograd loss.burn_in=5", "loss=ldc_mtl", "loss=rep_mtl",
        "loss=auto_lambda", "loss=moml", "loss=consmtl", "optimizer=adatask loss=uncertainty",
        "optimizer=adatask optimizer.base=rmsprop loss=fairgrad", "optimizer=mtl_io", "optimizer=signsgd")  # fmt: skip
every_run = pytest.mark.parametrize("options", RUNS)


class Grabbed(BaseException):
    """Ends a run before its first step."""


@dataclass
class Sparse(Digits):
    """Few labels: many batches lack a task's, and none has one of `odd`."""

    def load(self) -> dict[str, Split]:
        splits = super().load()
        train, i = splits["train"].columns, torch.arange(len(splits["train"]))
        train["digit"][i % 4 != 0] = -100
        train["odd"][:] = -100
        train["ink"][i % 16 != 2] = torch.nan
        return splits


@pytest.fixture
def run(cli):
    torch.set_num_threads(1)
    return lambda root, options: cli(*SMALL, f"output_root={root}", *options.split())


@pytest.fixture
def build(run, monkeypatch):
    """`build("loss=moml")` returns the learner and the batches that the command would train, before the first step."""

    def call(options):
        def grab(*arguments):
            built.extend(arguments)
            raise Grabbed

        built: list = []
        with monkeypatch.context() as patch, pytest.raises(Grabbed):
            patch.setattr(Learner, "train_epoch", grab)
            run("built", options)
        built[0].model.train()
        return built[:2]

    return call


def outcome(root):
    """Rows without times, and both checkpoints, of a finished run."""
    (file,) = Path(root).rglob("run.json")
    assert json.loads(file.read_text())["status"] == "finished"
    rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return rows, [checkpoint.load(file.parent / name) for name in ("last.pt", "best.pt")]


@every_run
def test_a_short_run_finishes(run, options):
    assert run("out", options).code == 0
    rows, (state, _) = outcome("out")
    assert len(rows) == 2 and all(np.isfinite(v) for row in rows for v in row.values())
    buffers = {n: t for n, t in state["strategy"].items() if n in ("task_weights", "logits", "generators")}
    assert all((t != t.flatten()[0]).any() for t in buffers.values())  # they have learned


@pytest.mark.parametrize("options", ["loss=rotograd loss.burn_in=3", "loss=auto_lambda", "optimizer=adatask"])
def test_an_interrupted_run_goes_on_exactly(run, monkeypatch, options):
    """Dropout on; interrupted when the second epoch has been trained but not saved."""
    options, train_epoch = f"{options} arch.dropout=0.3", Learner.train_epoch

    def interrupted(self, batches, epoch):
        row = train_epoch(self, batches, epoch)
        return signal.raise_signal(signal.SIGINT) if epoch else row

    assert run("whole", options).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", interrupted)
        assert run("parts", options).code == 130
    resumed = run("parts", options)
    assert resumed.code == 0 and "after epoch 1" in resumed.out
    torch.testing.assert_close(outcome("parts"), outcome("whole"), rtol=0, atol=0)


@every_run
def test_missing_labels_leave_no_mark(build, options):
    """Everything stays finite, and a head without a single label as it was made."""
    sparse = f"data._target_={__name__}.Sparse data.batch_size=8 data.limit_train=40 optimizer.weight_decay=0"
    learner, batches = build(f"{options} {sparse}")
    before = copy.deepcopy(learner.model.heads.state_dict())
    learner.train_epoch(batches, 0)
    assert all(p.isfinite().all() for m in (learner.model, learner.strategy) for p in m.parameters())
    after = learner.model.heads.state_dict()
    assert {name.split(".")[0] for name in after if torch.equal(before[name], after[name])} == {"odd"}


REFUSED = ("optimizer=adatask loss=graddrop", "optimizer=mtl_io loss=pcgrad", "loss=rotograd step.gradients=parameters",
           "optimizer=adatask loss=mgda step.gradients=features", "optimizer=adatask loss=rep_mtl",
           "optimizer=mtl_io step.transform=log", "optimizer=mtl_io step.scale=norm")  # fmt: skip


@pytest.mark.parametrize("options", REFUSED)
def test_what_does_not_fit_is_refused(run, options):
    result = run("refused", options)
    assert result.code == 2 and re.fullmatch(r"error: .+\n", result.err) and not Path("refused").exists()


def test_looking_ahead_draws_the_same_dropout_masks(build, monkeypatch):
    learner, batches = build("loss=auto_lambda arch.dropout=0.5")
    batch = next(iter(batches.epoch(0)))
    seen = []
    monkeypatch.setattr(type(learner.strategy), "look_ahead", lambda self, of, *_: seen.extend([of(0), of(0), of(1)]))
    state = torch.get_rng_state()
    learner.step()._look_ahead(learner.forward(batch, learner._groups.units(batch)), len(batch["image"]), None)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(state, torch.get_rng_state())


def test_rotograd_predicts_from_rotated_features(build):
    learner, _ = build("loss=rotograd")
    nn.init.normal_(learner.strategy.generators, std=0.5, generator=torch.Generator().manual_seed(0))
    turns, heads = learner.strategy.rotations().detach(), learner.model.heads.values()
    benchmark = Digits(limit_test=40)
    split = benchmark.splits()["test"]
    row = learner.evaluate(EvaluationBatches(split, benchmark, learner.device), "test")
    images = ((split.column("image") / 255 - 0.305) / 0.376).permute(0, 3, 1, 2)
    for train in (False, True):
        learner.model.train(train)
        with torch.no_grad():
            z = learner.model.backbone(images)
            expected = [head(z @ turn.T) for head, turn in zip(heads, turns, strict=True)]
            torch.testing.assert_close(learner.predict({"image": images}).predictions, expected)
        if not train:
            loss = F.cross_entropy(expected[0], split.column("digit")).item()
            assert row["test/digit_loss"] == pytest.approx(loss, rel=1e-5)
            plain = F.cross_entropy(learner.model({"image": images}).predictions[0], split.column("digit")).item()
            assert abs(loss - plain) > 1e-4


@pytest.mark.parametrize("options", ["loss=auto_lambda", "loss=moml"])
def test_looking_ahead_leaves_no_trace(build, options):
    """Neither in parameters nor in running statistics."""
    learner, batches = build(options)
    batch = next(iter(batches.epoch(0)))
    before, weights = copy.deepcopy([learner.model.state_dict(), learner.strategy.state_dict()])
    learner.step()._look_ahead(learner.forward(batch, learner._groups.units(batch)), len(batch["image"]), None)
    torch.testing.assert_close(learner.model.state_dict(), before, rtol=0, atol=0)
    norms = [m for m in learner.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.track_running_stats for m in norms)
    after = learner.strategy.state_dict()
    assert not any(torch.equal(after[n], weights[n]) for n in weights if n in ("task_weights", "logits"))


def test_auto_lambda_in_the_engine(build):
    """Against differences of the second half's loss, in λ, after a step with the gradient of the first half's."""
    learner, batches = build("loss=auto_lambda")
    batch = next(iter(batches.epoch(0)))
    learner.model.double(), learner.strategy.double()
    batch["image"] = batch["image"].double()
    halves = [{name: column[part] for name, column in batch.items()} for part in (slice(32), slice(32, 64))]

    def losses(model, half):
        outputs = model(halves[half]).predictions
        return torch.stack([t.loss(y, halves[half][t.name]) for t, y in zip(learner.tasks, outputs, strict=True)])

    def outer(weights):
        model = copy.deepcopy(learner.model)
        (weights @ losses(model, 0)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
            return losses(model, 1).sum()

    start, h = torch.full((3,), 0.1, dtype=torch.float64), 1e-3
    slope = [(outer(start + h * e) - outer(start - h * e)) / (2 * h) for e in torch.eye(3, dtype=torch.float64)]
    learner.optimizer.param_groups[0]["lr"] = 0.01
    learner.step()._look_ahead(learner.forward(batch, learner._groups.units(batch)), len(batch["image"]), None)
    error = (learner.strategy.meta.first / 0.1 - torch.stack(slope)).abs().max()
    assert error < 0.2 * max(map(abs, slope))  # 0.15: the difference is as wide as the authors'


@pytest.mark.parametrize("options", ["optimizer=adatask", "optimizer=mtl_io"])
def test_the_engine_equals_a_plain_loop(build, double, options):
    """An epoch of two steps."""
    learner, batches = build(f"{options} optimizer.eps=1e-2 data.batch_size=32 data.limit_train=64")
    double(learner)
    model, lr = copy.deepcopy(learner.model), 0.01
    params = dict(model.named_parameters())
    others = [torch.optim.Adam(model.parameters(), lr, eps=1e-2) for _ in range(3)]
    rules = {n: [oracle.Adam(eps=1e-2) for _ in range(3)] for n in params}
    for batch in batches.epoch(0):
        outputs = lambda: zip(learner.tasks, model(batch).predictions, strict=True)  # noqa: E731, B023
        losses = lambda: [t.loss(y, batch[t.name]) for t, y in outputs()]  # noqa: E731, B023
        if "mtl_io" in options:
            for k, optimizer in enumerate(others):
                optimizer.zero_grad()
                losses()[k].backward()
                optimizer.step()
            continue
        kept = losses()
        rows = [torch.autograd.grad(x, list(params.values()), retain_graph=True, allow_unused=True) for x in kept]
        with torch.no_grad():
            for i, (n, p) in enumerate(params.items()):
                known = [(rule, row[i]) for rule, row in zip(rules[n], rows, strict=True) if row[i] is not None]
                steps = [rule.direction(g.numpy()) for rule, g in known]
                p -= lr * torch.from_numpy(sum(steps))
    learner.train_epoch(batches, 0)
    torch.testing.assert_close(dict(learner.model.named_parameters()), params, rtol=0, atol=1e-9)
    torch.testing.assert_close(dict(learner.model.named_buffers()), dict(model.named_buffers()), rtol=1e-8, atol=1e-9)


def test_an_absent_task_misses_its_turn(build):
    learner, batches = build(f"optimizer=mtl_io data._target_={__name__}.Sparse")
    batch = next(iter(batches.epoch(0)))
    size = len(batch["image"])
    batch.update({t.name: torch.zeros_like(batch[t.name]) for t in learner.tasks})
    shared, step, labelled = list(learner.model.shared_parameters()), learner.step(), torch.ones(size, 3).bool()
    step(learner.forward(batch, learner._groups.units(batch)), size, labelled)
    before = learner.optimizer.state[shared[0]]["m"].clone()
    batch["odd"][:] = -100
    labelled[:, 1] = False
    step(learner.forward(batch, learner._groups.units(batch)), size, labelled)
    after = learner.optimizer.state[shared[0]]["m"]
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
