"""A task without labels is dropped: what its loss holds reaches nothing, and what is known of it rests."""

import copy

import numpy as np
import pytest
import shipped
import torch
from torch import nn

import mtl
from mtl.certify.problem import WIDTH, make
from mtl.engine.backward import Switches
from mtl.losses import (
    DWA,
    LDCMTL,
    MOML,
    PIVRG,
    RLW,
    AutoLambda,
    ConFIG,
    Equal,
    ExcessMTL,
    GradNorm,
    MoDo,
    PCGrad,
    SDMGrad,
    Statistics,
    Uncertainty,
)

METHODS = [name for name in shipped.options("loss") if name not in ("custom", "single")]
ABSENT = torch.tensor([True, False, True])
OTHERS = [0, 2]
PAPER = Switches()


class Net(nn.Module):
    """A shared layer and three heads of one number; losses are positive, and no two alike."""

    def __init__(self, seed: int = 0):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.trunk = nn.Parameter(torch.randn(4, WIDTH, generator=draws).double())
        self.heads = nn.ParameterList(torch.randn(WIDTH, generator=draws).double() for _ in range(3))

    def forward(self, batch: int = 0, views=lambda features: [features] * 3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch)).double()
        features = (x @ self.trunk).tanh()
        seen = zip(views(features), self.heads, strict=True)
        return [(i + (f * h).sum(1) - x[:, i]).square().mean() + 0.1 for i, (f, h) in enumerate(seen)], features

    def grads(self) -> list:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]


