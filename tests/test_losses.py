"""The balancing methods against oracles written from the papers (numpy, float64, explicit gradients) and TorchJD."""

import io
from itertools import chain, permutations, product

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import aggregation, scalarization

import mtl
from mtl.losses import DWA, Custom, Equal, GradDrop, PCGrad, Single, Static, Statistics, Uncertainty

SIZES = (1, 2, 3, 11, 40)
KINDS = ("random", "rank_deficient", "tiny", "huge", "mixed", "aligned", "opposite", "zero_row")
FORMS = {"classification": (1.0, 0.5), "regression": (0.5, 0.5), "benchmark": (1.0, 1.0)}  # Σ a e^{-s} L + b s
WEIGHTINGS = ("equal", "static", "dwa", *FORMS)


def make_jacobian(kind: str, tasks: int) -> np.ndarray:
    rng, i = np.random.default_rng([KINDS.index(kind), tasks]), np.arange(tasks)[:, None]
    jac, scale = rng.normal(size=(tasks, 7)), rng.uniform(0.1, 3, size=(tasks, 1))
    return {
        "random": jac,
        "rank_deficient": jac[:, :2] @ jac[:2] if tasks > 3 else jac[:, :1] * jac[0],
        "tiny": 1e-8 * jac,
        "huge": 1e8 * jac,
        "mixed": 10 ** (3 * scale - 5) * jac,
        "aligned": scale * jac[0],
        "opposite": (-1) ** i * scale * jac[0],
        "zero_row": (i != tasks // 2) * jac,
    }[kind]


def tensor(array) -> torch.Tensor:
    return torch.as_tensor(np.array(array), dtype=torch.float64)


def mask(absent: int | None, tasks: int = 3) -> torch.Tensor | None:
    return None if absent is None else torch.arange(tasks) != absent


def assert_close(actual, expected, scale: float | None = None, tol: float = 1e-9) -> None:
    """Equal up to `tol` relative to `scale` (default: the largest expected entry)."""
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tol * scale)


def assert_among(actual, candidates, scale: float) -> int:
    distances = np.abs(candidates - actual).max(axis=1)
    assert distances.min() <= 1e-9 * scale
    return int(distances.argmin())


def seeded(strategy, seed: int = 0):
    strategy.epoch_start(0, 100, seed=seed)
    return strategy


# ---------------------------------------------------------------------------------------------------- loss weighting


def evaluate(strategy, losses, present=None) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient with respect to the losses."""
    losses = tensor(losses).requires_grad_()
    value = strategy(losses, present)
    assert value.shape == ()
    return value.detach().numpy(), torch.autograd.grad(value, losses)[0].numpy()


def uncertainty(form: str, s) -> Uncertainty:
    strategy = Uncertainty(len(s), form=form).double()
    strategy.log_variances.data.copy_(tensor(s))
    return strategy


def train(strategy, history):
    for losses in history:
        strategy.epoch_end(Statistics(losses=tensor(losses)))
    return strategy


def dwa_oracle(history, temperature: float = 2.0) -> np.ndarray:
    """Liu 2019, eq. 7. A task that did not report in the last epoch, or never before it, has ratio 1."""
    ratios = np.ones(len(history[0]))
    for i, reports in enumerate(np.transpose(history)):
        known = reports[~np.isnan(reports)]
        if len(known) > 1 and not np.isnan(reports[-1]):
            ratios[i] = known[-1] / known[-2]
    powers = np.exp((ratios - ratios.max()) / temperature)
    return len(ratios) * powers / powers.sum()


def torchjd_dwa(history, temperature: float = 2.0):
    peer = scalarization.DWA(temperature)
    for losses in history:
        peer(tensor(losses))
        peer.step()
    return peer


def weighting(method: str, tasks: int, order=None):
    """A strategy in a random state whose tasks are numbered by `order`, the w and c of its objective Σ w L + c in
    numpy, and TorchJD's version of it."""
    rng, order = np.random.default_rng(tasks), np.arange(tasks) if order is None else order
    w, s = (rng.integers(1, 200, size=tasks) / 64)[order], rng.normal(size=tasks)[order]
    zeros, history = np.zeros(tasks), rng.uniform(0.1, 3, size=(3, tasks))[:, order]
    if method == "equal":
        return Equal(tasks).double(), zeros + 1, zeros, scalarization.Sum()
    if method == "static":
        return Static(tasks, w.tolist()).double(), w, zeros, scalarization.Constant(tensor(w))
    if method == "dwa":
        return train(DWA(tasks).double(), history), dwa_oracle(history), zeros, torchjd_dwa(history)
    (a, b), peer = FORMS[method], scalarization.UW(tasks).double()
    peer.log_var.data.copy_(tensor(s))
    return uncertainty(method, s), a * np.exp(-s), b * s, peer if method == "regression" else None


