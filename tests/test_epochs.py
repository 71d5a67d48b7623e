"""What a loop tells a method of its epochs and steps: odd numbers are right or refused, with method and task."""

import math

import numpy as np
import pytest
import torch
from loops import METHODS, Loop, batch

from mtl import losses as m
from mtl.certify.problem import make
from mtl.losses import Statistics
from mtl.losses.hooks import defines

NAN, INF = math.nan, math.inf
UP = torch.ones(3, dtype=torch.bool)
LEARNERS = [name for name in METHODS if defines(make(name), "epoch_end")]
READERS = [name for name in LEARNERS if name in ("amtl", "dtp", "pivrg")]  # of scores; the others read losses
FAIR = torch.tensor([50.0, 40.0, 30.0])


def told(losses=(1.0, 1.0, 1.0), scores=FAIR, higher=UP, **more) -> Statistics:
    return Statistics(torch.tensor(losses), torch.as_tensor(scores), higher, **more)


def learned(strategy) -> torch.Tensor:
    """All that the method has learned, with 0 for "not known yet"."""
    return torch.cat([value.double().flatten() for value in strategy.memory().values()]).nan_to_num(nan=0.0)


def build(name):
    strategy = make(name).float()
    if hasattr(strategy, "warmup_epochs"):
        strategy.warmup_epochs = 0
    return strategy


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - set(READERS)))
@pytest.mark.parametrize("value", [-2.0, INF])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_mean_loss_without_a_logarithm_is_refused(name, value, epoch):
    strategy = build(name)
    for before in range(epoch):
        strategy.epoch_end(told())
        strategy.epoch_start(before + 1, 4)
    state = learned(strategy)
    with pytest.raises(ValueError, match=rf"{type(strategy).__name__}.*mean loss of 1.*in epoch {epoch + 1}"):
        strategy.epoch_end(told(losses=(1.0, value, 1.0)))
    assert torch.equal(learned(strategy), state)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize(
    "losses", [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (NAN, 1.0, 1.0), (NAN, NAN, NAN), (1e38, 1e-38, 1.0)]
)
def test_odd_mean_losses_leave_finite_numbers(name, losses):
    strategy = build(name)
    for epoch in (1, 2, 3):
        strategy.epoch_end(told(losses))
        strategy.epoch_start(epoch, 4)
    assert learned(strategy).isfinite().all()


def test_a_nadir_of_zero_is_none():
    """Relative to a nadir of 1e-12 the task would have had the whole weight from then on."""
    strategy = m.STCH(2, warmup_epochs=0)
    strategy.epoch_end(Statistics(torch.tensor([1.0, 0.0])))
    assert strategy.nadir[0] == 1 and strategy.nadir[1].isnan()
    strategy.epoch_end(Statistics(torch.tensor([9.0, 2.0])))
    assert strategy.nadir.tolist() == [1, 2]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("value", [INF, -INF, 1e300])
