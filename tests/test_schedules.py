"""Learning-rate schedules, which keep no state, against torch.optim.lr_scheduler, which does."""

import pytest
import torch
from torch.optim import lr_scheduler as peers

from mtl.optim.schedules import Constant, Cosine, MultiStep, OneCycle, Polynomial, StepDecay

E, STEPS = 20, 7  # epochs of a run, steps of an epoch
# Class, arguments, and torch's scheduler over e epochs of n calls.
CASES = {
    "constant": (Constant, {}, lambda o, e, n: peers.ConstantLR(o, factor=1.0)),
    "cosine": (Cosine, {}, lambda o, e, n: peers.CosineAnnealingLR(o, e * n)),
    "cosine_final": (Cosine, {"final": 0.1}, lambda o, e, n: peers.CosineAnnealingLR(o, e * n, eta_min=0.1)),
    "step": (StepDecay, {"every": 6, "gamma": 0.3}, lambda o, e, n: peers.StepLR(o, 6 * n, gamma=0.3)),
    "multistep": (MultiStep, {"milestones": (4, 9)}, lambda o, e, n: peers.MultiStepLR(o, [4 * n, 9 * n], gamma=0.2)),
    "polynomial": (Polynomial, {"power": 0.9}, lambda o, e, n: peers.PolynomialLR(o, e * n, power=0.9)),
}  # fmt: skip
SCHEDULES = {**{name: case[:2] for name, case in CASES.items()}, "one_cycle": (OneCycle, {})}


def make(name: str, **arguments):
    cls, own = SCHEDULES[name]
    return cls(**own, **arguments)


def rates(peer, count: int) -> list[float]:
    """The first `count` rates of a torch scheduler over a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, result = peer(optimizer), []
    for _ in range(count):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("interval, n", [("epoch", 1), ("step", STEPS)])
def test_schedule_equals_torch(name, interval, n):
    """Once an epoch and at every step, over the whole run."""
    schedule = make(name, interval=interval)
    ours = [schedule(epoch + i / n, E) for epoch in range(E) for i in range(n)]
    assert ours == pytest.approx(rates(lambda o: CASES[name][2](o, E, n), E * n), rel=1e-9)


@pytest.mark.parametrize("peak, initial, final", [(0.3, 25.0, 1e4), (0.5, 10.0, 100.0), (0.1, 4.0, 1.0)])
def test_one_cycle_equals_torch(peak, initial, final):
    """torch has its peak at step pct_start·T − 1 and its end at step T − 1, we at steps peak·N and N of N: the same
    curve for N = T − 1 and pct_start = (peak·N + 1) / T."""
    n = E * STEPS
    options = {"pct_start": (peak * n + 1) / (n + 1), "div_factor": initial, "final_div_factor": final}
    expected = rates(lambda o: peers.OneCycleLR(o, 1.0, n + 1, cycle_momentum=False, three_phase=False, **options), n)
    schedule = OneCycle(peak=peak, initial_divisor=initial, final_divisor=final)
    assert [schedule(i / STEPS, E) for i in range(n)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")  # SequentialLR restarts its second part by a deprecated call
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("warmup", [1, 5])
def test_warmup_by_epochs_equals_torch(name, warmup):
    """LinearLR from 1/(w + 1), then the schedule over the epochs that are left."""

    def peer(o):
        linear = peers.LinearLR(o, 1 / (warmup + 1), total_iters=warmup)
        return peers.SequentialLR(o, [linear, CASES[name][2](o, E - warmup, 1)], [warmup])

    schedule = make(name, warmup_epochs=warmup)
    assert [schedule(k, E) for k in range(E)] == pytest.approx(rates(peer, E), rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_by_steps_is_a_line_from_zero_to_the_schedule(name):
    """progress / w of the schedule's first rate, without a jump where the schedule takes over."""
    schedule, plain = make(name, interval="step", warmup_epochs=3), make(name, interval="step")
    progress = [i / STEPS for i in range(E * STEPS)]
    expected = [plain(0, E - 3) * p / 3 if p < 3 else plain(p - 3, E - 3) for p in progress]
    assert [schedule(p, E) for p in progress] == pytest.approx(expected)
    assert schedule(3 - 1e-9, E) == pytest.approx(schedule(3, E), rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_no_epoch_trains_at_rate_zero(name, warmup):
    """By epochs; the warm-up climbs by equal steps up to the schedule's start."""
    schedule = make(name, interval="epoch", warmup_epochs=warmup)
    ours = [schedule(k, E) for k in range(E)]
    assert min(ours) > 0 and max(ours) <= 1
    assert ours[: warmup + 1] == pytest.approx([ours[warmup] * (k + 1) / (warmup + 1) for k in range(warmup + 1)])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_past_its_end_a_schedule_stays_there(name, warmup):
    """A cosine would rise again, and a root of a negative number is complex."""
    schedule = make(name, warmup_epochs=warmup)
    assert [schedule(p, E) for p in (E + 0.5, E + 1, 3 * E)] == [schedule(E, E)] * 3
    for progress, epochs, message in ((-1, E, "^progress: -1"), (0, 0, "^epochs: 0"), (2, warmup, "^epochs: ")):
        with pytest.raises(ValueError, match=message):
            schedule(progress, epochs)
