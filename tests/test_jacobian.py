"""Methods with a state or several batches, and the switches of `mtl.backward`, against `oracles/jacobian.py`."""

import io
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import jacobian as oracle
from oracles.jacobian import CASES, assert_close
from torch import nn

import mtl
import mtl.losses as methods
from mtl.engine import checkpoint
from mtl.engine.backward import Switches
from mtl.losses import JacobianAggregation
from mtl.losses.signatures import taken
from mtl.losses.solvers import project_on_simplex

SIZES, WIDTH, STEPS = (1, 2, 3, 11, 40), 7, 5
DEGENERATE = ("zero_row", "zeros", "identical", "opposite")
STATES = {"moco": ("trackers", "mixture"), "modo": ("mixture",), "sdmgrad": ("mixture",), "db_mtl": ("average",),
          "excess_mtl": ("squares", "task_weights", "initial")}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
with_state = pytest.mark.parametrize("case", [case for case in CASES if case.split("-")[0] in STATES])


def tensor(array) -> torch.Tensor:
    return torch.as_tensor(np.array(array), dtype=torch.float64)


def uniform(*shape, **_):
    """GradDrop's draw, for strategy and oracle alike."""
    return torch.linspace(0.03, 0.96, int(np.prod(*shape)), dtype=torch.float64).reshape(*shape)


@pytest.fixture(autouse=True)
def draws(monkeypatch):
    rand, ours = torch.rand, lambda k: k.get("generator") and k.get("dtype") == torch.float64
    monkeypatch.setattr(torch, "rand", lambda *size, **k: (uniform if ours(k) else rand)(*size, **k))


def build(case: str, T: int):
    return getattr(methods, CASES[case][0])(T, **CASES[case][1])


def peer(case: str, T: int):
    draw = {"uniform": uniform((WIDTH,)).numpy()} if case.startswith("graddrop") else {}
    return oracle.stepper(case.split("-")[0], T, WIDTH, **draw, **CASES[case][2])


data = partial(oracle.batches, WIDTH, STEPS)


def direction(strategy, J, losses, present=None):
    """(d, weights) of a step as `mtl.backward` puts it together (which `test_samples` checks)."""
    J, losses = [tensor(part) for part in J], tensor(losses)
    if present is not None:
        J, losses = [part * present[:, None] for part in J], losses * present
    if isinstance(strategy, JacobianAggregation):
        result = strategy.aggregate(J[0], **taken(strategy, "aggregate", present=present, losses=losses))
        return result if isinstance(result, tuple) else (result, None)
    facts = taken(strategy, "weights", present=present, losses=losses)
    weights = strategy.weights(J[0] @ J[min(1, len(J) - 1)].T, **facts)
    return (J[-1] if len(J) != 2 else (J[0] + J[1]) / 2).T @ weights, weights


# ------------------------------------------------------------------------------------------------ oracle agreement


@pytest.mark.parametrize("scale", [1, 1e-8, 1e8])
@pytest.mark.parametrize("T", SIZES)
@every_case
def test_directions_follow_the_paper(case, T, scale):
    """Step by step, and so the states too. (γG of MoDo and plain MoCo is bounded: see the test of the projection.)"""
    strategy, step = build(case, T), peer(case, T)
    for J, losses in data(T, strategy.samples, scale=1e3 if scale == 1e8 and "mo" in case[:2] else scale):
        assert_close(direction(strategy, J, losses)[0], step(J, losses))


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("T", [2, 3, 11])
@every_case
def test_degenerate_gradients(case, T, kind):
    """Finite directions, weights and states; those of the oracle where it has an answer."""
    strategy, step = build(case, T), peer(case, T)
    for J, losses in data(T, strategy.samples, kind):
        d, weights = direction(strategy, J, losses)
        assert d.isfinite().all() and (weights is None or weights.isfinite().all())
        if (case, kind) == ("config", "opposite"):  # no direction serves all
            assert d.norm() <= np.linalg.norm(J[0].sum(axis=0)) * (1 + 1e-9)
        elif not (kind in ("zero_row", "zeros") and case.startswith(("ntkmtl", "excess_mtl"))):
            assert_close(d, step(J, losses), 1e-7, scale=max(np.abs(J).max(), 1e-300))
    assert all(b.isfinite().all() for name, b in strategy.named_buffers() if name != "initial")