def step(strategy, absent_loss, switches=PAPER) -> list:
    """The gradients that a batch without task 1 leaves, whose loss there is `absent_loss` of the true one."""
    net = Net()
    strategy.look_ahead(lambda k: torch.stack(net(k)[0]), net.parameters(), 0.0, ABSENT)
    parts, features = zip(*(net(k, strategy.views) for k in range(strategy.samples)), strict=True)
    for losses in parts:
        losses[1] = absent_loss(losses[1])
    given = parts[0] if strategy.samples == 1 else parts
    mtl.backward(given, strategy, [net.trunk], [[h] for h in net.heads], ABSENT, features[0], switches)
    return [*net.grads(), *(p.grad for p in strategy.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_there_but_absent_is_as_a_constant_0(name):
    live = step(make(name), lambda loss: loss)
    torch.testing.assert_close(live, step(make(name), lambda loss: loss.new_zeros(())), rtol=0, atol=0)
    assert not live[2].any() and live[0].any() and live[0].isfinite().all()


@pytest.mark.parametrize("options", [{"scale": "norm"}, {"heads": "own"}, {"scale": "sum"}, {"transform": "log"}])
@pytest.mark.parametrize("kind", [Equal, PCGrad])
def test_so_it_is_whatever_the_switches(kind, options):
    live, constant = (step(kind(3), of, Switches(**options)) for of in (lambda x: x, lambda x: x.new_zeros(())))
    torch.testing.assert_close(live, constant, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ after a history


def jacobian(tasks: int = 3) -> torch.Tensor:
    return torch.randn(tasks, 6, generator=torch.Generator().manual_seed(1)).double()


def masked_gramian() -> tuple[torch.Tensor, torch.Tensor]:
    J = jacobian()
    whole, rest = J @ J.T, J[OTHERS] @ J[OTHERS].T
    return torch.where(ABSENT[:, None] & ABSENT, whole, 0.0), rest


def test_dwa_renormalises_over_the_present():
    """Epoch means 1 → (½, 5, 0.6): the absent task's bad epoch takes no weight from the others."""
    three, two = DWA(3), DWA(2)
    for values in ([1.0, 1, 1], [0.5, 5, 0.6]):
        three.epoch_end(Statistics(torch.tensor(values)))
        two.epoch_end(Statistics(torch.tensor(values)[OTHERS]))
    losses = torch.tensor([2.0, 3, 4])
    torch.testing.assert_close(three(losses, ABSENT), two(losses[OTHERS]))


def test_pivrg_renormalises_over_the_present():
    """With a temperature that the spread does not set, since the spread is of all tasks."""
    scores, higher = torch.tensor([59.0, 66, 79]), torch.ones(3, dtype=torch.bool)
    three, two = PIVRG(3, [60.0, 70, 80]), PIVRG(2, [60.0, 80])
    three.epoch_end(Statistics(torch.ones(3), scores, higher))
    two.epoch_end(Statistics(torch.ones(2), scores[OTHERS], higher[OTHERS]))
    whole, rest = masked_gramian()
    torch.testing.assert_close(three.weights(whole, ABSENT)[OTHERS], two.weights(rest))


def test_gradnorm_renormalises_over_the_present():
    whole, rest = masked_gramian()
    three, two = GradNorm(3), GradNorm(2)
    three.task_weights.copy_(torch.tensor([0.25, 2.5, 0.25]))
    losses = torch.tensor([1.0, 5, 2]).double()
    for _ in range(4):
        weights = three.weights(whole, ABSENT, losses)
        torch.testing.assert_close(weights[OTHERS], two.weights(rest, None, losses[OTHERS]))
        losses = losses * torch.tensor([0.7, 1.0, 0.9])
    assert weights[1] == 0 and three.task_weights[1] == 2.5
    assert float(three.task_weights.sum()) == pytest.approx(3)


def test_excess_mtl_renormalises_over_the_present():
    three, two, J = ExcessMTL(3), ExcessMTL(2), jacobian()
    three.task_weights.copy_(torch.tensor([0.2, 2.6, 0.2]))
    for k in range(4):
        whole = torch.where(ABSENT[:, None], (k + 1) * J, 0.0)
        ours, theirs = three.aggregate(whole, ABSENT), two.aggregate((k + 1) * J[OTHERS])
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1][OTHERS], theirs[1])


def test_ldc_mtl_compares_the_tasks_on_both_sides_of_an_absent_one():
    """|w_i L_i - w_j L_j| of consecutive present tasks, in NumPy; and no task before the first present one."""
    method, losses = LDCMTL(6, penalty=0.7).double(), torch.tensor([1.0, 5, 2, 4, 3, 9]).double()
    for here in ([1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]):
        present = torch.tensor(here, dtype=torch.bool)
        weighted = losses.numpy()[present] / (1 + np.exp(-1))
        wanted = losses.numpy()[present].mean() + 0.7 * np.abs(np.diff(weighted)).sum()
        assert method(losses, present).item() == pytest.approx(wanted)


# --------------------------------------------------------------------------------------------------------- what rests


@pytest.mark.parametrize("kind", [AutoLambda, MOML])
def test_looking_ahead_leaves_an_absent_task_alone(kind):
    """Its weight, moments and count; and the others learn as without it."""
    three, two, net = kind(3, lr=0.01).double(), kind(2, lr=0.01).double(), Net()
    for k in range(6):
        absent = k >= 3
        before = copy.deepcopy(three.memory())
        three.look_ahead(lambda half, k=k: torch.stack(net(2 * k + half)[0]), [*net.parameters()], 0.1,
                         ABSENT if absent else None)  # fmt: skip
        for name, value in three.memory().items():
            if name != "goal":
                assert absent == bool(value[1] == before[name][1])
        assert not absent or not torch.equal(three.meta.first, before["meta.first"])
    for k in range(3):
        two.look_ahead(lambda half, k=k: torch.stack(net(2 * k + half)[0])[OTHERS], [*net.parameters()], 0.1)
    fresh = kind(3, lr=0.01).double()
    for k in range(3):
        fresh.look_ahead(lambda half, k=k: torch.stack(net(2 * k + half)[0]), [*net.parameters()], 0.1, ABSENT)
    torch.testing.assert_close(fresh.meta.first[OTHERS], two.meta.first)


@pytest.mark.parametrize("labelled", [(), (0,), (1,)])
@pytest.mark.parametrize("kind", [AutoLambda, MOML])
def test_looking_ahead_at_a_half_without_any_label(kind, labelled):
    strategy, net = kind(3).double(), Net()
    before = [p.detach().clone() for p in net.parameters()]

    def losses_of(half):
        losses = torch.stack(net(half)[0])
        return losses if half in labelled else torch.zeros_like(losses).detach()

    strategy.look_ahead(losses_of, [*net.parameters()], 0.1, torch.zeros(3, dtype=torch.bool))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(value.isfinite().all() for value in strategy.state_dict().values())


def test_learned_weights_rest_in_the_engine(smoke, monkeypatch):
    """Momentum would carry an absent task's log-variance on: value and momentum stay for as long as it is absent."""
    seen, real = [], mtl.Step.__call__

    def watched(self, forward, size, labelled=None, observer=None):
        s = self.strategy.log_variances
        if s.grad is None:
            return real(self, forward, size, labelled, observer)
        # From the second step on.
        labelled = torch.tensor([[True, False]]).expand(size, 2)
        buffers = self.optimizer.state[s]
        before = s.detach().clone(), buffers["momentum_buffer"].clone()
        result = real(self, forward, size, labelled, observer)
        seen.append([new.eq(old).tolist() for new, old in zip((s, buffers["momentum_buffer"]), before, strict=True)])
        return result

    monkeypatch.setattr(mtl.Step, "__call__", watched)
    assert smoke("loss=uncertainty", "trainer.epochs=2").code == 0
    assert len(seen) == 3 and all(same == [False, True] for step in seen for same in step)


@pytest.mark.parametrize(("kind", "parts"), [(MoDo, 2), (SDMGrad, 3)])
def test_a_task_must_be_labelled_in_all_parts_that_are_compared(smoke, monkeypatch, kind, parts):
    """The engine says so: a part without its labels would pass for a gradient of 0."""
    from mtl.engine import step

    masks, real, call = [], step.gradients, step.Step.__call__

    def spy(losses, strategy, shared, heads, present, *rest, **more):
        masks.append(present.tolist())
        return real(losses, strategy, shared, heads, present, *rest, **more)

    def partly(self, forward, size, labelled=None, observer=None):
        labelled = torch.ones(size, 2, dtype=torch.bool)
        for part in list(labelled[:, 1].tensor_split(parts))[: len(masks)]:
            part.fill_(False)  # the k-th step lacks the labels of the first k parts
        return call(self, forward, size, labelled, observer)

    monkeypatch.setattr(step, "gradients", spy)
    monkeypatch.setattr(step.Step, "__call__", partly)
    name = {MoDo: "modo", SDMGrad: "sdmgrad"}[kind]
    assert smoke(f"loss={name}", "trainer.epochs=1").code == 0
    assert masks == [[True, True], [True, False]]


# ------------------------------------------------------------------------------------------------- signs and streams


def test_a_step_scaled_to_the_sum_never_turns_round():
    """ConFIG's weights have signs, and their sum may be negative: scaled by it, the step would ascend."""
    J, turned = np.random.default_rng(0), 0
    for _ in range(200):
        jac = torch.tensor(J.normal(size=(3, 4)) * [[1], [1], [0.01]])
        steps = []
        for scale in ("paper", "sum"):
            theta = nn.Parameter(torch.zeros(4).double())
            weights = mtl.backward([(g * theta).sum() for g in jac], ConFIG(3), [theta], [[]] * 3,
                                   switches=Switches(scale=scale)).weights  # fmt: skip
            steps.append((theta.grad, weights))
        (paper, plain), (scaled, weights) = steps
        assert float(torch.cosine_similarity(paper, scaled, 0)) == pytest.approx(1)
        assert float(weights.abs().sum()) == pytest.approx(3)
        turned += bool(plain.sum() < 0)
    assert turned  # else nothing was tested


def test_draws_are_a_function_of_seed_and_epoch():
    strategy = RLW(3)

    def weights(epoch, seed):
        strategy.epoch_start(epoch, 10, seed)
        losses = torch.ones(3, requires_grad=True)
        return torch.autograd.grad(strategy(losses), losses)[0].tolist()

    assert weights(0, 0) == weights(0, 0)
    assert len({tuple(weights(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_uncertainty_gets_no_gradient_from_an_absent_task():
    strategy = Uncertainty(3).double()
    step(strategy, lambda loss: loss)
    assert strategy.log_variances.grad[1] == 0 and (strategy.log_variances.grad[OTHERS] != 0).all()