def test_an_infinite_score_is_refused(name, value):
    strategy = build(name)
    scores = torch.tensor([50.0, value, 30.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"^scores\[1\] \(1\): .* in epoch 1; for {type(strategy).__name__}"):
        strategy.epoch_end(told(scores=scores))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("scores", [(0.0, 0.0, 0.0), (NAN, 50.0, 50.0), (NAN, NAN, NAN), (-1e38, 50.0, 50.0)])
def test_odd_scores_leave_finite_numbers(name, scores):
    strategy = build(name)
    if name == "dtp" and min(scores) < 0:
        with pytest.raises(ValueError, match=r"^scores\[0\] .* DTP a score is an accuracy in percent, from 0 to 100"):
            strategy.epoch_end(told(scores=scores))
    else:
        strategy.epoch_end(told(scores=scores))
        assert learned(strategy).isfinite().all()


def test_a_negative_error_is_refused_where_it_is_a_divisor():
    with pytest.raises(ValueError, match=r"^scores\[2\] \(2\): -1 .* AMTL a score that is better when lower"):
        m.AMTL(3, [1.0, 1.0, 1.0]).epoch_end(told(scores=(1.0, 1.0, -1.0), higher=~UP))


@pytest.mark.parametrize("present", [None, torch.tensor([True, True, False])])
def test_famo_refuses_a_negative_loss_after_the_step(present):
    strategy = m.FAMO(3)
    strategy(torch.tensor([1.0, 2.0, 3.0], requires_grad=True), present)
    with pytest.raises(ValueError, match=r"losses\[1\] \(1\): negative \(-2\).*FAMO takes their logarithms"):
        strategy.after_step(torch.tensor([1.0, -2.0, 1.0]), present)
    assert strategy.logits.tolist() == [0, 0, 0]
    strategy.after_step(torch.tensor([1.0, 0.0, NAN]), present)
    assert strategy.logits.isfinite().all()


def test_famo_does_so_on_a_device_that_nobody_waits_for(monkeypatch):
    """There the host learns of it later; until then the task counts as unknown."""
    monkeypatch.setattr("mtl.losses.negative.host", lambda flags: None)
    strategy = m.FAMO(3)
    strategy(torch.tensor([1.0, 2.0, 3.0], requires_grad=True))
    strategy.after_step(torch.tensor([1.0, -2.0, 1.0]))
    assert strategy.logits.isfinite().all() and strategy.logits[1] == 0 and strategy.logits[2] != 0


@pytest.mark.parametrize("name", ["auto_lambda", "moml"])
def test_looking_ahead_leaves_the_parameters_alone_whatever_happens(name):
    """An error in the second forward pass left the model at the virtual step; a NaN stayed in the method for ever."""
    loop = Loop(name)
    parameters = [p.clone() for p in loop.net.parameters()]
    state = learned(loop.strategy)

    def losses_of(half: int, factor: float = 1.0) -> torch.Tensor:
        if half == 1 and factor == 1:
            raise KeyError("mine")
        return factor * torch.stack(loop.losses(*batch(half))[0])

    with pytest.raises(KeyError, match="mine"):
        loop.strategy.look_ahead(losses_of, list(loop.net.parameters()), 0.05)
    assert all(torch.equal(p, q) for p, q in zip(parameters, loop.net.parameters(), strict=True))
    loop.strategy.look_ahead(lambda half: losses_of(half, NAN), list(loop.net.parameters()), 0.05)
    assert all(torch.equal(p, q) for p, q in zip(parameters, loop.net.parameters(), strict=True))
    assert torch.equal(learned(loop.strategy), state)


@pytest.mark.parametrize("lr", [-1.0, NAN, INF, None, "0.1", True])
def test_looking_ahead_needs_a_learning_rate(lr):
    for strategy in (m.AutoLambda(3), m.MOML(3, look_ahead_lr=None)):
        with pytest.raises(ValueError, match=rf"^lr: .*; {type(strategy).__name__}.look_ahead needs"):
            strategy.look_ahead(lambda half: torch.ones(3), [torch.nn.Parameter(torch.ones(2))], lr)


# --------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("name", READERS)
def test_fractions_are_not_taken_for_percents(name):
    strategy, fractions = build(name), FAIR / 100
    with pytest.raises(ValueError, match=rf"^scores: 0.5, 0.4, 0.3 look like fractions, but {type(strategy).__name__}"):
        strategy.epoch_end(told(scores=fractions))
    strategy.epoch_end(told(scores=fractions, percent=True))  # such as 1 of 1000 classes, at the beginning
    strategy.epoch_start(1, 4)
    strategy.epoch_end(told(scores=fractions))  # the unit is known by now


def test_some_scores_below_one_are_no_fractions():
    cases = [(m.DTP(3), told(scores=scores)) for scores in ((0.5, 60.0, 70.0), (0.0, 0.0, 0.0), (NAN, NAN, NAN))]
    cases.append((m.AMTL(3, [0.5, 0.8, 0.9]), told(scores=(0.1, 0.2, 0.3))))  # both are fractions
    # Errors have any unit.
    cases.append((m.AMTL(3, [60.0, 0.8, 0.9]), told(scores=(0.9, 0.2, 0.3), higher=~UP)))
    for strategy, statistics in cases:
        strategy.epoch_end(statistics)
        assert strategy.calls.epoch_ends == 1


@pytest.mark.parametrize("build", [lambda: m.AMTL(3, [0.6, 0.7, 0.8]), lambda: m.PIVRG(3, [0.6, 0.7, 0.8])])
@pytest.mark.parametrize("percent", [True, False])
def test_single_task_results_in_another_unit_are_refused(build, percent):
    strategy = build()
    strategy.epoch_end(told(scores=(0.0, 0.5, 0.9), percent=percent))  # nothing can be told from these
    strategy.epoch_start(1, 4)
    with pytest.raises(ValueError, match=f"^{strategy.single_task_argument}: 0.6, 0.7, 0.8 look like fractions"):
        strategy.epoch_end(told(scores=(20.0, 30.0, 40.0), percent=percent))


# ------------------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("epoch, epochs, message", [
    (0, 0, "^epochs: 0"), (0, -3, "^epochs: -3"), (-1, 3, "^epoch: -1; epochs are counted from 0"),
    (0.5, 3, "^epoch: 0.5 is not an integer"), (0, 3.0, "^epochs: 3.0 is not"), ("0", 3, "^epoch: '0' is not"),
    (None, 3, "^epoch: None"), (10, 0, "^epochs: 0"), (torch.tensor([1, 2]), 3, "^epoch: "),
])  # fmt: skip
def test_progress_that_cannot_be_is_refused(epoch, epochs, message):
    for name in ("annealed_precision", "pcgrad"):
        with pytest.raises(ValueError, match=message):
            make(name).epoch_start(epoch, epochs)


