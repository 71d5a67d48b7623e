"""Learning-rate schedules against torch.optim.lr_scheduler. All but the plateau keep no state, as torch's do."""

import json
import re

import pytest
import torch
from torch.optim import lr_scheduler as peers

from mtl.optim.schedules import Constant, Cosine, MultiStep, OneCycle, Plateau, Polynomial, StepDecay

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


# ------------------------------------------------------------------------------------------------------------ plateau

LOSSES = [5.0, 4.0, 4.0, 3.99999, 4.1, 4.2, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, float("nan"), 3.0, 2.0, 2.5, 2.6, 2.7, 2.8]


def plateau_rates(schedule, values, initial=0.1, mains=None):
    found = []
    for value in values:
        schedule.epoch_end(value, mains or {"a_mae": False})
        found.append(schedule.rate(initial, len(found) + 1, 1000))
    return found


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("patience, gamma, min_lr", [(0, 0.5, 0.0), (2, 0.7, 0.03), (1, 0.1, 1e-3)])
def test_plateau_equals_torch(patience, gamma, min_lr, higher):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    mode = "max" if higher else "min"
    peer = peers.ReduceLROnPlateau(optimizer, mode, gamma, patience, min_lr=min_lr, eps=0)
    # Both kinds positive: torch's threshold is relative, and has the wrong sign for negative numbers.
    values = [10 / v if higher else v for v in LOSSES]
    expected = []
    for value in values:
        peer.step(value)
        expected.append(optimizer.param_groups[0]["lr"])
    schedule = Plateau(gamma=gamma, patience=patience, min_lr=min_lr, metric="a_mae")
    found = plateau_rates(schedule, [{"a_mae": v} for v in values], mains={"a_mae": higher})
    assert found == pytest.approx(expected, rel=1e-9)


def test_plateau_follows_the_mean_loss_or_delta_m():
    """Tasks without labels (NaN) count for nothing; a metric where higher is better counts the other way."""
    nan, mains = float("nan"), {"a_mae": False, "b_accuracy": True}
    row = {"a_loss": 1.0, "b_loss": nan, "a_mae": 3.0, "b_accuracy": 60.0}
    assert Plateau()._result(row, mains) == 1.0
    assert Plateau(baselines=[2.0, 80.0])._result(row, mains) == pytest.approx((0.5 + 0.25) / 2)
    assert Plateau(metric="b_accuracy")._result(row, mains) == -60.0
    # A negative result has to fall, too.
    schedule = Plateau(gamma=0.5, patience=0, metric="a_mae")
    assert plateau_rates(schedule, [{"a_mae": v} for v in (-1.0, -0.99995, -1.1)], 1.0) == [1.0, 0.5, 0.5]


def test_plateau_goes_on_from_its_state_and_never_raises_a_rate():
    values = [{"a_loss": v} for v in LOSSES]
    whole, first, second = (Plateau(gamma=0.5, patience=1, min_lr=0.02) for _ in range(3))
    expected = plateau_rates(whole, values)
    found = plateau_rates(first, values[:8])
    second.load_state(json.loads(json.dumps(first.state())))
    assert found + plateau_rates(second, values[8:]) == expected
    assert whole.rate(0.001, 0, 10) == 0.001  # already below min_lr
    whole.load_state({})
    assert whole.rate(0.1, 0, 10) == 0.1


@pytest.mark.parametrize(
    "option, message",
    [
        ("schedule.metric=fine_acc", "schedule.metric=fine_acc: none of fine_loss, fine_accuracy.*fine_accuracy"),
        ("schedule.baselines=[1]", "schedule.baselines: 1 numbers for 2 tasks"),
        ("schedule.baselines=[1,0]", "schedule.baselines: Δm divides by them"),
        ("schedule.gamma=1", "schedule.gamma"),
        ("schedule.interval=step", "schedule.interval"),
    ],
)
def test_wrong_plateaus_are_refused_before_training(smoke, option, message):
    run = smoke("schedule=plateau", option)
    assert run.code == 2 and re.search(message, run.err), run.err


def test_an_interrupted_run_keeps_its_plateau(smoke, tmp_path, monkeypatch):
    """The same rows and the same checkpoint, bit for bit, as a run that was not interrupted."""
    from mtl.engine.learner import Learner

    # A threshold that no run reaches: the rate falls after each epoch.
    options = ("schedule=plateau", "schedule.patience=0", "schedule.metric=fine_accuracy", "trainer.epochs=4",
               "optimizer.lr=1e-6", "data.val_fraction=0.2", "logger=none")  # fmt: skip
    assert smoke(*options).code == 0
    (folder,) = (file.parent for file in (tmp_path / "out").rglob("summary.json"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["lr"] < rows[0]["lr"]
    whole = torch.load(folder / "last.pt", weights_only=True)
    (tmp_path / "out").rename(tmp_path / "whole")
    train, calls = Learner.train_epoch, []

    def stop(self, batches, epoch):
        calls.append(epoch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, batches, epoch)

    monkeypatch.setattr(Learner, "train_epoch", stop)
    assert smoke(*options).code == 130
    assert smoke(*options).code == 0 and calls == [0, 1, 2, 2, 3]
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    assert [{k: v for k, v in row.items() if not k.startswith("time/")} for row in again] == timeless
    resumed = torch.load(folder / "last.pt", weights_only=True)
    assert resumed["schedule"] == whole["schedule"] and resumed["schedule"]["cuts"] > 0
    assert all(torch.equal(resumed["model"][k], v) for k, v in whole["model"].items())