@pytest.mark.parametrize("T", [2, 3, 11, 40])
@every_case
def test_permuted_tasks(case, T):
    ours, theirs, order = build(case, T), build(case, T), np.random.default_rng(T).permutation(T)
    for J, losses in data(T, ours.samples):
        d, weights = direction(ours, J, losses)
        e, permuted = direction(theirs, [part[order] for part in J], losses[order])
        assert_close(d, e, 1e-7)
        assert weights is None or torch.allclose(weights[order], permuted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("absent", (0, 2))
@every_case
def test_an_absent_task_does_not_exist(case, absent):
    """From the start: the directions are those of the strategy without it, its weight 0."""
    ours, without, present = build(case, 3), build(case, 2), torch.arange(3) != absent
    for J, losses in data(3, ours.samples):
        d, weights = direction(ours, J, losses, present)
        assert_close(d, direction(without, [np.delete(g, absent, 0) for g in J], np.delete(losses, absent))[0])
        assert weights is None or weights[absent] == 0


@with_state
def test_the_state_of_an_absent_task_is_frozen(case):
    """Bit by bit, from the middle of training on."""
    strategy, states = build(case, 3), []
    for k, (J, losses) in enumerate(data(3, strategy.samples)):
        direction(strategy, J, losses, None if k < 3 else torch.tensor([True, False, True]))
        states.append([getattr(strategy, name)[1].clone() for name in STATES[case.split("-")[0]]])
    assert all(torch.equal(old, new) for old, new in zip(states[2], states[-1], strict=True))


def conic(J, c, dtype=torch.float64):
    J = tensor(J).to(dtype)
    return (J.T.double() @ methods.ConicGrad(len(J), c=c).weights(J @ J.T).double()).numpy()


@pytest.mark.parametrize("scale", [1, 1e-8, 1e8])
@pytest.mark.parametrize("T", [1, 2, 3, 6, 11])
def test_conicgrad_solves_its_problem(T, scale):
    """By SLSQP, with the cone active and not; permuted and absent tasks; nearly so in float32."""
    rng, edges = np.random.default_rng(T), 0
    for c in (0.05, 0.25, 0.6, 0.95, 0.99):
        J = scale * rng.normal(size=(T, T + 6)) * 10.0 ** rng.uniform(-1, 1, (T, 1))
        best, d = oracle.conicgrad(J, c), conic(J, c)
        (value, _), (ours, cosine) = oracle.conicgrad_value(J, best, c), oracle.conicgrad_value(J, d, c)
        assert_close(d, best, 1e-5)
        assert ours >= value - 1e-6 * abs(value) and cosine >= c - 1e-9
        assert_close(np.linalg.norm(d), np.linalg.norm(J.mean(axis=0)))
        single, angle = oracle.conicgrad_value(J, conic(J, c, torch.float32), c)
        assert single >= value - 1e-2 * abs(value) and angle >= c - 1e-4
        order, padded = rng.permutation(T), tensor(np.insert(J, 1, 0, axis=0))
        assert_close(conic(J[order], c), d, 1e-8)
        w = methods.ConicGrad(T + 1, c=c).weights(padded @ padded.T, torch.arange(T + 1) != 1)
        assert_close(padded.T @ w, d, 1e-8)
        assert w[1] == 0
        edges += cosine < c + 1e-6
    assert T < 3 or 0 < edges < 5


@pytest.mark.parametrize("kind", DEGENERATE)
def test_conicgrad_of_degenerate_gradients(kind):
    assert all(np.isfinite(conic(J[0], c)).all() for T in (2, 3, 11) for J, _ in data(T, 1, kind) for c in (0.05, 0.6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conicgrad_at_pareto_stationary_points(dtype):
    """Whatever is done there, the step is no longer than the mean gradient."""
    rng = np.random.default_rng(1)
    for T in rng.integers(3, 9, size=200):
        J = rng.normal(size=(T, 50))
        J[-1] = -rng.uniform(0.1, 2, T - 1) @ J[:-1]
        assert np.linalg.norm(conic(J, 0.25, dtype)) <= 1.01 * np.linalg.norm(J.mean(axis=0))


@pytest.mark.parametrize("steps", [0, 1, 3])
@with_state
def test_save_and_load_is_exact(case, steps):
    """Before and after the first use, nested in another module, through a file opened with weights_only."""
    ours, theirs = (nn.ModuleDict({"a": build(case, 3)}) for _ in range(2))
    batches = list(data(3, ours["a"].samples))
    for J, losses in batches[:steps]:
        direction(ours["a"], J, losses)
    torch.save(ours.state_dict(), file := io.BytesIO())
    theirs.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for J, losses in batches[steps:]:
        assert torch.equal(direction(ours["a"], J, losses)[0], direction(theirs["a"], J, losses)[0])
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["MoCo", "DBMTL", "ExcessMTL"])
def test_a_lazy_buffer_follows_the_strategy_to_its_device(name):
    """The meta device stands for a GPU."""
    used, resumed = getattr(methods, name)(2), getattr(methods, name)(2).to("meta")
    used.aggregate(torch.ones(2, 3), **taken(used, "aggregate", losses=torch.ones(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying to meta is a no-op
        resumed.load_state_dict(used.state_dict())
    assert {b.device.type for b in resumed.buffers()} == {"meta"}


@pytest.mark.parametrize("v", [[1e15 + 0.125, 1e15, 0], [1e17, 1e17, 0], [np.nan] * 3])
def test_projection_of_huge_and_undefined_numbers(v):
    """A diverging MoDo, MoCo or SDMGrad should end as such, not by an index of -1 (a device-side assert on a GPU)."""
    found = project_on_simplex(tensor(v)).numpy()
    assert np.isnan(found).all() if np.isnan(v).any() else np.abs(found - oracle.project_simplex(v)).max() < 1e-9


# ------------------------------------------------------------------------------------------------ the step's switches

NET = oracle.TwoHeads()
ANY = ["Static", "DWA", "MGDA", "CAGrad", "ConFIG", "MoDo", "ExcessMTL", "GradDrop"]  # some of each family
GRADS, HEADS, LOSSES = NET.of_shared(), NET.of_heads(), NET.losses()
PARTS = {1: [slice(None)], 2: [slice(0, 3), slice(3, 6)], 3: [slice(0, 3), slice(3, 6), slice(6, 9)]}


def take(strategy, scales=(1.0, 1.0), log=False, change=lambda L: L, present=None, **switches):
    """One step on NET: (shared gradient (12,), the heads' (2, 3), Step). `change` edits the losses."""
    W, heads, batches = nn.Parameter(tensor(NET.W)), [nn.Parameter(tensor(v)) for v in NET.h], []
    for rows in PARTS[strategy.samples]:
        z, y = torch.tanh(tensor(NET.x[rows]) @ W), tensor(NET.y[:, rows])
        losses = [s * (z @ v - t).square().mean() for s, v, t in zip(scales, heads, y, strict=True)]
        batches.append([loss.log() for loss in losses] if log else losses)
    losses = change(batches if strategy.samples > 1 else batches[0])
    step = mtl.backward(losses, strategy, [W], [[v] for v in heads], present, z, Switches(**switches))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (W, *heads)]
    return grads[0].flatten().numpy(), torch.stack(grads[1:]).numpy(), step


def make(name: str, **options):
    return getattr(methods, name)(2, **{**({"weights": [2.0, 3.0]} if name == "Static" else {}), **options})


def seen_by(strategy) -> list:
    """The first arguments that `strategy` is called with from now on."""
    name, calls = "aggregate" if isinstance(strategy, JacobianAggregation) else "weights", []
    call = getattr(strategy, name)
    setattr(strategy, name, lambda first, **rest: calls.append(first.clone()) or call(first, **rest))
    return calls


@pytest.mark.parametrize("absent", [-1, 0])
@pytest.mark.parametrize("name", ["MGDA", "CAGrad", "ConFIG", "GradDrop"])
def test_gradients_of_features(name, absent):
    """What the strategy saw are the features' gradients; what it chose went through the backbone by the chain rule."""
    strategy, on = make(name), np.arange(2) != absent
    calls, dz, present = seen_by(strategy), NET.of_features() * on[:, None, None], torch.tensor(on)
    change = lambda L: [v * float(there) for v, there in zip(L, on, strict=True)]  # noqa: E731
    shared, heads, step = take(strategy, change=change, present=None if on.all() else present, gradients="features")
    flat, factors = dz.reshape(2, -1), on
    if name == "GradDrop":
        assert_close(calls[0], flat)
        d = oracle.graddrop_features(NET.features(), dz, uniform((3,)).numpy())
    else:
        assert_close(calls[0], flat @ flat.T)
        assert_close(step.weights, make(name).weights(tensor(flat @ flat.T), present))
        d, factors = np.tensordot(step.weights, dz, 1), step.weights.numpy() if name == "MGDA" else on
    assert_close(shared, NET.chain(d))
    assert_close(heads, factors[:, None] * HEADS)
    assert_close([step.norm, step.ratio], [np.linalg.norm(shared), np.linalg.norm(d) / np.linalg.norm(dz.sum(axis=0))])


@pytest.mark.parametrize("name", ANY)
def test_log_losses(name):
    """The strategy on log-losses, blind to the losses' scales. Equal weighting gives Σ g_i / L_i."""
    found = take(make(name), transform="log")
    for expected in (take(make(name), log=True), take(make(name), scales=(1e3, 1e-2), transform="log")):
        assert_close(found[0], expected[0]), assert_close(found[1], expected[1])
    assert_close(take(make("Equal"), transform="log")[0], GRADS.T @ (1 / LOSSES))


@pytest.mark.parametrize("name", ANY)
def test_heads_and_scale(name):
    """heads: own or weighted, whatever the shared gradient is. sum: Σw = T. norm: as long as equal weighting's."""
    rows, merges = PARTS[make(name).samples], isinstance(make(name), JacobianAggregation)
    own, jac = (np.mean([of(r) for r in rows], axis=0) for of in (NET.of_heads, NET.of_shared))
    shared, heads, step = take(make(name))
    w = np.ones(2) if step.weights is None else step.weights.numpy()
    assert_close(heads, own * (w[:, None] if name in ("Static", "DWA", "MGDA", "ExcessMTL") else 1))
    for mode, factors in (("own", np.ones(2)), ("weighted", w))[: 1 if merges else 2]:
        same, heads, _ = take(make(name), heads=mode)
        assert_close(same, shared), assert_close(heads, factors[:, None] * own)
    long, _, step = take(make(name), scale="norm")
    assert_close(long, shared * np.linalg.norm(jac.sum(axis=0)) / np.linalg.norm(shared))
    assert_close([step.norm, step.ratio], [np.linalg.norm(long), 1])
    if not merges:
        summed, _, step = take(make(name), scale="sum")
        assert_close(w @ jac, shared), assert_close(summed, shared * 2 / w.sum()), assert_close(step.weights.sum(), 2)
    for here in ([1.0, 0.0], [0.0, 0.0]) if not merges and len(rows) == 1 else ():
        change = lambda L, here=here: [v * there for v, there in zip(L, here, strict=True)]  # noqa: E731
        found = take(make(name), scale="sum", present=torch.tensor(here).bool(), change=change)[0]
        assert_close(found, here @ jac, scale=1)


@pytest.mark.parametrize("name", ["MoDo", "SDMGrad"])
def test_samples(name):
    """The cross Gramian decides; MoDo steps along the mean of two batches, SDMGrad along the third; heads: the mean."""
    strategy, step = make(name), oracle.stepper(name.lower(), 2, 12, **CASES[name.lower()][2])
    calls, rows = seen_by(strategy), PARTS[strategy.samples]
    jac = [NET.of_shared(r) for r in rows]
    for _ in range(3):
        shared, heads, info = take(strategy)
        assert_close(calls[-1], jac[0] @ jac[1].T)
        assert_close(shared, step(jac, None)), assert_close(info.norm, np.linalg.norm(shared))
        assert_close(heads, np.mean([NET.of_heads(r) for r in rows], axis=0))
    for wrong in (lambda L: L[:-1], lambda L: [*L, L[0]], lambda L: [L[0][:1], *L[1:]]):
        with pytest.raises(ValueError, match=r"^.*$"):
            take(make(name), change=wrong)


@pytest.mark.parametrize(("switch", "name"), [
    *[("gradients=features", name) for name in ("Equal", "DWA", "MoDo", "SDMGrad")], ("heads=weighted", "GradDrop"),
    ("scale=sum", "GradDrop"), ("gradients=parameters", "RotoGrad"),
    *[("transform=log", name) for name in ("DBMTL", "FAMO", "ScaleInvariant", "GLS", "UncertaintyOptimal", "STCH")],
    *[("gradients=features", name) for name in ("MoCo", "DBMTL", "ExcessMTL")],
    *[("transform=log", name) for name in ("MoCo", "GO4Align", "GradNorm")],
])  # fmt: skip
def test_impossible_combinations(switch, name):
    """One line that names the switch."""
    with pytest.raises(ValueError, match=f"^{switch}: .*$"):
        Switches(**dict([switch.split("=")])).check(make(name))


def test_hooks_of_nash_and_db_mtl_and_the_clip():
    """Nash: shared norm 1, heads α_i ∇L_i with Gα = 1/α unclipped; NTKMTL: what is shorter than 1 stays; DB-MTL: heads
    ∇L_i / (L_i + 1e-8) (in a float32 buffer)."""
    shared, heads, step = take(make("NashMTL"))
    free, _, unclipped = take(make("NashMTL", max_norm=None))
    alpha = unclipped.weights.numpy()
    assert_close(GRADS @ GRADS.T @ alpha * alpha, [1, 1]), assert_close(np.linalg.norm(free), np.sqrt(2))
    assert_close(shared, free / np.sqrt(2)), assert_close(heads, alpha[:, None] * HEADS)
    assert_close(step.norm, 1), assert_close(step.weights, alpha / np.sqrt(2))
    for scale in (1e-3, 1e3):
        expected = oracle.ntkmtl(GRADS) @ GRADS * scale
        assert_close(take(make("NTKMTL"), scales=(scale,) * 2)[0], expected / max(1, np.linalg.norm(expected)))
    shared, heads, _ = take(make("DBMTL"))
    assert_close(shared, oracle.DbMtlOracle(2, 12).step(GRADS, LOSSES))
    assert_close(heads, HEADS / LOSSES[:, None], 1e-6), assert_close(take(make("DBMTL"), heads="own")[1], HEADS)


@pytest.mark.parametrize("name", ["Equal", "MGDA", "GradDrop", "MoCo", "DBMTL"])
def test_the_constant_loss_of_an_absent_task_is_ignored(name):
    """So says `mtl.backward`: also if it is NaN, as a mean over no label is."""
    change = lambda L: [L[0], torch.tensor(np.nan).double()]  # noqa: E731
    assert np.isfinite(take(make(name), change=change, present=torch.tensor([True, False]))[0]).all()


# ------------------------------------------------------------------------------------------------------- command line

SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=20", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "optimizer.lr=0.01", "trainer.epochs=1", "logger=none")  # fmt: skip


def trained(cli, root: str, options: str):
    """(metrics of the only epoch, model and strategy of the checkpoint) of a run of two batches, 32 and 18."""
    done = cli(*SMALL, f"output_root={root}", *options.split())
    assert done.code == 0, done.err
    (file,) = Path(root).rglob("metrics.jsonl")
    state = checkpoint.load(file.parent / "last.pt")
    return json.loads(file.read_text()), state["model"], state["strategy"]


@pytest.mark.parametrize("options", ["loss=modo", "loss=sdmgrad", "loss=moco", "step.gradients=features loss=mgda",
                                     "step.transform=log loss=cagrad"])  # fmt: skip
def test_training(cli, options):
    row, model, _ = trained(cli, "a", options)
    assert all(np.isfinite(v) for v in row.values()) and row["grad/norm"] > 0
    assert all(v.isfinite().all() for v in model.values())


def test_famos_second_forward_pass_leaves_batch_norm_alone(cli):
    """One step: running statistics to the bit those of equal weighting, and yet the logits have moved."""
    one = "data.batch_size=50 loss="
    (_, famo, state), (_, equal, _) = trained(cli, "a", one + "famo"), trained(cli, "b", one + "equal")
    statistics = [name for name in famo if "running" in name or "num_batches" in name]
    assert statistics and all(torch.equal(famo[name], equal[name]) for name in statistics) and state["logits"].any()


def test_an_impossible_step_is_one_line(cli):
    done = cli(*SMALL, "loss=dwa", "step.gradients=features")
    assert done.code == 2 and done.err.count("\n") == 1 and "step.gradients=features" in done.err, done.err
