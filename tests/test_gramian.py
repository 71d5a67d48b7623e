"""The Gramian weightings against `oracles/gramian.py` (explicit gradients, float64) and what papers claim.

A further method is one line of `METHODS`, and one of `PEERS` in test_peers.py where TorchJD has it. Errors are
measured against Σ |w_i| ‖g_i‖, the length that a direction would have if nothing cancelled out.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import gramian as oracle
from oracles.weighting import geometric

import mtl
from mtl import losses as m
from mtl.losses import Statistics
from mtl.losses.hooks import defines
from mtl.losses.pcgrad import random_orders
from mtl.losses.signatures import taken
from mtl.random import stream

SIZES, SEED = (1, 2, 3, 11, 40), 5
KINDS = ("random", "rank_deficient", "stationary", "duplicated", "nearly_aligned", "opposite", "zero_row", "spread")
HOPELESS = ("stationary", "opposite")  # 0 lies in the gradients' hull


def make_jacobian(kind: str, T: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([KINDS.index(kind), T, seed])
    J, common = rng.normal(size=(T, T + 6)), rng.normal(size=T + 6)
    if kind == "rank_deficient":
        return (J + 2 * common)[:, : max(1, T // 2)]
    if kind == "stationary" and T > 1:
        J = J[:, : max(1, T // 4)]
        J[0] = -rng.uniform(0.5, 2, size=T - 1) @ J[1:]
    if kind == "duplicated":
        J = (J + 0.3 * common)[np.arange(T) // 2]
    if kind == "nearly_aligned":
        J = common + 1e-4 * J
    if kind == "opposite" and T > 1:
        J[-1] = -2 * J[0]
    if kind == "zero_row" and T > 1:
        J[T // 2] = 0
    return J * 10 ** rng.uniform(-3, 3, size=(T, 1)) if kind == "spread" else J


def uniform(T: int, low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(T).uniform(low, high, size=(T, *shape))


def tensor(array, dtype=torch.float64) -> torch.Tensor:
    return torch.as_tensor(np.array(array), dtype=dtype)


def norms(J) -> np.ndarray:
    return np.linalg.norm(J, axis=1)


def assert_close(actual, expected, tol: float = 1e-9) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * np.abs(expected).max())


def assert_same_direction(J, w, expected, tol: float = 1e-8) -> None:
    size = np.abs(expected) @ norms(J) + 1e-6 * np.abs(expected).max() * norms(J).max()
    assert np.linalg.norm(J.T @ (w - expected)) <= tol * size


def call(strategy, J, present=None, losses=None, dtype=torch.float64) -> np.ndarray:
    """Weights, from a Gramian in the gradients' own precision as in the engine."""
    J, losses = tensor(J, dtype), uniform(len(J), 0.2, 3) if losses is None else losses
    present = None if present is None else torch.as_tensor(present)
    facts = taken(strategy, "weights", present=present, losses=tensor(losses, dtype))
    w = strategy.weights(J @ J.T, **facts)
    return w.detach().double().numpy()


def weigh(strategy, J, **options) -> np.ndarray:
    """`call` as the first step of an epoch."""
    strategy.epoch_start(0, 1, SEED)
    return call(strategy, J, **options)


def with_state(strategy, **state):
    strategy.load_state_dict({name: tensor(value) for name, value in state.items()}, strict=False)
    return strategy


def select(state: dict, keep) -> dict:
    return {name: value[keep][:, keep] if value.ndim == 2 else value[keep] for name, value in state.items()}


def view(strategy, keep=None, hopeless: bool = False) -> SimpleNamespace:
    """What an oracle may know of the tasks `keep`: their losses, the order in which they meet, the method's state."""
    keep = np.arange(strategy.tasks) if keep is None else np.asarray(keep)
    draws = random_orders(strategy.tasks, stream(SEED, "method", 0)).tolist()
    orders = [[int(np.flatnonzero(keep == j)[0]) for j in draws[i] if j in keep] for i in keep]
    state = {name: value.numpy().copy() for name, value in select(strategy.memory(), keep).items()}
    losses = uniform(strategy.tasks, 0.2, 3)[keep]
    return SimpleNamespace(losses=losses, orders=orders, hopeless=hopeless, **state)


