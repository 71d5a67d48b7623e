"""The loss weightings against the oracles of `oracles/weighting.py` (numpy, float64), by way of `mtl.backward`."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from oracles import weighting as oracle
from torch import nn

import mtl
from mtl import losses as m
from mtl.config import schema
from mtl.losses import Statistics
from mtl.losses.go4align import group_means
from mtl.random import stream

SIZES, EPOCHS, STEPS = (1, 2, 3, 11, 40), 5, 2
MEANS = ("arithmetic", "geometric")
DISTRIBUTIONS = ("normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli")
# Arguments away from the defaults where an epoch or two of the default would show nothing.
METHODS = {
    "uncertainty_sigma": (m.UncertaintySigma, {}, [{"regulariser": r} for r in ("sum", "product")]),
    "uncertainty_optimal": (m.UncertaintyOptimal, {}, [{"form": f} for f in ("gaussian", "laplace")]),
    "uncertainty_softmax": (m.UncertaintySoftmax, {"temperature": 0.7}, [{}]),
    "scale_invariant": (m.ScaleInvariant, {}, [{}]),
    "gls": (m.GLS, {}, [{}]),
    "imtl_l": (m.IMTLL, {}, [{}]),
    "rlw": (m.RLW, {}, [*({"distribution": d} for d in DISTRIBUTIONS), {"mean": "geometric"}]),
    "dwa": (m.DWA, {}, [{"mean": mean} for mean in MEANS]),
    "dtp": (m.DTP, {"gamma": 0.5, "ema": 0.3}, [{"mean": mean} for mean in MEANS]),
    "amtl": (m.AMTL, {"ema": 0.3}, [{"norm": norm, "mean": mean} for norm in ("softmax", "sum") for mean in MEANS]),
    "famo": (m.FAMO, {}, [{}]),
    "stch": (m.STCH, {"mu": 0.3, "warmup_epochs": 1}, [{}]),
    "go4align": (m.GO4Align, {"step_size": 0.05}, [{"clusters": k} for k in (1, 2, 3)]),
}
CASES = {"-".join([k, *map(str, o.values())]): (k, f | o) for k, (_, f, options) in METHODS.items() for o in options}


def tensor(array) -> torch.Tensor:
    return torch.as_tensor(np.array(array), dtype=torch.float64)


def assert_close(actual, expected, tol: float = 1e-9) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=tol, atol=tol * np.abs(expected).max())


def make(case: str, tasks: int):
    kind, options = CASES[case]
    if kind == "amtl":
        options = {"potentials": np.linspace(60, 90, tasks).tolist()} | options
    if kind == "go4align":
        options = options | {"clusters": min(options["clusters"], tasks)}
    strategy = METHODS[kind][0](tasks, **options).double()
    if kind == "amtl":  # what float32 rounded
        strategy.potentials.copy_(tensor(options["potentials"]))
    return strategy


def step(strategy, losses, present=None):
    """Weights, total and gradients of the method's parameters from one backward pass of a linear model."""
    theta, totals = nn.Parameter(torch.zeros(3, dtype=torch.float64)), []
    slopes = tensor(np.random.default_rng(1).normal(size=(len(losses), 3)))
    there = [True] * len(losses) if present is None else present
    values = [x + a @ theta if p else 0 * x for x, a, p in zip(tensor(losses), slopes, there, strict=True)]
    hook = strategy.register_forward_hook(lambda module, args, out: totals.append(out.detach().numpy()))
    strategy.zero_grad()
    info = mtl.backward(values, strategy, shared=[theta], present=present)
    hook.remove()
    assert_close(theta.grad, slopes.T @ info.weights, tol=1e-12)
    return info.weights.numpy(), totals[0], [p.grad.numpy() for p in strategy.parameters()]


