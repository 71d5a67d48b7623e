"""`mtl.Step` in a stranger's loop: with every method it makes the step that the README's longer loop makes."""

import pytest
import torch
from loops import METHODS, TASKS, Loop, batch
from torch import nn

import mtl
from mtl.losses import Statistics
from mtl.losses.hooks import defines
from mtl.optim.taskwise import MTLIO, AdaTask


def step_of(loop, **options):
    return mtl.Step(loop.strategy, loop.optimizer, loop.net.trunk, loop.net.heads, **options)


def forward_of(loop, x, y):
    return lambda part: mtl.Losses(*loop.net(x[part], y[part], loop.strategy.views))


def equal(one, other, **tolerance):
    torch.testing.assert_close(one.numbers(), other.numbers(), **{"rtol": 0, "atol": 0, "equal_nan": True, **tolerance})


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_loop_by_hand(name):
    """Two epochs, bit for bit: look-ahead, several batches, the second look and the ends of the epochs."""
    by_hand, short = Loop(name), Loop(name)
    step, scores = step_of(short), torch.tensor([50.0, 60.0, 70.0]).double()
    for epoch in range(2):
        by_hand.strategy.epoch_start(epoch, 4)
        step.start_epoch(epoch, 4)
        kept = []
        for k in range(3 * epoch, 3 * epoch + 3):
            by_hand.fill(k)
            by_hand.finish(k)
            info = step(forward_of(short, *batch(k)), 12)
            kept.append(torch.stack([torch.stack(list(one.values)).detach() for one in info.passes]).mean(0))
        higher = torch.ones(TASKS, dtype=torch.bool)
        if defines(short.strategy, "epoch_end"):
            by_hand.strategy.epoch_end(Statistics(torch.stack(kept).mean(0), scores, higher))
        step.end_epoch(scores, higher)
    # The mean losses of an epoch are added up in another order.
    equal(by_hand, short, **({"rtol": 1e-12, "atol": 1e-12} if defines(short.strategy, "epoch_end") else {}))


@pytest.mark.parametrize("name", ["equal", "uncertainty", "pcgrad", "graddrop", "famo"])
def test_a_step_under_a_grad_scaler(name):
    plain, scaled = Loop(name), Loop(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(3):
        for loop, step in ((plain, step_of(plain)), (scaled, step_of(scaled, scaler=scaler))):
            step(forward_of(loop, *batch(k)), 12)
    equal(plain, scaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaler", [False, True])
def test_the_gradient_is_clipped(scaler):
    by_hand, short = Loop("uncertainty"), Loop("uncertainty")
    one = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaler else None
    step = step_of(short, max_norm=0.1, scaler=one)
    for k in range(3):
        by_hand.fill(k)
        everything = [*by_hand.net.parameters(), *by_hand.strategy.parameters()]
        assert nn.utils.clip_grad_norm_(everything, 0.1) > 0.1
        by_hand.optimizer.step()
        step(forward_of(short, *batch(k)), 12)
    equal(by_hand, short, rtol=1e-9, atol=1e-12)


def test_each_task_has_its_own_adam():
    by_hand, short = (Loop("pcgrad", optimizer=AdaTask) for _ in range(2))
    step = step_of(short)
    for k in range(3):
        x, y = batch(k)
        rows = {p: [] for p in by_hand.net.trunk.parameters()}
        for loss in by_hand.net(x, y)[0]:
            for p, g in zip(rows, torch.autograd.grad(loss, list(rows), retain_graph=True), strict=True):
                rows[p].append(g)
        info = by_hand.fill(k)
        weighted = {p: torch.stack(g) * info.weights.view(-1, *[1] * p.dim()) for p, g in rows.items()}
        by_hand.optimizer.step(rows=weighted)
        step(forward_of(short, x, y), 12)
    equal(by_hand, short, rtol=1e-12, atol=1e-12)


def test_the_tasks_take_turns():
    by_hand, short = (Loop("equal", optimizer=MTLIO) for _ in range(2))
    step = step_of(short)
    for k in range(3):
        x, y = batch(k)
        for i in range(TASKS):
            by_hand.optimizer.zero_grad()
            by_hand.net(x, y)[0][i].backward()
            by_hand.optimizer.step_task(i, TASKS)
        assert len(step(forward_of(short, x, y), 12).passes) == TASKS
    equal(by_hand, short)


@pytest.mark.parametrize(
    ("optimizer", "name", "what"), [(MTLIO, "pcgrad", "take turns"), (AdaTask, "graddrop", "one by one")]
)
def test_an_optimizer_that_cannot_work_with_the_method_is_refused(optimizer, name, what):
    loop = Loop(name, optimizer=optimizer)
    with pytest.raises(ValueError, match=what):
        step_of(loop)


def test_an_optimizer_without_the_trunk_or_a_head_is_refused():
    for part in ("trunk", "heads"):
        loop = Loop("pcgrad")
        step = step_of(loop)
        step.optimizer = torch.optim.SGD(getattr(loop.net, part).parameters(), lr=0.1)
        other = {"trunk": "heads", "heads": "shared"}[part]
        with pytest.raises(
            ValueError, match=rf"^optimizer: lacks \d+ trainable parameters of {other}, .*requires_grad_"
        ):
            step(forward_of(loop, *batch(0)), 12)
    loop.net.trunk.requires_grad_(False)
    step(forward_of(loop, *batch(0)), 12)


def test_losses_in_place_of_a_function_are_refused():
    loop = Loop("equal")
    with pytest.raises(TypeError, match=r"^forward: a list, not a function of a part of the batch: step"):
        step_of(loop)(list(forward_of(loop, *batch(0))(slice(0, 12)).values), 12)


@pytest.mark.parametrize("name", ["pcgrad", "dwa", "uncertainty"])
def test_an_absent_task_is_as_in_the_loop_by_hand(name):
    """What it would have returned does not matter, and the method's parameters of it rest."""
    by_hand, short = Loop(name), Loop(name)
    step, labelled = step_of(short), torch.ones(12, TASKS, dtype=torch.bool)
    step(forward_of(short, *batch(0)), 12)
    by_hand.fill(0)
    by_hand.optimizer.step()
    labelled[:, 1] = False
    x, y = batch(1)
    y[:, 1] = 1e6
    before = [p.detach().clone() for p in short.strategy.parameters()]
    step(forward_of(short, x, y), 12, labelled)
    by_hand.fill(1, present=[True, False, True])
    by_hand.optimizer.step()
    torch.testing.assert_close(short.net.state_dict(), by_hand.net.state_dict(), rtol=0, atol=0)
    for old, new in zip(before, short.strategy.parameters(), strict=True):
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])