def expand(*lists, broken: Callable = lambda *row: None) -> list:
    """All combinations; `broken(*row)` is the reason of an expected failure, or None."""
    marks = lambda why: [pytest.mark.xfail(strict=True, reason=why)] if why else []  # noqa: E731
    return [pytest.param(*row, marks=marks(broken(*row))) for row in product(*lists)]


# ------------------------------------------------------------------------------- what makes weights right, by itself


def is_shortest(J, s, w) -> None:
    d = J.T @ w
    assert (w >= 0).all() and abs(w.sum() - 1) < 1e-9
    assert d @ d - (J @ d).min() <= 1e-8 * (w @ norms(J)) ** 2 + 1e-20 * norms(J).max() ** 2


def is_fair(J, s, w, alpha: float, targets=1.0) -> None:
    """w > 0 and w_i g_i·d = v^(1/α) w_i^(1−1/α), up to rounding of ‖d‖²; where there is no such w, d vanishes."""
    d = J.T @ w
    assert (w > 0).all()
    if s.hopeless:
        assert np.linalg.norm(d) < 1e-3 * (w @ norms(J))
    else:
        errors = np.abs(w * (J @ d) - targets ** (1 / alpha) * w ** (1 - 1 / alpha))
        assert errors[norms(J) > 0].max() < 1e-9 * (d @ d)


def is_best_in_ball(J, s, w, c: float, rescale: float) -> None:
    """‖d − g₀‖ <= c‖g₀‖, and min g_i·d attains the dual bound λ·Jg₀ + c‖g₀‖‖Jᵀλ‖ of a λ on the simplex."""
    g0, d, u = J.mean(axis=0), J.T @ w * rescale, np.maximum(w * rescale - 1 / len(J), 0)
    radius, size = c * np.linalg.norm(g0), np.abs(w) @ norms(J) * rescale
    assert np.linalg.norm(d - g0) <= radius + 1e-9 * size
    bounds = [lam @ J @ g0 + radius * np.linalg.norm(J.T @ lam) for lam in (u / u.sum(), norms(J) == 0) if lam.any()]
    assert min(bounds) - (J @ d).min() <= 1e-9 * size**2


def is_impartial(J, s, w, factors=1.0) -> None:
    """Σ α = 1, α ∝ (UUᵀ)⁺1 / ‖g‖, by a pseudo-inverse of the unit gradients U themselves; α = 0 where g = 0."""
    factors, live, alpha = np.broadcast_to(factors, len(J)), norms(J) > 0, np.zeros(len(J))
    inverse = np.linalg.pinv(J[live] / norms(J[live])[:, None], rcond=1e-7)
    alpha[live] = inverse.T @ inverse.sum(axis=1) / norms(J[live]) / factors[live]
    assert_same_direction(J, w, alpha / alpha.sum() * factors, 1e-3)


@dataclass(frozen=True)
class Method:
    """One line of the table.

    make: T -> a strategy, in a state of its own if it has one.
    oracle: (J, s of `view`) -> weights; raises OracleError where there is no (unique) answer.
    degree: w(cJ) = w(J) / c^degree.
    cone: J d >= 0 is claimed.
    check: (J, s, w) asserts what makes w right, with or without an oracle.
    divide: (J, s) -> (T,) by what gradients are divided before w is sought.
    random: tasks meet in a random order.
    loose: tolerance on ill-conditioned gradients.
    heads: what the heads receive.
    """

    make: Callable
    oracle: Callable
    degree: float = 0.0
    cone: bool = False
    check: Callable | None = None
    divide: Callable | None = None
    random: bool = False
    loose: float = 1e-8
    heads: str = "own"

    def divided(self, J, s) -> np.ndarray:
        return J if self.divide is None else J / self.divide(J, s)[:, None]


def mgda(divide=None, **options) -> Method:
    make = partial(m.MGDA, **options)
    return Method(make, lambda J, s: oracle.mgda(J), 0, divide is None, is_shortest, divide, heads="weighted")