class Peer:
    """The oracle of a case, with its state."""

    def __init__(self, case: str, strategy):
        (self.kind, self.options), self.strategy, self.losses, self.scores = CASES[case], strategy, [], []
        self.famo = oracle.FamoOracle(strategy.tasks)
        self.go4align = oracle.Go4AlignOracle(strategy.tasks, step_size=0.05)

    def step(self, losses, weights):
        """The oracle's `Out`; `weights` are the strategy's, from which a draw is read back where it draws a mask."""
        own = [p.detach().numpy() for p in self.strategy.parameters()]
        if self.kind in ("uncertainty_sigma", "uncertainty_softmax"):
            return getattr(oracle, self.kind)(losses, *own, **self.options)
        if self.kind == "uncertainty_optimal":  # of which the strategy's total is an integral
            return oracle.uncertainty_optimal(losses, self.options["form"] == "gaussian")._replace(value=None)
        if self.kind == "amtl":
            scores = oracle.accuracy_average(self.scores, 0.3) if self.scores else None
            options = {k: v for k, v in self.options.items() if k != "ema"}
            return oracle.amtl(losses, scores, self.strategy.potentials.numpy(), **options)
        if self.kind == "famo":
            return oracle.Out(self.famo.step(losses), value=self.famo.value)
        if self.kind == "stch" and len(self.losses) < 2:
            return oracle.scale_invariant(losses)._replace(value=None)
        if self.kind == "stch":
            return oracle.stch(losses, self.losses[1], mu=0.3)
        if self.kind == "go4align":
            groups = oracle.best_groups(self.go4align.indicate(losses), self.strategy.clusters)
            means = np.array([self.go4align.indicators[groups == g].mean() for g in groups])
            return oracle.Out(means, value=means @ losses)
        if self.kind not in ("rlw", "dwa", "dtp"):
            return getattr(oracle, self.kind)(losses, *own)
        if self.kind == "rlw":
            out = oracle.rlw(losses, self.draw(weights), self.options.get("distribution", "normal"), uniform="softmax")
        elif self.kind == "dwa":
            out = oracle.dwa(losses, self.losses)
        else:
            out = oracle.dtp(losses, np.array(self.scores) / 100, gamma=0.5, ema=0.3, floor=1e-12)
        geometric = self.options.get("mean") == "geometric"
        return oracle.geometric(losses, out.weights / out.weights.sum()) if geometric else out

    def draw(self, weights):
        """What RLW drew: the same stream, or the weights themselves, whose frequencies have a test of their own."""
        name = self.options.get("distribution", "normal")
        draw = torch.rand if name == "uniform" else torch.randn
        z = draw(len(weights), generator=self.random, dtype=torch.float64).numpy()
        return {"dirichlet": weights, "normal": z, "uniform": z}.get(name, (weights > 0).astype(float))


def history(tasks: int):
    """What a run sees in each epoch: its number, [(losses, losses after the step)], mean losses, scores."""
    rng = np.random.default_rng([0, tasks])
    for epoch in range(EPOCHS):
        steps = [(10 ** rng.uniform(-2, 2, tasks), 10 ** rng.uniform(-2, 2, tasks)) for _ in range(STEPS)]
        yield epoch, steps, 10 ** rng.uniform(-1, 1, tasks), rng.uniform(epoch, 100, tasks)


def play(strategy, tasks: int, epochs=range(EPOCHS), absent: int | None = None, without: int | None = None):
    """Every step's weights and gradients; one task may be absent throughout, or left out."""
    out, keep = [], [i for i in range(tasks) if i != without]
    present = None if absent is None else torch.arange(tasks) != absent
    there, known = (1, 0) if absent is None else (present.numpy(), np.where(present, 0, np.nan))
    for epoch, steps, means, scores in history(tasks):
        if epoch in epochs:
            strategy.epoch_start(epoch, EPOCHS, seed=epoch)
            for losses, again in steps:
                weights, _, gradients = step(strategy, (losses * there)[keep], present)
                out.append([weights, *gradients])
                strategy.after_step(tensor(again * there)[keep], present)
            strategy.epoch_end(Statistics(tensor(means + known)[keep], tensor(scores + known)[keep]))
    return np.array(out)