def test_numpys_and_torchs_integers_are_integers():
    strategy = m.Annealed(2)
    strategy.epoch_start(np.int64(1), torch.tensor(4), seed=np.int64(3))
    assert (strategy.epoch, strategy.epochs) == (1, 4) and type(strategy.epoch) is int
    m.Annealed(2).load_state_dict(strategy.state_dict())  # JSON knows no NumPy
    with pytest.raises(ValueError, match=r"^seed: 0.5 is not an integer"):
        strategy.epoch_start(1, 4, seed=0.5)


@pytest.mark.parametrize("shape", ["cosine", "square", "exponential"])
def test_an_annealed_weight_stays_at_its_end(shape):
    strategy = m.Annealed(2, shape=shape, end=0.1, hold=0.2)
    factors = []
    for epoch in (10, 11, 15, 40):
        strategy.epoch_start(epoch, 10)
        factors.append(strategy.factor())
    assert factors == [factors[0]] * 4
    assert shape == "exponential" or factors[0] == pytest.approx(0.1)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_epoch_ends_once(name):
    """A second call would make DWA's ratio 1, and count an epoch of STCH's warm-up twice."""
    strategy = build(name)
    strategy.epoch_start(0, 4)
    strategy.epoch_end(told())
    state = learned(strategy)
    with pytest.raises(RuntimeError, match=rf"{type(strategy).__name__}: epoch_end was called twice in epoch 0"):
        strategy.epoch_end(told())
    assert torch.equal(learned(strategy), state)
    resumed = build(name)
    resumed.load_state_dict(strategy.state_dict())
    with pytest.raises(RuntimeError, match="twice"):
        resumed.epoch_end(told())
    resumed.epoch_start(1, 4)
    resumed.epoch_end(told())


def test_a_subclass_may_extend_epoch_end():
    class Louder(m.DWA):
        def epoch_end(self, statistics):
            super().epoch_end(statistics)
            self.weights.mul_(2)

    strategy = Louder(3)
    for epoch in range(3):
        strategy.epoch_start(epoch, 4)
        strategy.epoch_end(told())
    assert strategy.weights.tolist() == pytest.approx([2, 2, 2])