def cagrad(c: float, rescale: bool = False) -> Method:
    make, by = partial(m.CAGrad, c=c, rescale=rescale), 1 + c**2 if rescale else 1
    check = partial(is_best_in_ball, c=c, rescale=by)
    return Method(make, lambda J, s: oracle.cagrad(J, c) / by, cone=c >= 1, check=check)


def fairgrad(alpha: float) -> Method:
    degree, check = 2 * alpha / (1 + alpha), partial(is_fair, alpha=alpha)
    return Method(partial(m.FairGrad, alpha=alpha), lambda J, s: oracle.fairgrad(J, alpha), degree, True, check)


def aligned(scale: str) -> Method:
    return Method(partial(m.AlignedMTL, scale=scale), lambda J, s: oracle.aligned_mtl(J, scale), loose=1e-3)


def lengths(J, s) -> np.ndarray:
    return np.where(norms(J) > 0, norms(J), 1)


def gradvac(T: int):
    return with_state(m.GradVac(T), goal=uniform(T, -0.5, 0.8, T))


def imtl(T: int):
    return with_state(m.IMTL(T).double(), scales=uniform(T, -1, 1))


def imtl_oracle(J, s) -> np.ndarray:
    return oracle.imtl_g(J * np.exp(s.scales)[:, None]) * np.exp(s.scales)


def pivrg(T: int):
    return with_state(m.PIVRG(T, [1.0] * T), targets=uniform(T, 0.5, 2))


def gradnorm(T: int, **options):
    return with_state(m.GradNorm(T, **options), task_weights=uniform(T, 0.5, 1.5), initial=uniform(T, 0.2, 3)[::-1])


nash = Method(m.NashMTL, lambda J, s: oracle.nash_mtl(J), 1, True, partial(is_fair, alpha=1.0), heads="weighted")
METHODS = {
    "mgda": mgda(),
    "mgda-l2": mgda(lengths, normalization="l2"),
    "mgda-loss": mgda(lambda J, s: s.losses, normalization="loss"),
    "mgda-loss+": mgda(lambda J, s: s.losses * lengths(J, s), normalization="loss+"),
    "pcgrad": Method(m.PCGrad, lambda J, s: oracle.pcgrad(J, s.orders), random=True),
    "gradvac": Method(gradvac, lambda J, s: oracle.gradvac(J, s.orders, s.goal, 0.01)[0], random=True),
    "cagrad-0.4": cagrad(0.4),
    "cagrad-1": cagrad(1.0),
    "cagrad-3-rescaled": cagrad(3.0, rescale=True),
    "imtl_g": Method(m.IMTLG, lambda J, s: oracle.imtl_g(J), check=is_impartial, loose=1e-3),
    "imtl": Method(imtl, imtl_oracle, 0, False, lambda J, s, w: is_impartial(J, s, w, np.exp(s.scales)), loose=1e-3),
    "nash_mtl": nash,
    "fairgrad-0.5": fairgrad(0.5),
    "fairgrad-2": fairgrad(2.0),
    "fairgrad-5": fairgrad(5.0),
    "pivrg": Method(
        pivrg, lambda J, s: oracle.pivrg(J, s.targets), 4 / 3, True, lambda J, s, w: is_fair(J, s, w, 2, s.targets)
    ),
    "aligned-min": aligned("min"),
    "aligned-median": aligned("median"),
    "aligned-rmse": aligned("rmse"),
    "upgrad": Method(m.UPGrad, lambda J, s: oracle.upgrad(J), cone=True),
    "dualproj": Method(m.DualProj, lambda J, s: oracle.dualproj(J), cone=True),
    "gradnorm": Method(gradnorm, lambda J, s: s.task_weights, heads="weighted"),
    "gradnorm-geometric": Method(
        partial(gradnorm, mean="geometric"),
        lambda J, s: geometric(s.losses, s.task_weights / s.task_weights.sum()).weights,
        heads="weighted",
    ),
}
STATEFUL = ("gradvac", "imtl", "pivrg", "gradnorm", "gradnorm-geometric")
DECOUPLED = ("imtl_g", "imtl", "nash_mtl", "fairgrad-2", "fairgrad-5", "pivrg")  # a zero gradient is no task to them