@pytest.mark.parametrize("name", ["famo", "moml", "auto_lambda"])
def test_passes_that_try_something_out_leave_batch_norm_alone(name):
    loop = Loop(name)
    loop.net.trunk = nn.Sequential(loop.net.trunk, nn.BatchNorm1d(loop.net.trunk.out_features).double())
    loop.optimizer = torch.optim.SGD(loop.net.parameters(), lr=0.05)
    step = step_of(loop)
    for k in range(3):
        step(forward_of(loop, *batch(k)), 12)
    assert loop.net.trunk[1].num_batches_tracked == 3 and loop.net.trunk[1].track_running_stats


def test_the_epochs_mean_losses_count_labelled_samples():
    """Two batches of unequal size; a task that has a label in one of them, and one that has none."""
    seen = []

    class Listens(mtl.losses.Equal):
        def epoch_end(self, statistics):
            seen.append(statistics.losses)

    weight = nn.Parameter(torch.ones(()))
    step = mtl.Step(Listens(3), torch.optim.SGD([weight], lr=0.0), [weight])
    step.start_epoch(0, 1)
    for values, size, here in (((2.0, 4.0, 0.0), 6, (6, 6, 0)), ((5.0, 9.0, 0.0), 2, (2, 0, 0))):
        labelled = torch.stack([torch.arange(size) < count for count in here], 1)
        step(lambda part, values=values: [weight * v for v in values], size, labelled)
    step.end_epoch()
    torch.testing.assert_close(seen[0], torch.tensor([(12.0 + 10.0) / 8, 4.0, torch.nan]), equal_nan=True)
    with pytest.raises(RuntimeError, match="no step was made"):
        step.end_epoch()


def test_a_batch_must_be_large_enough_for_its_parts():
    loop = Loop("sdmgrad")
    with pytest.raises(ValueError, match="size: a batch of 2 samples cannot be divided into 3 parts"):
        step_of(loop)(forward_of(loop, *batch(0, 2)), 2)


def test_generators_of_parameters_last_for_all_steps():
    loop, other = Loop("pcgrad"), Loop("pcgrad")
    heads = {str(i): head.parameters() for i, head in enumerate(loop.net.heads)}
    step = mtl.Step(loop.strategy, loop.optimizer, loop.net.trunk.named_parameters(), heads)
    for k in range(2):
        step(forward_of(loop, *batch(k)), 12)
        step_of(other)(forward_of(other, *batch(k)), 12)
    equal(loop, other)


@pytest.mark.parametrize("name", METHODS)
def test_the_weights_of_a_step_stay_what_they_were(name):
    """ExcessMTL returned its own float64 buffer, and the next step changed what a loop had kept."""
    loop = Loop(name)
    step, kept = step_of(loop), []
    step.start_epoch(0, 1)
    for k in range(3):
        info = step(forward_of(loop, *batch(k)), 12)
        if info.weights is not None:
            kept.append((info.weights, info.weights.clone()))
    assert all(torch.equal(weights, then) for weights, then in kept)