@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("method", WEIGHTINGS)
def test_loss_weighting(method, tasks):
    """Value and gradient by hand and by TorchJD at every scale of the losses; permutation equivariance; an absent
    task leaves the objective of the others (DWA: its ratio of weights)."""
    rng, order = np.random.default_rng(7), np.random.default_rng(8).permutation(tasks)
    strategy, w, c, peer = weighting(method, tasks)
    for scale in (1, 1e-8, 1e8):
        losses = scale * rng.uniform(0.1, 2, size=tasks)
        value, grad = evaluate(strategy, losses)
        assert_close(value, (w * losses + c).sum(), scale=np.abs(w * losses).sum() + np.abs(c).sum())
        assert_close(grad, w)
        if peer is not None:
            assert_close(value, peer(tensor(losses)).detach().numpy(), scale=np.abs(w * losses).sum() + np.abs(c).sum())
    assert_close(evaluate(weighting(method, tasks, order)[0], losses[order])[1], grad[order])
    for absent in range(tasks if tasks > 1 else 0):
        left = np.arange(tasks) != absent
        value, grad = evaluate(strategy, losses * left, mask(absent, tasks))
        if method == "dwa":
            assert_close(grad[left] / grad[left].sum(), w[left] / w[left].sum())
            assert_close(value, grad[left] @ losses[left])
        else:
            assert_close(grad[left], w[left])
            assert_close(value, (w * losses + c)[left].sum())


def test_loss_weighting_arguments():
    """Weights by name or in order, one left out is 1; Single knows only its task; UW starts at weight 1 or `init`."""
    names = ("a", "b", "c")
    assert evaluate(Static(names, {"c": 0.5, "a": 2.0}), [1.0, 2, 3])[1].tolist() == [2, 1, 0.5]
    single = Single(names, task="b")
    assert single.names == ("b",) and single.tasks == 1 and evaluate(single, [3.5]) == (3.5, [1])
    assert evaluate(Uncertainty(3), [0.5, 2, 1])[1].tolist() == [1, 1, 1]
    assert [p.tolist() for p in Uncertainty(2, init=-0.5).parameters()] == [[-0.5, -0.5]]
    for bad in ({"d": 1.0}, [1.0, 2.0], [1.0, 2.0, -1.0]):
        with pytest.raises(ValueError):
            Static(names, bad)
    with pytest.raises(ValueError):
        Single(names, task="d")


@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_uncertainty_learns_its_variances(form, tasks):
    """Kendall 2018: ∂/∂s by central differences, none for an absent task; minimum at e^s = 2L, L, L by form."""
    rng, h = np.random.default_rng(tasks), 1e-5
    s, losses = rng.normal(size=tasks), rng.uniform(0.1, 4, size=tasks)
    best = np.log({"classification": 2, "regression": 1, "benchmark": 1}[form] * losses)
    at = lambda s: evaluate(uncertainty(form, s), losses)[0]  # noqa: E731
    differences = np.array([(at(s + e) - at(s - e)) / (2 * h) for e in h * np.eye(tasks)])
    assert (at(best) < at(best + 0.1)) and (at(best) < at(best - 0.1))
    for point, present, expected in (
        (s, None, differences),
        (best, None, 0 * s),
        (s, mask(0, tasks), differences * (np.arange(tasks) > 0)),
    ):
        strategy = uncertainty(form, point)
        strategy(tensor(losses if present is None else losses * present.numpy()), present).backward()
        assert_close(strategy.log_variances.grad, expected, scale=1, tol=1e-7)