# ------------------------------------------------------------------------------------------------------------ oracles


def disagrees(name, kind, T) -> str | None:
    if name in ("imtl_g", "imtl") and T > 1 and (kind == "opposite" or (kind, T) == ("stationary", 2)):
        return "opposite gradients: the paper's closed form exists and gives d = 0, the pseudo-inverse does not"
    return None


def enumerated(name, T) -> bool:
    return T == 11 and (name.startswith("mgda-") or name in ("cagrad-1", "cagrad-3-rescaled"))  # 2^11 supports


CASES = [
    case for case in expand(METHODS, KINDS, SIZES, broken=disagrees) if not enumerated(case.values[0], case.values[2])
]


@pytest.mark.parametrize(("name", "kind", "T"), CASES)
def test_weights_are_those_of_the_oracle_at_every_scale(name, kind, T):
    """Directions everywhere, weights where they are unique, at 1, 1e-8 and 1e8. Without a solution: see `check`."""
    method, J, strategy = METHODS[name], make_jacobian(kind, T), METHODS[name].make(T)
    tol = method.loose if kind in ("nearly_aligned", "spread", "zero_row") else 1e-8
    s, live = view(strategy, hopeless=kind in HOPELESS and T > 1), np.flatnonzero(norms(J))
    A, expected, alive = method.divided(J, s), None, None
    try:
        expected = method.oracle(A, s)
    except oracle.OracleError:
        assert method.check is not None and (kind not in ("random", "spread") or "fair" in name)
    if len(live) < T and name in DECOUPLED:
        alive = method.oracle(J[live], view(strategy, live))
    for scale in (1, 1e-8, 1e8):
        w = weigh(method.make(T), scale * J) * scale**method.degree
        assert np.isfinite(w).all()
        if method.check is not None:
            method.check(A, s, w)
        if expected is not None:
            assert_same_direction(A, w, expected, tol)
            assert kind not in ("random", "spread") or np.abs(w - expected).max() <= tol * np.abs(expected).max()
        if alive is not None:
            assert_same_direction(J[live], w[live], alive, tol)


# --------------------------------------------------------------------------------------- golden vectors, closed forms

GOLDEN = [  # on J = [[-4, 1, 1], [6, 1, 1]]: direction, weights; from TorchJD's tests and the papers' equations
    (m.MGDA(2), [0, 1, 1], [0.6, 0.4]),
    (m.PCGrad(2), [0.58480, 3.80117, 3.80117], [2.2222, 1.5789]),
    (m.IMTLG(2), [0.0767, 1, 1], [0.59233, 0.40767]),
    (m.CAGrad(2, c=0.5), [0.1835, 1.20412, 1.20412], [0.7041, 0.5]),
    (m.CAGrad(2), [0.3468, 1.1633, 1.1633], None),
    (m.NashMTL(2), [0.07658, 0.99853, 0.99853], [0.59146, 0.40707]),
    (m.FairGrad(2), [0.03127, 0.79082, 0.79082], [0.47136, 0.31945]),
    (m.AlignedMTL(2), [0.42656, 1.93466, 1.93466], [1.1182, 0.8166]),  # twice the published: preferences 1, not 1/T
    (m.UPGrad(2), [0.29240, 1.90058, 1.90058], None),
    (m.DualProj(2), [0.55556, 1.11111, 1.11111], None),
    (m.ConFIG(2), [0.15881, 2.07061, 2.07061], None),
    (m.GradNorm(2), [2, 2, 2], [1, 1]),
]


@pytest.mark.parametrize(("strategy", "direction", "weights"), GOLDEN, ids=lambda x: type(x).__name__)
def test_golden_vectors(strategy, direction, weights):
    J = np.array([[-4.0, 1, 1], [6, 1, 1]])
    w = weigh(strategy, J)
    np.testing.assert_allclose(J.T @ w, direction, rtol=0, atol=1e-4)
    assert weights is None or np.abs(w - weights).max() < 1e-4