@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_oracle(case, tasks):
    """Weights, value and gradients of the learned parameters in every step of a run."""
    peer, rng = Peer(case, make(case, tasks)), np.random.default_rng(3)
    for epoch, steps, means, scores in history(tasks):
        peer.strategy.epoch_start(epoch, EPOCHS, seed=epoch)
        peer.random = stream(epoch, "method", epoch)
        for losses, again in steps:
            for p in peer.strategy.parameters():
                p.data.copy_(tensor(rng.uniform(0.3, 2, tasks)))
            weights, total, gradients = step(peer.strategy, losses)
            expected = peer.step(losses, weights)
            assert_close(weights, expected.weights)
            if expected.value is not None:
                assert_close(total, expected.value)
            for gradient in gradients:
                assert_close(gradient, expected.grad)
            peer.strategy.after_step(tensor(again))
            if case == "famo":
                peer.famo.after(again)
        peer.losses.append(means)
        peer.scores.append(scores)
        peer.strategy.epoch_end(Statistics(tensor(means), tensor(scores), torch.ones(tasks, dtype=torch.bool)))


@pytest.mark.parametrize("case", [c for c in CASES if "rlw" not in c])
def test_an_absent_task_is_as_if_it_did_not_exist(case):
    """The same weights and gradients for the others as without it (DWA, whose weights are in sum T: in proportion),
    0 for itself, its own state untouched. In one step it returns, and nothing is NaN."""
    tasks, absent, left = 4, 2, torch.tensor([0, 1, 3])
    with_it, without = make(case, tasks), make(case, tasks - 1)
    for p in with_it.parameters():
        p.data.copy_(tensor([0.5, 1.3, 0.8, 1.1]))
    start = {k: v.clone() for k, v in with_it.memory().items()}
    without.load_state_dict({k: v[left] if v.ndim else v for k, v in start.items()})
    actual, expected = play(with_it, tasks, absent=absent), play(without, tasks, without=absent)
    assert (actual[..., absent] == 0).all()
    actual = np.delete(actual, absent, axis=-1)
    if case == "dwa-arithmetic":
        actual, expected = (x / x.sum(axis=-1, keepdims=True) for x in (actual, expected))
    assert_close(actual, expected)
    for name, value in with_it.memory().items():
        if value.ndim and not case.startswith("dwa"):
            torch.testing.assert_close(value[absent], start[name][absent], rtol=0, atol=0, equal_nan=True)
    assert np.isfinite(play(with_it, tasks, epochs=[0])).all()