DWA_HISTORIES = [
    np.array([[1, 1, np.nan], [0.5, np.nan, 2], [np.nan, 0.7, 1], [0.4, 0.6, np.nan], [0.3, 0.5, 0.2]]),
    *(10 ** np.random.default_rng(tasks).uniform(-2, 2, size=(6, tasks)) for tasks in SIZES),
]


@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("history", DWA_HISTORIES)
def test_dwa_follows_the_epochs(history, temperature):
    """Weights after every epoch by hand and by TorchJD, 1 in the first two; a save and load changes nothing."""
    tasks = history.shape[1]
    strategy, losses = DWA(tasks, temperature=temperature).double(), np.arange(tasks) + 1.0
    for epoch in range(len(history) + 1):
        value, grad = evaluate(strategy, losses)
        assert_close(grad, np.ones(tasks) if epoch < 2 else dwa_oracle(history[:epoch], temperature))
        if not np.isnan(history).any():
            assert_close(value, torchjd_dwa(history[:epoch], temperature)(tensor(losses)).numpy())
        torch.save(strategy.state_dict(), file := io.BytesIO())
        strategy = DWA(tasks, temperature=temperature).double()
        strategy.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        train(strategy, history[epoch : epoch + 1])


def test_dwa_examples():
    """Constant losses: equal. Ratios (.9, .5), τ = 2 by default: [1.10, .90] (a τ that multiplies: [1.38, .62])."""
    assert_close(evaluate(train(DWA(2).double(), [[4, 0.5]] * 5), [1, 1])[1], [1, 1])
    assert_close(evaluate(train(DWA(2).double(), [[1, 1], [0.9, 0.5]]), [1, 1])[1], [1.0997, 0.9003], tol=1e-4)


# ------------------------------------------------------------------------------------------------- gradient methods


def direction(strategy, jac, present=None) -> np.ndarray:
    """One draw of a gradient method's update."""
    jac = tensor(jac)
    if isinstance(strategy, GradDrop):
        return strategy.aggregate(jac, present).numpy()
    weights = strategy.weights(jac @ jac.T, present)
    assert weights.isfinite().all()
    return (jac.T @ weights).numpy()


def projected(jac: np.ndarray, i: int, order) -> np.ndarray:
    """Yu 2020, algorithm 1, for task i on the gradient vectors themselves."""
    g = jac[i]
    for j in order:
        if g @ jac[j] < 0:
            g = g - (g @ jac[j]) / (jac[j] @ jac[j]) * jac[j]
    return g


def projections(jac: np.ndarray, i: int) -> np.ndarray:
    """Task i's projected gradient for every order of the others."""
    return np.array([projected(jac, i, order) for order in permutations(j for j in range(len(jac)) if j != i)])


def pcgrad_results(jac: np.ndarray) -> np.ndarray:
    """Every result of algorithm 1: each task draws its own order."""
    return np.array([sum(choice) for choice in product(*(projections(jac, i) for i in range(len(jac))))])


def graddrop_results(jac: np.ndarray, leak: float = 0.0) -> np.ndarray:
    """Chen 2020: ℓ Σg + (1-ℓ) times the positive, or the negative, part of each element; (2, P)."""
    return leak * jac.sum(axis=0) + (1 - leak) * np.array([jac.clip(min=0).sum(axis=0), jac.clip(max=0).sum(axis=0)])


def double(jac: np.ndarray, i: int) -> np.ndarray:
    return jac * (1 + (np.arange(len(jac)) == i))[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_pcgrad_with_a_single_order(kind):
    """T = 1, T = 2, and T = 3 with one absent are exact: by vectors, by TorchJD, permutation equivariant, and in
    conflict with neither task."""
    one, strategy = make_jacobian(kind, 1), PCGrad(2)
    assert_close(direction(PCGrad(1), one), one[0])
    for jac in (make_jacobian(kind, 2), make_jacobian(kind, 2) * [[1], [-1]]):
        [expected], scale, gramian = pcgrad_results(jac), np.abs(jac).max(), tensor(jac @ jac.T)
        assert_close(direction(strategy, jac), expected, scale)
        assert_close(direction(strategy, jac), aggregation.PCGrad()(tensor(jac)).numpy(), scale)
        assert_close(strategy.weights(gramian), aggregation.PCGradWeighting()(gramian).numpy())
        assert_close(strategy.weights(gramian.flip(0, 1)), strategy.weights(gramian).flip(0).numpy())
        assert (jac @ direction(strategy, jac) >= -1e-9 * np.linalg.norm(jac, axis=1) * scale).all()
        for absent in range(3):
            assert_close(direction(PCGrad(3), np.insert(jac, absent, 0, axis=0), mask(absent)), expected, scale)


def test_pcgrad_golden_vector():
    """methods.md 5a (TorchJD's table): G = [[18, -22], [-22, 38]], weights 1 + 22/18 and 1 + 22/38."""
    jac = np.array([[-4.0, 1, 1], [6, 1, 1]])
    assert_close(PCGrad(2).weights(tensor(jac @ jac.T)), [2.2222, 1.5789], tol=1e-4)
    assert direction(PCGrad(2), jac).round(5).tolist() == [0.58480, 3.80117, 3.80117]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [3, 4, 5])