def test_golden_vector_of_nash_mtl_clipped_to_norm_1():
    """In a step, where `max_norm` acts; two losses whose gradients at 0 are the rows of J."""
    theta = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    losses = [1 + row @ theta for row in tensor([[-4.0, 1, 1], [6, 1, 1]])]
    info = mtl.backward(losses, m.NashMTL(2), shared=[theta], heads=[[], []])
    np.testing.assert_allclose(theta.grad, [0.0542, 0.7061, 0.7061], rtol=0, atol=1e-4)
    assert float(info.norm) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_closed_forms_of_two_tasks(seed):
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(2, 2)) * 10 ** rng.uniform(-1.5, 1.5, size=(2, 1))
    a, b, dot = *norms(J), J[0] @ J[1]
    share = np.clip((b * b - dot) / (a * a + b * b - 2 * dot), 0, 1)
    assert_close(weigh(m.MGDA(2), J), [share, 1 - share])
    projected = 1 + np.maximum(0, -dot) / np.array([a * a, b * b])
    assert_close(weigh(m.PCGrad(2), J), projected)
    assert_close(weigh(m.UPGrad(2), J), projected / 2)
    bisector = 1 / (np.array([a, b]) * np.sqrt(1 + dot / (a * b)))
    assert_close(weigh(m.NashMTL(2), J), bisector)
    assert_close(weigh(m.IMTLG(2), J), bisector / bisector.sum())
    # CAGrad's dual g_w·g₀ + c‖g₀‖‖g_w‖ on a grid.
    grid, g0 = np.linspace(0, 1, 10_001)[:, None] * [1, -1] + [0, 1], J.mean(axis=0)
    w = grid[(grid @ J @ g0 + 0.4 * np.linalg.norm(g0) * norms(grid @ J)).argmin()]
    w = 0.5 + 0.4 * np.linalg.norm(g0) / np.linalg.norm(w @ J) * w
    assert_same_direction(J, weigh(m.CAGrad(2), J), w, 1e-3)


