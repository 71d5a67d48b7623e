"""Learning-rate schedules against torch.optim.lr_scheduler; the schedules themselves keep no state, torch's do."""

import pytest
import torch
from torch.optim import lr_scheduler as oracle

from mtl.optim.schedules import Constant, Cosine, MultiStep, OneCycle, Polynomial, Step

EPOCHS, STEPS = 20, 7
# Each schedule beside torch's: a function of the optimizer and of what torch counts a unit of time, in our epochs.
PAIRS = {
    "constant": (Constant, lambda opt, n, e: oracle.ConstantLR(opt, factor=1.0)),
    "cosine": (Cosine, lambda opt, n, e: oracle.CosineAnnealingLR(opt, T_max=n * e)),
    "cosine_final": (lambda **k: Cosine(final=0.1, **k), lambda opt, n, e: oracle.CosineAnnealingLR(opt, n * e, 0.1)),
    "step": (lambda **k: Step(every=6, gamma=0.3, **k), lambda opt, n, e: oracle.StepLR(opt, 6 * n, gamma=0.3)),
    "multistep": (
        lambda **k: MultiStep(milestones=(4, 9, 10), gamma=0.2, **k),
        lambda opt, n, e: oracle.MultiStepLR(opt, [4 * n, 9 * n, 10 * n], gamma=0.2),
    ),
    "polynomial": (Polynomial, lambda opt, n, e: oracle.PolynomialLR(opt, total_iters=n * e)),
    "polynomial_power": (
        lambda **k: Polynomial(power=0.9, **k),
        lambda opt, n, e: oracle.PolynomialLR(opt, total_iters=n * e, power=0.9),
    ),
}
SCHEDULES = {**{name: make for name, (make, _) in PAIRS.items()}, "one_cycle": OneCycle}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def rates(make, count: int, lr: float = 1.0) -> list[float]:
    """The first `count` rates of a torch scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, result = make(optimizer), []
    for _ in range(count):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("interval, steps", [("epoch", 1), ("step", STEPS)])
def test_schedule_equals_torch(name, interval, steps):
    """Once an epoch and at every step, over the whole run."""
    make, torchs = PAIRS[name]
    schedule = make(interval=interval)
    ours = [schedule(epoch + i / steps, EPOCHS) for epoch in range(EPOCHS) for i in range(steps)]
    assert ours == pytest.approx(rates(lambda opt: torchs(opt, steps, EPOCHS), EPOCHS * steps), rel=1e-9)


@pytest.mark.parametrize("peak, initial, final", [(0.3, 25.0, 1e4), (0.5, 10.0, 100.0), (0.1, 4.0, 1.0)])
def test_one_cycle_equals_torch(peak, initial, final):
    """torch reaches its peak at step pct_start·T − 1 and its end at step T − 1, we at peak·E and E: the same curve for
    E = T − 1 and pct_start = (peak·E + 1) / T."""
    total = EPOCHS * STEPS + 1
    share = (peak * (total - 1) + 1) / total
    expected = rates(
        lambda opt: oracle.OneCycleLR(opt, 1.0, total, pct_start=share, div_factor=initial, final_div_factor=final,
                                      cycle_momentum=False, three_phase=False), total - 1)  # fmt: skip
    schedule = OneCycle(peak=peak, initial_divisor=initial, final_divisor=final)
    assert [schedule(i / STEPS, EPOCHS) for i in range(total - 1)] == pytest.approx(expected, rel=1e-9)
    assert schedule(peak * EPOCHS, EPOCHS) == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # SequentialLR restarts its second part by a deprecated call
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("warmup", [1, 5])
def test_warmup_by_epochs_equals_torch(name, warmup):
    """LinearLR from 1/(w + 1), followed by the schedule over the epochs that are left."""
    make, torchs = PAIRS[name]

    def sequence(opt):
        linear = oracle.LinearLR(opt, 1 / (warmup + 1), 1.0, total_iters=warmup)
        return oracle.SequentialLR(opt, [linear, torchs(opt, 1, EPOCHS - warmup)], [warmup])

    schedule = make(warmup_epochs=warmup)
    assert [schedule(k, EPOCHS) for k in range(EPOCHS)] == pytest.approx(rates(sequence, EPOCHS), rel=1e-9)


@every_schedule
def test_warmup_by_steps_is_linear_from_zero_and_continuous(name):
    """progress / w times the first rate of the schedule, which takes over where the line ends."""
    warmup = 3
    schedule, plain = SCHEDULES[name](interval="step", warmup_epochs=warmup), SCHEDULES[name](interval="step")
    first = plain(0, EPOCHS - warmup)
    ours = [schedule(i / STEPS, EPOCHS) for i in range(warmup * STEPS)]
    assert ours == pytest.approx([first * i / (warmup * STEPS) for i in range(warmup * STEPS)])
    assert schedule(warmup - 1e-9, EPOCHS) == pytest.approx(schedule(warmup, EPOCHS), rel=1e-6)
    after = [i / STEPS for i in range((EPOCHS - warmup) * STEPS)]
    assert [schedule(warmup + p, EPOCHS) for p in after] == pytest.approx([plain(p, EPOCHS - warmup) for p in after])


@every_schedule
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_no_epoch_trains_at_rate_zero(name, warmup):
    """By epochs, neither the first nor the last one; the warm-up climbs by equal steps up to the schedule's start."""
    schedule = SCHEDULES[name](interval="epoch", warmup_epochs=warmup)
    ours = [schedule(k, EPOCHS) for k in range(EPOCHS)]
    assert min(ours) > 0 and max(ours) <= 1
    climb = [b - a for a, b in zip([0.0, *ours[:warmup]], ours[: warmup + 1], strict=True)]
    assert climb == pytest.approx([ours[warmup] / (warmup + 1)] * (warmup + 1))