def test_a_refused_epoch_end_may_be_called_again():
    strategy = m.DTP(3)
    strategy.epoch_start(0, 4)
    with pytest.raises(ValueError, match="fractions"):
        strategy.epoch_end(told(scores=FAIR / 100))
    strategy.epoch_end(told(scores=FAIR))
    assert (strategy.weights != 1).all()


# ------------------------------------------------------------------------------------------- what a method has learned

KEEPERS = ["db_mtl", "moco", "excess_mtl"]


@pytest.mark.parametrize("name", KEEPERS)
def test_another_number_of_shared_parameters_is_told(name):
    loop = Loop(name)
    loop.fill(0), loop.finish(0)
    state = learned(loop.strategy)
    loop.net.trunk.bias.requires_grad_(False)
    buffer = loop.strategy.lazy[0]
    with pytest.raises(RuntimeError, match=rf"{type(loop.strategy).__name__}: `{buffer}` holds .* make a new strategy"):
        loop.fill(1)
    assert torch.equal(learned(loop.strategy), state)
    loop.net.trunk.bias.requires_grad_(True)
    loop.fill(1)


def trained(name, *, model, method, later=lambda loop: None, steps=5) -> torch.Tensor:
    """The model's parameters after some steps; model and method in these precisions, and `later` after two steps."""
    loop = Loop(name)
    forward = loop.net.forward
    loop.net.forward = lambda x, y, views: forward(x.to(loop.net.trunk.weight), y.to(loop.net.trunk.weight), views)
    loop.net.to(model), loop.strategy.to(method)
    for step in range(steps):
        if step == 2:
            later(loop)
        loop.fill(step), loop.finish(step)
    return torch.cat([p.detach().double().flatten() for p in loop.net.parameters()])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "graddrop"])  # draws in the Jacobian's precision
def test_model_and_method_may_differ_in_precision(name):
    single, double, half = torch.float32, torch.float64, torch.bfloat16
    expected = trained(name, model=double, method=double)
    close = {"atol": 5e-3, "rtol": 1e-3}
    torch.testing.assert_close(trained(name, model=double, method=single), expected, **close)
    for change in (lambda loop: loop.strategy.bfloat16(), lambda loop: loop.net.double()):
        torch.testing.assert_close(trained(name, model=single, method=single, later=change), expected, **close)
    rough = trained(name, model=half, method=half)
    assert rough.isfinite().all() and (rough - expected).abs().max() < 0.3


@pytest.mark.parametrize("name", METHODS)
def test_counters_and_averages_stay_in_single_precision(name):
    """In bfloat16, 256 + 1 is 256, and a moving average stands still."""
    for change in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        strategy = change(make(name).float())
        kept = [*strategy.parameters(), *(b for b in strategy.buffers() if b is not None)]
        assert all(t.dtype == torch.float32 for t in kept if t.is_floating_point())


def test_a_state_of_another_method_or_of_other_tasks_changes_nothing():
    """MoDo's mixture has the shape of SDMGrad's."""
    strategy = m.SDMGrad(["a", "b"])
    strategy.mixture.copy_(torch.tensor([0.9, 0.1]))
    for other, message in ((m.MoDo(["a", "b"]), "of the method SDMGrad; this strategy is MoDo"),
                           (m.SDMGrad(["b", "a"]), "of the tasks a, b, in this order; this strategy has b, a"),
                           (m.SDMGrad(3), "this strategy has 0, 1, 2")):  # fmt: skip
        before = learned(other)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(strategy.state_dict())
        assert torch.equal(learned(other), before)
    old = strategy.state_dict()
    fresh = m.SDMGrad(["a", "b"])
    fresh.load_state_dict(old)
    assert fresh.mixture.tolist() == strategy.mixture.tolist()