@pytest.mark.parametrize("T", SIZES)
def test_identities(T):
    """Nash-MTL is FairGrad(1) with ‖d‖² = T; GradVac that expects 0 and learns nothing is PCGrad; GradNorm begins with
    equal weights; orthogonal gradients are only scaled."""
    for kind in ("random", "rank_deficient", "duplicated", "spread"):
        J = make_jacobian(kind, T)
        w = weigh(m.NashMTL(T), J)
        assert (w == weigh(m.FairGrad(T, alpha=1.0), J)).all()
        assert np.linalg.norm(J.T @ w) == pytest.approx(np.sqrt(T), rel=1e-9)
        assert_same_direction(J, weigh(m.GradVac(T, beta=0), J), weigh(m.PCGrad(T), J))
        assert (weigh(m.GradNorm(T), J) == 1).all()
    Q = 3 * np.linalg.qr(np.random.default_rng(T).normal(size=(T + 2, T)))[0].T
    for method, share in ((m.PCGrad, 1), (m.GradVac, 1), (m.AlignedMTL, 1), (m.UPGrad, 1 / T), (m.DualProj, 1 / T),
                          (m.MGDA, 1 / T), (m.IMTLG, 1 / T), (m.NashMTL, 1 / 3)):  # fmt: skip
        assert_close(weigh(method(T), Q), np.full(T, share), 1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_identical_tasks_are_served_as_one(name):
    """The update is their gradient, times a number that does not depend on T, or grows with it."""
    sums = [weigh(METHODS[name].make(T), np.tile(uniform(9, -1, 1), (T, 1))).sum() for T in SIZES]
    if name in ("mgda", "mgda-l2", "mgda-loss", "mgda-loss+", "imtl_g", "upgrad", "dualproj"):
        assert_close(sums, np.ones(len(SIZES)))
    elif name.startswith("cagrad"):
        assert_close(sums, np.full(len(SIZES), {"0.4": 1.4, "1": 2, "3": 0.4}[name.split("-")[1]]))
    elif name == "pcgrad" or name.startswith("aligned"):
        assert_close(sums, SIZES)
    else:
        assert np.isfinite(sums).all() and min(sums) > 0


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize(("name", "T"), expand((k for k, v in METHODS.items() if not v.random), (2, 3, 11, 40)))
def test_renumbering_the_tasks_renumbers_the_weights(name, T):
    method, J, order = METHODS[name], make_jacobian("random", T), np.random.default_rng(T).permutation(T)
    strategy, other = method.make(T), method.make(T)
    other.load_state_dict(select(strategy.memory(), order))
    assert_close(weigh(other, J[order], losses=uniform(T, 0.2, 3)[order]), weigh(strategy, J)[order])


@pytest.mark.parametrize(("name", "kind"), expand((k for k, v in METHODS.items() if v.cone), KINDS))
def test_no_task_is_harmed(name, kind):
    for T in SIZES[1:]:
        J = make_jacobian(kind, T)
        w = weigh(METHODS[name].make(T), J)
        tol = 1e-3 if kind in HOPELESS and METHODS[name].degree else 1e-7  # d is about 0 then
        assert (J @ (J.T @ w) >= -tol * norms(J) * (np.abs(w) @ norms(J))).all()


@pytest.mark.parametrize("T", SIZES)
def test_upgrad_is_linear_in_the_lengths_of_the_gradients(T):
    """A(diag(αa + βb) J) = α A(diag(a) J) + β A(diag(b) J)."""
    for kind in ("random", "rank_deficient", "opposite"):
        J, (a, b) = make_jacobian(kind, T), np.random.default_rng(T).uniform(0.1, 3, size=(2, T, 1))
        x, y, z = ((c * J).T @ weigh(m.UPGrad(T), c * J) for c in (a, b, 1.7 * a + 0.4 * b))
        assert np.linalg.norm(1.7 * x + 0.4 * y - z) <= 1e-8 * norms(J).sum()


@pytest.mark.parametrize("T", SIZES[1:])
def test_updates_vanish_exactly_where_no_task_can_gain(T):
    """UPGrad and DualProj where all gradients combine to 0, MGDA also where some of them do."""
    for kind in ("random", "duplicated", "nearly_aligned", "stationary", "opposite"):
        J = make_jacobian(kind, T)
        some, all_of_them = kind in HOPELESS, kind == "stationary" or (kind == "opposite" and T == 2)
        for method, vanishes in ((m.MGDA, some), (m.UPGrad, all_of_them), (m.DualProj, all_of_them)):
            assert (np.linalg.norm(J.T @ weigh(method(T), J)) < 1e-7 * norms(J).mean()) == vanishes


# ----------------------------------------------------------------------------------------------------------- float32


# IMTL passes a float64 copy on, and decides its rank at 1e-15: for duplicated gradients the rounding of the float32
# Gramian decides, which is another one with AVX2 than with AVX-512.
FLOAT32 = [row for row in product(METHODS, ("random", "duplicated")) if row != ("imtl", "duplicated")]


@pytest.mark.parametrize(("name", "kind"), FLOAT32)
def test_float32_gramians_give_the_directions_of_float64(name, kind):
    for T in SIZES:
        J, method = make_jacobian(kind, T).astype(np.float32), METHODS[name]
        w = weigh(method.make(T), J, dtype=torch.float32)
        assert_same_direction(J.astype(float), w, weigh(method.make(T), J), 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_float32_gramians_of_ill_conditioned_gradients_give_finite_weights(name):
    for T, kind, scale in product((2, 11, 40), KINDS, (1e-8, 1, 1e8)):
        w = weigh(METHODS[name].make(T), scale * make_jacobian(kind, T), dtype=torch.float32)
        assert np.isfinite(w.astype(np.float32)).all()


# ------------------------------------------------------------------------------------------------------- absent tasks


PSEUDO_INVERSE = ("imtl_g", "imtl")  # its rounding errors decide how exact they are


@pytest.mark.parametrize(("name", "scale"), expand(METHODS, (1, 1e-4, 1e8)))
def test_an_absent_task_is_as_if_it_did_not_exist_and_its_state_is_frozen(name, scale):
    tol = 1e-6 if name in PSEUDO_INVERSE else 1e-9
    for T, absent in ((2, [0]), (4, [1]), (11, [0, 5, 10])):
        method, J, there = METHODS[name], scale * make_jacobian("random", T), ~np.isin(np.arange(T), absent)
        strategy, keep = method.make(T), np.flatnonzero(there)
        s, before = view(strategy, keep), {k: v.numpy().copy() for k, v in strategy.memory().items()}
        for key in ("targets", "task_weights"):  # their sum is the number of tasks
            if hasattr(s, key):
                setattr(s, key, getattr(s, key) / getattr(s, key).mean())
        w = weigh(strategy, J * there[:, None], present=there, losses=uniform(T, 0.2, 3) * there)
        assert (w[absent] == 0).all()
        assert_close(w[keep], method.oracle(method.divided(J[keep], s), s), tol)
        for key, value in strategy.memory().items():
            assert (value[absent].numpy() == before[key][absent]).all()
            assert (value[..., absent].numpy() == before[key][..., absent]).all()
        if name == "gradvac":
            _, goal = oracle.gradvac(J[keep], s.orders, s.goal, 0.01)
            assert_close(strategy.goal.numpy()[keep][:, keep], goal)
        if name == "imtl":
            assert (strategy.scales.grad[absent] == 0).all() and (strategy.scales.grad[keep] != 0).all()


@pytest.mark.parametrize("name", PSEUDO_INVERSE)
def test_an_absent_task_has_exactly_no_weight(name):
    for T, scale in product((11, 40), (1, 1e8)):
        J, there = scale * make_jacobian("random", T), np.arange(T) % 3 > 0
        assert (weigh(METHODS[name].make(T), J * there[:, None], present=there)[~there] == 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_steps_without_any_task_or_any_gradient_are_finite(name):
    for T in SIZES:
        w = weigh(METHODS[name].make(T), np.zeros((T, 3)), present=np.zeros(T, dtype=bool), losses=np.zeros(T))
        assert (w == 0).all()
        assert np.isfinite(weigh(METHODS[name].make(T), np.zeros((T, 3)))).all()


# -------------------------------------------------------------------------------------------------------------- state


def test_gradvac_moves_its_goals_towards_the_cosines_it_sees():
    T, generator = 11, stream(SEED, "method", 0)
    strategy, goal = m.GradVac(T), np.zeros((T, T))
    strategy.epoch_start(0, 1, SEED)
    for step in range(5):
        J, orders = make_jacobian("random", T, seed=step), random_orders(T, generator).tolist()
        expected, goal = oracle.gradvac(J, orders, goal, 0.01)
        assert_close(call(strategy, J), expected)
        assert_close(strategy.goal, goal)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "lr": 0.1}])