def test_rlw_draws_for_the_present_tasks():
    for case in (c for c in CASES if "rlw" in c):
        weights = play(make(case, 4), 4, absent=2)[:, 0]
        assert (weights[:, 2] == 0).all() and (weights.max(1) > 0).all() and np.isfinite(weights).all()
        assert_close(weights.sum(1) if "geometric" not in case else 1, 1)
    first = torch.randn(4, generator=stream(0, "method", 0), dtype=torch.float64).numpy()
    assert_close(play(make("rlw-normal", 4), 4, absent=2)[0, 0, [0, 1, 3]], oracle.softmax(first[[0, 1, 3]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_extreme_losses_stay_finite(case, dtype):
    """A loss of 0 among others, all 0, tiny, huge, T = 40, and nobody present (gradient 0)."""
    for tasks in (1, 3, 40):
        strategy = make(case, tasks).to(dtype)
        strategy.epoch_start(0, 1)
        some = torch.arange(tasks) != tasks // 2
        for values, present in ((1.0 * some, None), (0.0 * some, None), (1e-30 + 0 * some, None), (1e8 * some, some),
                                (1e8 + 0 * some, None), (0.0 * some, some & False)):  # fmt: skip
            losses = values.to(dtype).requires_grad_()
            total = strategy(losses, present)
            gradients = torch.autograd.grad(total, [losses, *strategy.parameters()])
            assert total.isfinite() and all(g.isfinite().all() for g in gradients), (values, present)
            assert present is None or all((g[~present] == 0).all() for g in gradients)
            strategy.after_step(losses, present)
            assert all(b.isfinite().all() for n, b in strategy.named_buffers() if n in ("logits", "log_p"))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_everything(case):
    """Two epochs, save, load into a new strategy: the rest is bit for bit that of an undisturbed run."""
    straight, stopped, resumed = (make(case, 3) for _ in range(3))
    expected, first = play(straight, 3), play(stopped, 3, epochs=range(2))
    torch.save(stopped.state_dict(), file := io.BytesIO())
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert np.array_equal(np.concatenate([first, play(resumed, 3, epochs=range(2, EPOCHS))]), expected)


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_for_the_device(case, monkeypatch):
    """Tensors without data cannot be read: whatever a step asks of the host raises here."""
    strategy = make(case, 3).to("meta")
    monkeypatch.setattr(strategy, "generator", lambda device: None)
    losses, present = torch.ones(3, device="meta", requires_grad=True), torch.ones(3, device="meta", dtype=torch.bool)
    for mask in (None, present):
        assert strategy(losses, mask).shape == ()
        strategy.after_step(losses, mask)


def test_identities():
    losses = np.array([0.2, 3.0, 1.5])
    weights = lambda strategy: step(strategy.double(), losses)[0]  # noqa: E731
    imtl, uw = m.IMTLL(3).double(), m.Uncertainty(3, form="regression").double()
    imtl.log_scales.data = tensor([0.3, -1.0, 0.7])
    uw.log_variances.data = -imtl.log_scales.data
    for a, b, sign in zip(step(imtl, losses), step(uw, losses), (1, 1, -1), strict=True):
        assert_close(a, 2 * sign * np.array(b))
    sigma, uw = m.UncertaintySigma(3).double(), m.Uncertainty(3).double()
    sigma.sigmas.data = tensor([0.5, 1.0, -2.0])  # the sign does not matter
    uw.log_variances.data = sigma.sigmas.data.square().log()
    for a, b in zip(step(sigma, losses)[:2], step(uw, losses)[:2], strict=True):
        assert_close(a, b, tol=1e-6)
    si, gls = weights(m.ScaleInvariant(3)), weights(m.GLS(3))
    assert_close(gls, np.prod(losses) ** (1 / 3) / 3 * si)
    assert_close(weights(m.UncertaintyOptimal(3)), si / 2)
    assert_close(weights(m.STCH(3)), si)
    assert_close(weights(m.FAMO(3)), si / si.sum(), tol=1e-6)
    for same in (m.AMTL(3, [50.0, 60, 70]), m.DWA(3, mean="geometric"), m.DTP(3, mean="geometric")):
        assert_close(weights(same), gls)
    assert_close(weights(m.GO4Align(3, clusters=1)), [weights(m.GO4Align(3, clusters=3)).mean()] * 3, tol=1e-6)
    go4align = m.GO4Align(3).double()
    assert_close(step(go4align, [0.0, 2, 2])[0], [0, 1, 1])  # a loss of 0 takes no part
    for _ in range(3):
        step(go4align, losses)
    assert abs(go4align.log_p.sum()) < 1e-12 < abs(go4align.log_p).sum()


def test_rlw_distributions():
    """Frequencies of 6000 draws of 3 tasks: all masks but the empty one equally often; means 1/T."""
    draws = {}
    for name in DISTRIBUTIONS:
        strategy, losses = m.RLW(3, distribution=name).double(), torch.ones(3, dtype=torch.float64)
        draws[name] = torch.stack([strategy._draw(losses, None) for _ in range(6000)]).numpy()
        assert_close(draws[name].mean(0), np.full(3, 1 / 3), tol=0.05)
    for name, masks in (("bernoulli", 7), ("constrained_bernoulli", 3)):
        counts = Counter(map(tuple, draws[name] > 0))
        assert len(counts) == masks and all(abs(n - 6000 / masks) < 150 for n in counts.values())
    assert draws["dirichlet"].var(0) == pytest.approx([1 / 18] * 3, rel=0.1)


def test_group_means_is_exact():
    """Against every partition; ties, and values that take no part."""
    rng = np.random.default_rng(0)
    for size in range(1, 8):
        for values in (10 ** rng.uniform(-3, 3, size), rng.integers(0, 3, size) / 2):
            active = rng.random(size) < 0.8
            active[0] = True
            for clusters in range(1, size + 1):
                means, x = group_means(tensor(values), torch.tensor(active), clusters).numpy(), values[active]
                groups = oracle.best_groups(x, min(clusters, len(x)))
                expected = np.array([x[groups == g].mean() for g in groups])
                assert (means[~active] == 0).all()
                assert ((means[active] - x) ** 2).sum() == pytest.approx(((expected - x) ** 2).sum(), abs=1e-12)


def test_scores():
    """AMTL inverts errors, stops at its potential and keeps what a NaN does not tell; DTP refuses errors."""
    strategy = m.AMTL(("a", "b", "c"), {"b": 0.1, "a": 80, "c": 50}, norm="sum", mean="arithmetic", ema=1.0, margin=0.0)
    tell = lambda *scores: strategy.epoch_end(Statistics(torch.ones(3), torch.tensor(scores), up))  # noqa: E731
    up = torch.tensor([True, False, True])
    tell(40.0, 0.2, float("nan"))
    assert_close(step(strategy.double(), [1.0, 1, 1])[0], [1 / 6, 1 / 6, 2 / 3], tol=1e-6)
    tell(90.0, float("nan"), 60.0)
    assert_close(step(strategy, [1.0, 1, 1])[0], [0, 1, 0], tol=1e-6)
    tell(90.0, 0.05, 60.0)
    assert_close(step(strategy, [1.0, 1, 1])[0], [1 / 3] * 3)
    (dtp := m.DTP(2)).epoch_end(Statistics(torch.ones(2), torch.tensor([0.0, 100.0])))
    assert_close(step(dtp.double(), [1.0, 1])[0], [-np.log(1e-12), 0], tol=1e-6)
    with pytest.raises(ValueError, match="'b' has a score that is better when lower"):
        m.DTP(("a", "b", "c")).epoch_end(Statistics(torch.ones(3), torch.ones(3), up))
    for silent in (strategy, m.DTP(3)):
        with pytest.raises(ValueError, match="Statistics holds none"):
            silent.epoch_end(Statistics(torch.ones(3)))


@pytest.mark.parametrize("method, arguments", [
    ("GO4Align", {"clusters": 4}), ("GO4Align", {"clusters": 0}), ("STCH", {"mu": 0}), ("DTP", {"mean": "max"}),
    ("AMTL", {"potentials": [1.0]}), ("AMTL", {"potentials": [1, 0, 1]}), ("AMTL", {"potentials": {"0": 1}}),
    ("AMTL", {"potentials": [1] * 3, "norm": "max"}), ("RLW", {"distribution": "cauchy"}), ("DWA", {"mean": "max"}),
    ("UncertaintyOptimal", {"form": "cauchy"}), ("UncertaintySigma", {"regulariser": "none"}),
    ("UncertaintySoftmax", {"temperature": 0}),
])  # fmt: skip
def test_wrong_arguments_are_refused(method, arguments):
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        getattr(m, method)(3, **arguments)


@pytest.mark.parametrize("name", METHODS)
def test_yaml(name):
    """It composes, passes the schema, spells every argument out with its default, and names in line one what it is."""
    needed = ["loss.potentials={fine: 68.8, coarse: 78.9}"] if name == "amtl" else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = OmegaConf.to_container(compose("config", [f"loss={name}", *needed]).loss)
    schema.check(node, "loss", supplied=["tasks"])
    strategy = schema.build(node, "loss", tasks=("fine", "coarse"))
    default = {k: p.default for k, p in schema.inspect.signature(type(strategy)).parameters.items() if k != "tasks"}
    given = {k: v for k, v in node.items() if k != "_target_"}
    assert given.keys() == default.keys() and (name == "amtl" or given == default)
    text = (ROOT / "conf" / "loss" / f"{name}.yaml").read_text()
    assert text.startswith("# ") and text.splitlines()[1].startswith("_target_:")


class Wrong(m.LossWeighting):
    """A method whose total is what `returned` makes of the losses."""

    returned = staticmethod(lambda losses: losses)

    def forward(self, losses, present=None):
        return self.returned(losses)


@pytest.mark.parametrize(("returned", "message"), [
    (lambda losses: losses, r"Wrong.forward returned a tensor of shape \(2,\); one differentiable number is needed"),
    (lambda losses: 1.0, r"Wrong.forward returned a float; one differentiable number is needed"),
    (lambda losses: losses.detach().sum(), r"Wrong: the total does not depend on the losses"),
    (lambda losses: torch.tensor(1.0), r"Wrong: the total does not depend on the losses"),
])  # fmt: skip
def test_a_total_of_the_wrong_kind_is_named(returned, message):
    net, strategy = nn.Linear(3, 2), Wrong(tasks=2)
    strategy.returned = returned
    with pytest.raises(ValueError, match=message):
        mtl.backward(net(torch.ones(4, 3)).square().mean(0), strategy, shared=net)