def test_pcgrad_draws_are_results_of_algorithm_1(kind, tasks):
    """Each task's own projected gradient is that of some order. It is read off the sum with one gradient counted
    twice: for given orders the update is linear in positive scales of the gradients."""
    jac, strategy = make_jacobian(kind, tasks), PCGrad(tasks)
    for seed in range(5):
        plain = direction(seeded(strategy, seed), jac)
        if tasks == 3:
            assert_among(plain, pcgrad_results(jac), np.abs(jac).max())
        for i in range(tasks):
            own = direction(seeded(strategy, seed), double(jac, i)) - plain
            assert_among(own, projections(jac, i), np.abs(jac).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [11, 40])
def test_pcgrad_of_many_tasks(kind, tasks):
    """Exact where the order cannot matter: orthogonal gradients (the sum), gradients on a line (sum or zero),
    orthogonal pairs (two-task results). Else: weights >= 1, projections shorten, positive homogeneity."""
    strategy, orthogonal = PCGrad(tasks), np.linalg.qr(np.random.default_rng(0).normal(size=(tasks, tasks)))[0]
    assert_close(direction(strategy, 3 * orthogonal), 3 * orthogonal.sum(axis=0))
    pairs, expected = np.zeros((tasks, 7 * tasks)), np.zeros(7 * tasks)
    for start in range(0, tasks, 2):
        block = slice(start, start + 2), slice(7 * start, 7 * start + 7)
        pairs[block] = pair = make_jacobian(kind, min(2, tasks - start))
        [expected[block[1]]] = pcgrad_results(pair)
    assert_close(direction(strategy, pairs), expected, scale=np.abs(pairs).max())
    jac = make_jacobian(kind, tasks)
    scale, plain = np.abs(jac).max(), direction(seeded(strategy), jac)
    if kind in ("aligned", "opposite"):
        assert_close(plain, jac.sum(axis=0) * (kind == "aligned"), scale)
    assert (strategy.weights(tensor(jac @ jac.T)) >= 1).all()
    for factor in (2.0**-27, 2.0**27):
        assert_close(direction(seeded(strategy), factor * jac), factor * plain, factor * scale)
    for i in range(0, tasks, 5):
        own = direction(seeded(strategy), double(jac, i)) - plain
        assert np.linalg.norm(own) <= np.linalg.norm(jac[i]) + 1e-9 * scale


def test_pcgrad_orders_are_independent_and_uniform():
    """T = 3, all in conflict: the 8 results are equally frequent (5 sd) over seeds and within a stream, TorchJD's
    are the same 8, and a seed repeats its stream."""
    jac, strategy, n = np.array([[1.0, -0.6, -0.5], [-0.4, 1.3, -0.7], [-0.8, -0.3, 1.1]]), PCGrad(3), 400
    results = pcgrad_results(jac)
    assert len(np.unique(results.round(6), axis=0)) == 8
    stream = lambda: [assert_among(direction(strategy, jac), results, 1) for _ in range(n)]  # noqa: E731
    draws, first = [assert_among(direction(seeded(strategy, k), jac), results, 1) for k in range(n)], stream()
    for found in (draws, first):
        assert np.abs(np.bincount(found, minlength=8) - n / 8).max() < 5 * np.sqrt(n / 8 * 7 / 8)
    torch.manual_seed(0)
    peer = aggregation.PCGrad()
    assert {assert_among(peer(tensor(jac)).numpy(), results, 1) for _ in range(200)} == set(range(8))
    seeded(strategy, n - 1).weights(tensor(jac @ jac.T))
    assert stream() == first