def test_gradnorm_uses_its_weights_and_then_takes_a_step_on_them(options):
    T, w, strategy = 5, np.ones(5), m.GradNorm(5, **options)
    first = np.random.default_rng(0).uniform(0.2, 3, size=T)
    for step in range(6):
        J, losses = make_jacobian("random", T, seed=step) / 3, np.random.default_rng(step).uniform(0.2, 3, size=T)
        assert_close(call(strategy, J, losses=losses), w)
        w = oracle.gradnorm_step(norms(J), w, losses, first, options.get("alpha", 1.5), options.get("lr", 0.025))
        assert (w > 0).all()
        assert_close(strategy.task_weights, w)
    for _ in range(3):  # steps far beyond 0
        call(strategy, 1e6 * J, losses=losses)
        assert (strategy.task_weights > 0).all() and strategy.task_weights.sum() == pytest.approx(T)


def test_gradnorm_measures_a_late_task_from_its_own_first_loss_while_the_others_share_their_part():
    strategy, J, there = m.GradNorm(3), make_jacobian("random", 3), np.array([True, True, False])
    call(strategy, J * there[:, None], present=there, losses=np.array([1.0, 2, 0]))
    assert strategy.initial[:2].tolist() == [1, 2] and strategy.initial[2].isnan() and strategy.task_weights[2] == 1
    first = np.array([1.0, 2])
    assert_close(strategy.task_weights[:2], oracle.gradnorm_step(norms(J[:2]), np.ones(2), first, first, 1.5, 0.025))
    call(strategy, J, losses=np.array([0.5, 1.5, 4]))
    assert strategy.initial.tolist() == [1, 2, 4]


def test_imtl_learns_its_scales_from_the_losses():
    strategy, losses = imtl(3), np.array([0.3, 1.0, 2.0])
    factors = np.exp(strategy.scales.detach().numpy())
    for times in (1, 2):  # .grad adds up
        w = call(strategy, make_jacobian("random", 3), losses=losses)
        assert_close(strategy.scales.grad, times * (factors * losses - 1))
    ((first,), _, (third,)) = strategy.head_gradients([[tensor([1.0])], [None], [tensor([2.0])]], tensor(w))
    assert_close([first.item(), third.item()], [factors[0], 2 * factors[2]])
    assert m.IMTL(3).scales.tolist() == [0, 0, 0] and m.IMTL(3, lr=0.5).lr == 0.5


@pytest.mark.parametrize("options", [{}, {"bound": 1.8, "min_temperature": 100.0}, {"min_temperature": 1e-9}])
def test_pivrg_serves_the_tasks_that_lost_most_against_their_baselines(options):
    strategy, higher = m.PIVRG(("a", "b", "c"), {"c": 20.0, "a": 80.0, "b": 0.5}, **options), [True, False, False]
    targets = partial(oracle.pivrg_targets, b=options.get("bound", 2), tau_min=options.get("min_temperature", 10))
    assert strategy.targets.tolist() == [1, 1, 1]
    for scores, expected in (
        ([60, 0.7, 21], targets([25, 40, 5])),  # drops in per cent
        ([79.2, 0.51, 20.1], targets([1, 2, 0.5])),  # too close for the bound: the least temperature acts
        ([60, np.nan, 21], targets([25, 15, 5])),  # a task without labels gets the mean drop
        ([np.nan] * 3, [1, 1, 1]),
    ):
        strategy.epoch_end(Statistics(torch.zeros(3), tensor(scores), torch.tensor(higher)))
        assert_close(strategy.targets, expected)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_checkpoint_in_the_middle_changes_nothing(name):
    method, T = METHODS[name], 4
    straight = resumed = method.make(T)
    for epoch in range(4):
        if epoch == 2:
            torch.save(straight.state_dict(), file := io.BytesIO())
            resumed = method.make(T)
            resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        weights = []
        for strategy in dict.fromkeys((straight, resumed)):
            strategy.epoch_start(epoch, 4, seed=epoch)
            weights.append([call(strategy, make_jacobian("random", T, seed=10 * epoch + step)) for step in range(3)])
            scores = tensor(uniform(T, 0.2 * epoch, 2))
            strategy.epoch_end(Statistics(torch.ones(T), scores, torch.ones(T, dtype=torch.bool)))
            for parameter in strategy.parameters():
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        assert np.array_equal(weights[0], weights[-1])
    start, end = method.make(T).memory(), straight.memory()
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in end.items())
    assert any(not torch.equal(value, start[key]) for key, value in end.items())


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("name", METHODS)
def test_heads_and_clipping_are_the_papers(name):
    strategy = METHODS[name].make(3)
    assert defines(strategy, "head_gradients") == (name == "imtl")  # its heads follow e^s L
    assert strategy.heads == METHODS[name].heads
    assert strategy.max_norm == (1.0 if METHODS[name].degree else None)


def test_missing_losses_scores_and_baselines_are_reported():
    for strategy in (m.GradNorm(2), m.IMTL(2), m.MGDA(2, normalization="loss"), m.MGDA(2, normalization="loss+")):
        with pytest.raises(ValueError, match="losses"):
            strategy.weights(torch.eye(2))
    for statistics in (Statistics(torch.ones(2)), Statistics(torch.ones(2), torch.ones(2))):
        with pytest.raises(ValueError, match="scores"):
            m.PIVRG(2, [1.0, 1.0]).epoch_end(statistics)
    for baselines in ([1.0], [1.0, 0.0], {"0": 1.0}, {"0": 1.0, "1": 1.0, "2": 1.0}):
        with pytest.raises(ValueError, match="baselines"):
            m.PIVRG(2, baselines)
    assert np.isfinite(weigh(m.MGDA(2, normalization="loss+"), np.eye(2), losses=np.zeros(2))).all()