@pytest.mark.parametrize("tasks", [11, 40])
def test_pcgrad_of_many_tasks_on_average(tasks):
    """Mean and spread over draws are those of algorithm 1 on vectors with uniform orders (5 standard errors)."""
    jac, rng, strategy, n = make_jacobian("random", tasks), np.random.default_rng(0), PCGrad(tasks), 4400 // tasks
    order = lambda i: rng.permutation(np.delete(np.arange(tasks), i))  # noqa: E731
    oracle = np.array([sum(projected(jac, i, order(i)) for i in range(tasks)) for _ in range(n)])
    ours = np.array([direction(seeded(strategy, seed), jac) for seed in range(n)])
    error = np.sqrt((oracle.var(axis=0) + ours.var(axis=0)) / n)
    assert (np.abs(oracle.mean(axis=0) - ours.mean(axis=0)) < 5 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), oracle.std(axis=0), rtol=0.5)


@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", SIZES)
def test_graddrop_keeps_one_sign_with_the_right_frequency(tasks, kind, leak):
    """The positive part with probability ½(1 + Σg/Σ|g|) within 5 sd; the plain sum where signs agree or ℓ = 1."""
    jac, strategy, n = make_jacobian(kind, tasks), GradDrop(tasks, leak=leak), 200
    jac[:, 5], jac[:, 6] = np.abs(jac[:, 5]), 0
    size, plain = np.abs(jac).sum(axis=0), jac.sum(axis=0)
    found = np.array([direction(seeded(strategy, seed), jac) for seed in range(n)])
    up, down = (np.abs(found - part) <= 1e-12 * size for part in graddrop_results(jac, leak))
    agree = (jac >= 0).all(axis=0) | (jac <= 0).all(axis=0) | (leak == 1)
    assert (up | down).all() and (np.abs(found - plain)[:, agree] <= 1e-12 * size[agree]).all()
    p = 0.5 * (1 + plain[~agree] / size[~agree])
    assert (np.abs(up[:, ~agree].sum(axis=0) - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 3).all()


def test_graddrop_draws_every_element_by_itself():
    """One call on 20,000 equal columns shows the probability (no coin shared by the tensor); a seed repeats it."""
    jac, strategy = np.repeat([[3.0], [-1.0], [-0.5]], 20000, axis=1), GradDrop(3)
    first = direction(seeded(strategy, 5), jac)
    assert set(first) == {3.0, -1.5} and abs((first > 0).mean() - 3 / 4.5) < 5 * np.sqrt(2 / 9 / 20000)
    assert (direction(strategy, jac) != first).any() and (direction(seeded(strategy, 6), jac) != first).any()
    assert (direction(seeded(strategy, 5), jac) == first).all()


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_has_torchjds_results_and_ignores_absent_tasks(leak):
    """All 8 results of 3 elements in conflict on either side; with an absent task, the 8 of the two others."""
    jac, strategy = np.array([[1.0, -2, 0.5], [-0.5, 1, -3], [-0.25, 0.5, -1]]), GradDrop(3, leak=leak)
    torch.manual_seed(0)
    peer = aggregation.GradDrop(leak=torch.full((3,), leak).double())
    theirs = {tuple(peer(tensor(jac)).numpy().round(6)) for _ in range(300)}
    assert {tuple(direction(seeded(strategy, k), jac).round(6)) for k in range(300)} == theirs and len(theirs) == 8
    jac[1] = 0
    expected = {tuple(result) for result in product(*graddrop_results(jac[[0, 2]], leak).T.round(6))}
    assert {tuple(direction(seeded(strategy, k), jac, mask(1)).round(6)) for k in range(1000)} == expected


# --------------------------------------------------------------------------------------------------------- backward


class Network:
    """Conv-BatchNorm trunk with three heads; the second head opposes the first, so gradients do conflict."""

    def __init__(self, dtype=torch.float64, layout=torch.contiguous_format):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.trunk = nn.Sequential(*layers, nn.Linear(16, 5), nn.ReLU()).to(dtype=dtype, memory_format=layout)
        self.modules = [nn.Linear(5, 4).to(dtype) for _ in range(3)]
        self.modules[1].weight.data.copy_(-self.modules[0].weight.data)
        self.images = torch.randn(8, 3, 6, 6, dtype=dtype).to(memory_format=layout)
        self.labels = torch.randint(4, (2, 8))[[0, 0, 1]]
        self.shared, self.heads = list(self.trunk.parameters()), [list(m.parameters()) for m in self.modules]

    def losses(self) -> list[torch.Tensor]:
        z = self.trunk(self.images)
        return [nn.functional.cross_entropy(head(z), y) for head, y in zip(self.modules, self.labels, strict=True)]

    def gradients(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Explicit per-task gradients: the shared parameters' Jacobian and each head's own."""
        losses, grad = self.losses(), lambda loss, on: flat(torch.autograd.grad(loss, on, retain_graph=True))
        pairs = zip(losses, self.heads, strict=True)
        return np.array([grad(loss, self.shared) for loss in losses]), [grad(loss, head) for loss, head in pairs]

    def backward(self, strategy, losses=None, **options):
        return mtl.backward(losses or self.losses(), seeded(strategy), self.shared, self.heads, **options)

    def grads(self) -> np.ndarray:
        """`.grad` of trunk and heads, one vector; nothing counts as zero."""
        parameters = [*self.shared, *chain(*self.heads)]
        return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)


def flat(tensors) -> np.ndarray:
    return np.concatenate([t.detach().reshape(-1).numpy() for t in tensors])


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_equal_is_the_plain_backward(dtype, as_tensor):
    """sum().backward() in trunk and heads, from a list or a (T,) tensor; BatchNorm has seen the batch once."""
    ours, plain = Network(dtype), Network(dtype)
    sum(plain.losses()).backward()
    losses = ours.losses()
    mtl.backward(torch.stack(losses) if as_tensor else losses, Equal(3), ours.shared)
    assert_close(ours.grads(), plain.grads(), scale=1, tol=1e-6)
    assert ours.trunk[1].num_batches_tracked == 1


@pytest.mark.parametrize("method", WEIGHTINGS)
def test_backward_of_loss_weightings(method):
    """Jᵀw in the trunk, w_i times each head's gradient, w in the Step, the norm; UW's parameters learn too."""
    network, (strategy, w, _, _) = Network(), weighting(method, 3)
    jac, heads = network.gradients()
    values = [loss.item() for loss in network.losses()]
    step = network.backward(strategy)
    assert_close(network.grads(), np.concatenate([jac.T @ w, *(wi * head for wi, head in zip(w, heads, strict=True))]))
    assert_close(step.weights.detach(), w)
    assert_close(step.norm, np.linalg.norm(jac.T @ w))
    if method in FORMS:
        assert_close(strategy.log_variances.grad, FORMS[method][1] - w * values)


@pytest.mark.parametrize(("absent", "zero"), [(None, ""), *product(range(3), ("constant", "differentiable"))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", [Equal, Uncertainty, PCGrad, GradDrop])
def test_backward_matches_explicit_task_gradients(method, layout, absent, zero):
    """Trunk as the oracle on the present tasks' gradients (memory layout kept), heads their own gradient
    unweighted, an absent task's head nothing."""
    network = Network(layout=layout)
    (jac, heads), losses = network.gradients(), network.losses()
    if absent is not None:
        jac, heads[absent] = np.delete(jac, absent, axis=0), 0 * heads[absent]
        losses[absent] = losses[absent] * 0 if zero == "differentiable" else losses[absent].new_zeros(())
    step = network.backward(method(3).double(), losses, present=mask(absent))
    (update, own), scale = np.split(network.grads(), [jac.shape[1]]), np.abs(jac).max()
    if method is GradDrop:
        up, down = np.abs(update - graddrop_results(jac)) <= 1e-9 * scale
        assert (up | down).all() and not up.all() and not down.all() and step.weights is None
    else:
        assert_among(update, pcgrad_results(jac) if method is PCGrad else jac.sum(axis=0)[None], scale)
    assert_close(own, np.concatenate(heads))
    assert network.shared[0].is_contiguous(memory_format=layout)
    assert all(p.grad.stride() == p.stride() for p in network.shared)


@pytest.mark.parametrize("zero", ["constant", "differentiable"])
@pytest.mark.parametrize("method", [Equal, Uncertainty, PCGrad, GradDrop])
def test_backward_of_a_batch_without_labels(method, zero):
    """No task present: nothing moves."""
    network, strategy = Network(), method(3)
    losses = [loss * 0 if zero == "differentiable" else loss.new_zeros(()) for loss in network.losses()]
    network.backward(strategy, losses, present=torch.zeros(3, dtype=torch.bool))
    assert not network.grads().any() and all(p.grad is None or not p.grad.any() for p in strategy.parameters())


@pytest.mark.parametrize("absent", [None, 0, 1, 2])
@pytest.mark.parametrize("method", [PCGrad, GradDrop])
def test_step_statistics(method, absent):
    """‖d‖, ‖d‖/‖Σg‖, mean cosine, share of conflicts and mean magnitude similarity over
    the pairs of present tasks; the Gramian weights."""
    network = Network()
    jac, losses, left = network.gradients()[0], network.losses(), np.arange(3) != (-1 if absent is None else absent)
    losses = [loss if there else loss * 0 for loss, there in zip(losses, left, strict=True)]
    step = network.backward(method(3), losses, present=mask(absent))
    jac, update = jac[left], network.grads()[: jac.shape[1]]
    unit = jac / np.linalg.norm(jac, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    assert_close(step.norm, np.linalg.norm(update))
    assert_close(step.ratio, np.linalg.norm(update) / np.linalg.norm(jac.sum(axis=0)))
    if method is PCGrad:
        assert_close(jac.T @ step.weights.numpy()[left], update)
    assert_close(step.cosine, cosines.mean(), scale=1)
    assert_close(step.conflict, (cosines < 0).mean(), scale=1)
    pairs = [np.linalg.norm(jac[[i, j]], axis=1) for j in range(len(jac)) for i in range(j)]
    assert_close(step.magnitude, np.mean([1 - (a - b) ** 2 / (a**2 + b**2) for a, b in pairs]), scale=1)


@pytest.mark.parametrize("method", [Equal, PCGrad, GradDrop])
def test_backward_adds_and_frees_the_graph(method):
    """A second call doubles `.grad` (same draws); going through the same graph again raises."""
    network, strategy = Network(), method(3)
    network.backward(strategy, losses := network.losses())
    once = network.grads()
    with pytest.raises(RuntimeError, match="a second time"):
        network.backward(strategy, losses)
    again = Network()
    for _ in range(2):
        again.backward(strategy)
    assert_close(again.grads(), 2 * once)


@pytest.mark.parametrize("method", [PCGrad, GradDrop])
def test_backward_with_parameters_that_few_tasks_use(method):
    """One shared parameter serves only the first of two tasks, one serves none; the second head is empty."""
    a, b, unused, head = (nn.Parameter(tensor(v)) for v in ([1.0, -2.0], [0.5, 3.0], [1.0], 2.0))
    losses = [head * (a * tensor([1, 2])).sum() + (b**2).sum(), (a * tensor([-3, 1])).sum()]
    mtl.backward(losses, seeded(method(2)), [a, b, unused], [[head], []])
    jac, update = np.array([[2, 4, 1, 6], [-3, 1, 0, 0.0]]), flat([a.grad, b.grad])
    results = pcgrad_results(jac) if method is PCGrad else np.array([[2, 5, 1, 6], [-3, 5, 1, 6]])
    assert_among(update, results, scale=1)
    assert head.grad == 1 * 1 + 2 * -2 and (unused.grad is None or not unused.grad.any())


@pytest.mark.parametrize("method", [Equal, PCGrad, GradDrop])
def test_backward_refuses_bad_arguments(method):
    """ValueError for a wrong number of losses or heads, nothing to share, and heads left out."""
    network = Network()
    losses, shared, heads = network.losses(), network.shared, network.heads
    wrong = [(losses[:2], shared, heads), ([*losses, losses[0]], shared, heads), (losses, [], heads)]
    wrong += [(losses, shared, heads[:2])]
    for values, parameters, own in wrong if method is Equal else [*wrong, (losses, shared, None)]:
        with pytest.raises(ValueError):
            mtl.backward(values, method(3), parameters, own)


# ----------------------------------------------------------------------------------------------------------- Custom

CUSTOM = """
import torch
from torch import nn

class MultiTaskLoss(nn.Module):
    def __init__(self, start=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(start)))

    def forward(self, fine_loss, coarse_loss, epoch, total_epochs):
        return self.weight * (1 + epoch) / total_epochs * fine_loss + 3 * coarse_loss

class Normalised(nn.Module):
    def leaves(self, node, found):
        for parent, _ in node.next_functions if node is not None else ():
            if hasattr(parent, "variable"):
                found[id(parent.variable)] = parent.variable
            self.leaves(parent, found)
        return list(found.values())

    def forward(self, fine_loss, coarse_loss, epoch, total_epochs):
        grads = torch.autograd.grad(fine_loss, self.leaves(fine_loss.grad_fn, {}), retain_graph=True)
        return fine_loss / sum(g.square().sum() for g in grads).sqrt() + coarse_loss

NotAModule = 3
"""


@pytest.fixture
def custom(tmp_path):
    (tmp_path / "own.py").write_text(CUSTOM)
    return lambda tasks=("fine", "coarse"), file="own.py", **kw: Custom(tasks=tasks, file=str(tmp_path / file), **kw)


def test_custom_loss_sees_losses_and_progress_and_learns(custom):
    """Losses in task order, epoch and total from epoch_start, parameters exposed and given their gradient."""
    network, strategy = Network(), custom(class_name="MultiTaskLoss", args={"start": 2.0})
    strategy.epoch_start(4, 10, seed=0)
    value, grad = evaluate(strategy, [0.5, 7.0])
    assert_close([value, *grad], [2 * 5 / 10 * 0.5 + 3 * 7, 1, 3])
    jac, losses = network.gradients()[0][:2], network.losses()[:2]
    step = mtl.backward(losses, strategy, network.shared, network.heads[:2])
    assert_close(network.grads()[: jac.shape[1]], jac.T @ [1, 3])
    assert_close(step.weights.detach(), [1, 3])
    assert [(p.item(), p.grad.item()) for p in strategy.parameters()] == [(2, pytest.approx(0.5 * losses[0].item()))]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_custom_loss_may_walk_the_graph(custom, as_tensor):
    """autograd.grad inside forward on leaves found from the loss itself: fine loss over its gradient's norm."""
    network, strategy = Network(), custom(class_name="Normalised")
    (jac, heads), losses = network.gradients(), network.losses()[:2]
    norm = np.linalg.norm(np.concatenate([jac[0], heads[0]]))
    mtl.backward(torch.stack(losses) if as_tensor else losses, strategy, network.shared, network.heads[:2])
    assert_close(network.grads(), np.concatenate([jac[0] / norm + jac[1], heads[0] / norm, heads[1], 0 * heads[2]]))


def test_custom_loss_reports_what_is_wrong(custom):
    """No file; no such class, not a module, other numbers of losses in forward or at the call."""
    with pytest.raises(FileNotFoundError):
        custom(file="nowhere.py")
    for bad in ({"class_name": "Missing"}, {"class_name": "NotAModule"}, {"tasks": ("a", "b", "c")}, {"tasks": ("a",)}):
        with pytest.raises(ValueError):
            custom(**bad)
    network = Network()
    with pytest.raises(ValueError):
        mtl.backward(network.losses(), custom(), network.shared, network.heads)


@pytest.mark.parametrize(("returned", "wrong"), [
    ("a, b", "tuple"), ("a.item()", "float"), ("a.detach()", "does not depend"), ("stack([a, b])", "2 numbers"),
])  # fmt: skip
def test_custom_loss_must_return_one_scalar(tmp_path, returned, wrong):
    """Two losses in a tuple would train as their sum, and nobody would know."""
    forward = f"    def forward(self, a, b, epoch, total_epochs):\n        return {returned}\n"
    (tmp_path / "own.py").write_text("from torch import nn, stack\nclass MultiTaskLoss(nn.Module):\n" + forward)
    strategy, losses = Custom(tasks=2, file=str(tmp_path / "own.py")), torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=f"^MultiTaskLoss.forward returned .*{wrong}.*; one scalar tensor is needed$"):
        strategy(losses)
