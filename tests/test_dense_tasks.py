"""Losses and metrics of maps against torch on the labelled pixels alone, scikit-learn and NumPy; the rendered rooms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtl.data.check import check_loaded
from mtl.data.columns import Split
from mtl.data.rooms import FOCAL, Rooms, draw_rooms, render
from mtl.errors import SetupError
from mtl.metrics.base import Metric
from mtl.metrics.dense import Angles, ConfusionMatrix, DepthErrors
from mtl.metrics.tally import Tally
from mtl.random import stream
from mtl.tasks import Depth, Normals, Segmentation
from mtl.views import Flip

N, C, H, W = 6, 5, 7, 9
TASKS = {"segmentation": Segmentation("s", C), "depth": Depth("d"), "normals": Normals("n")}
NONE = {"segmentation": (-100,), "depth": (0.0, math.nan), "normals": (0.0, math.nan)}
every_kind = pytest.mark.parametrize("kind", TASKS)


def make(kind: str, share: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions (a leaf), labels, and (N, H, W) which pixels are labelled; the last image has none."""
    draws = torch.Generator().manual_seed(1)
    known = torch.rand(N, H, W, generator=draws) < share
    known[-1] = False
    if kind == "segmentation":
        target = torch.randint(C, (N, H, W), generator=draws, dtype=torch.int8)
    elif kind == "depth":
        target = torch.rand(N, H, W, generator=draws) * 9 + 0.5
    else:
        target = nn.functional.normalize(torch.randn(N, H, W, 3, generator=draws), dim=-1)
    for k, none in enumerate(NONE[kind]):  # all kinds of no label, in turns
        target[~known & (torch.arange(N) % len(NONE[kind]) == k)[:, None, None]] = none
    return torch.randn(N, TASKS[kind].outputs, H, W, generator=draws).requires_grad_(), target, known


def by_hand(kind: str, prediction: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """() the mean loss of the pixels that are labelled, picked out one by one."""
    flat, labels = prediction.movedim(1, -1)[known], target[known]
    if kind == "segmentation":
        return nn.CrossEntropyLoss()(flat, labels.long())
    if kind == "depth":
        return nn.L1Loss()(flat.squeeze(1), labels)
    return (1 - nn.CosineSimilarity()(flat, labels)).mean()


# -------------------------------------------------------------------------------------------------------------- losses


@every_kind
@pytest.mark.parametrize("share", [0.02, 0.6, 1.1])
def test_loss_and_gradient_are_of_the_labelled_pixels_alone(kind, share):
    task, (prediction, target, known) = TASKS[kind], make(kind, share)
    loss, expected = task.loss(prediction, target), by_hand(kind, prediction, target, known)
    found, wanted = (torch.autograd.grad(value, prediction)[0] for value in (loss, expected))
    torch.testing.assert_close((loss, found), (expected, wanted))
    assert not found.movedim(1, -1)[~known].any()
    assert torch.equal(task.units(target), known.sum((1, 2))) and task.count(target) == known.sum()
    losses = task.criterion(prediction, target)
    assert losses.shape == (N,) and losses[-1] == 0
    torch.testing.assert_close(losses.sum(), expected * known.sum())


@every_kind
def test_what_is_predicted_without_a_label_does_not_matter(kind):
    """NaN and infinity there give the same loss and gradient, and exactly 0 there."""
    task, (prediction, target, known) = TASKS[kind], make(kind)
    (expected,) = torch.autograd.grad(task.loss(prediction, target), prediction)
    for value in (math.nan, math.inf, 0.0):
        wild = prediction.detach().movedim(1, -1).clone()
        wild[~known] = value
        wild = wild.movedim(-1, 1).requires_grad_()
        loss = task.loss(wild, target)
        assert loss == task.loss(prediction, target)
        torch.testing.assert_close(torch.autograd.grad(loss, wild)[0], expected, rtol=0, atol=0)


@every_kind
def test_no_label_at_all_is_a_differentiable_zero(kind):
    task, (prediction, target, _) = TASKS[kind], make(kind, share=0.0)
    loss = task.loss(prediction, target)
    assert loss == 0 and (torch.autograd.grad(loss, prediction)[0] == 0).all() and not task.labelled(target).any()


def test_a_predicted_normal_of_length_zero_has_a_finite_gradient():
    """Loss 1; towards the label, at most a thousand long. From a thousandth on, the length does not matter."""
    task, (_, target, known) = TASKS["normals"], make("normals")
    zeros = torch.zeros(N, 3, H, W, requires_grad=True)
    losses = task.criterion(zeros, target)
    torch.testing.assert_close(losses, known.sum((1, 2)).float())
    (gradient,) = torch.autograd.grad(losses.sum(), zeros)
    torch.testing.assert_close(gradient.norm(dim=1), 1000.0 * known)
    prediction = nn.functional.normalize(make("normals")[0], dim=1)
    torch.testing.assert_close(task.loss(0.002 * prediction, target), task.loss(50 * prediction, target))


def test_a_prediction_of_another_size_is_refused():
    for kind, task in TASKS.items():
        prediction, target, _ = make(kind)
        shapes = (rf"\(6, {task.outputs}, 7, {width}\)" for width in (9, 8))
        wanted = "{} needs a map {} of predictions, but the model predicts the shape {}".format(task.name, *shapes)
        with pytest.raises(ValueError, match=wanted):
            task.loss(prediction[..., :8], target)


WRONG = [
    ("segmentation", lambda maps: maps.fill_(6), r"sample 0 has the label 6 .*classes from 0 to 5 .*, -100 where"),
    ("segmentation", lambda maps: maps.float(), r"dtype float32"),
    ("segmentation", lambda maps: maps[..., None], r"shape .*8, 12, 1\); drop the last dimension with squeeze\(-1\)"),
    ("depth", lambda maps: -maps, r"has the label -\d.* depths from 0"),
    ("depth", lambda maps: maps / 0, r"has the label inf"),
    ("depth", lambda maps: maps[..., None], r"squeeze\(-1\); a map \(N, H, W\) of depths"),
    ("normals", lambda maps: 127 * maps, r"unit vectors"),
    ("normals", lambda maps: maps.index_fill(3, torch.tensor(1), math.nan), r"unit vectors"),
    ("normals", lambda maps: maps[..., :2], r"shape \(4, 8, 12, 2\); a map"),
]  # fmt: skip


@pytest.mark.parametrize("name, damage, message", WRONG)
def test_wrong_labels_are_refused_at_loading(name, damage, message):
    rooms = Rooms(train_size=4, test_size=4, height=8, width=12)
    loaded = rooms.load()
    check_loaded(rooms, loaded)
    columns = loaded["train"].columns
    spoilt = {**loaded, "train": Split({**columns, name: damage(columns[name].clone())})}
    with pytest.raises(SetupError, match=message):
        check_loaded(rooms, spoilt)


# ------------------------------------------------------------------------------------------------------------- metrics


def measured(metric: Metric, prediction: Tensor, target: Tensor, order: Tensor, batch: int) -> dict[str, float]:
    tally = Tally()
    for index in order.split(batch):
        tally.update("x", metric, prediction[index].detach(), target[index])
    return metric.compute(tally.read()["x"])


def oracle(kind: str, prediction: Tensor, target: Tensor, known: Tensor) -> dict[str, float]:
    flat, labels = (x.detach().double().numpy() for x in (prediction.movedim(1, -1)[known], target[known]))
    if kind == "segmentation":
        classes = flat.argmax(1)
        return {
            "miou": 100 * jaccard_score(labels, classes, average="macro"),  # over the labels in either of both
            "pixel_accuracy": 100 * accuracy_score(labels, classes),
        }
    if kind == "depth":
        error = np.abs(flat[:, 0] - labels)
        return {"abs_err": error.mean(), "rel_err": (error / labels).mean()}
    cosines = (flat * labels).sum(1) / np.linalg.norm(flat, axis=1) / np.linalg.norm(labels, axis=1)
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    shares = {str(int(limit)): 100 * (angles < limit).mean() for limit in (11.25, 22.5, 30)}
    return {"mean": angles.mean(), "median": np.median(angles), **shares}


@every_kind
@pytest.mark.parametrize("share", [0.02, 0.6, 1.1])
def test_metrics_equal_scikit_learn_and_numpy(kind, share):
    """In one batch, in uneven ones, and in any order; the main score comes first."""
    task, (prediction, target, known) = TASKS[kind], make(kind, share)
    if kind == "normals":  # near the truth, as after training
        prediction = target.nan_to_num(0.0).movedim(-1, 1) * 3 + 0.7 * prediction.detach()
    (metric,) = task.metrics
    wanted, tolerance = oracle(kind, prediction, target, known), 0.006 if kind == "normals" else 1e-5
    orders = [torch.arange(N), torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    found = [measured(metric, prediction, target, order, batch) for order in orders for batch in (1, 4, N)]
    assert list(found[0]) == [score.name for score in task.scores] == list(wanted)
    for values in found:
        assert values == pytest.approx(wanted, rel=1e-6, abs=tolerance) and values == pytest.approx(found[0])


@every_kind
def test_states_add_up_and_are_kept_in_place(kind):
    prediction, target, _ = make(kind)
    (metric,) = TASKS[kind].metrics
    states = [metric.zero() for _ in range(3)]
    places = [state.data_ptr() for state in states]
    for state, part in zip(states, (slice(None), slice(2), slice(2, None)), strict=True):
        metric.update(state, prediction.detach()[part], target[part])
    torch.testing.assert_close(states[0], states[1] + states[2])
    assert places == [state.data_ptr() for state in states] and states[0].any()
    metric.update(states[0], prediction.detach()[-1:], target[-1:])  # without a label
    torch.testing.assert_close(states[0], states[1] + states[2])
    assert all(math.isnan(value) for value in metric.compute(metric.zero().double()).values())


BATCHES = ((0, 1), (1, 4), (4, N))  # uneven; the last image of the last batch has no label


@pytest.mark.parametrize("kind", ["depth", "normals"])
def test_a_mean_over_batches_is_the_published_codes(kind):
    """Each batch counts alike, whatever its size; one without a label counts nothing. Two halves add up."""
    prediction, target, known = make(kind)
    metric = replace(TASKS[kind], reduction="batch_mean").metrics[0]
    values = [oracle(kind, prediction[a:b], target[a:b], known[a:b]) for a, b in BATCHES]
    wanted = {name: np.mean([v[name] for v in values]) for name in values[0]}
    whole, first, second = metric.zero(), metric.zero(), metric.zero()
    for (a, b), half in zip((*BATCHES, (N - 1, N)), (first, second, second, first), strict=True):
        for state in (whole, half):
            with NoWaiting():
                metric.update(state, prediction.detach()[a:b], target[a:b])
    found = metric.compute(whole.double())
    assert found == pytest.approx(wanted, abs=0.006) and metric.compute(first + second) == pytest.approx(found)
    pooled = oracle(kind, prediction, target, known)
    assert any(abs(found[name] - pooled[name]) > 1e-3 for name in pooled)  # the two reductions do differ
    assert all(math.isnan(value) for value in metric.compute(metric.zero()).values())
    metric.update(whole, prediction.detach() * math.nan, target)  # a network that has diverged
    assert kind == "normals" or math.isnan(metric.compute(whole)["abs_err"])


def test_the_reduction_is_an_option_of_the_data_which_pools_by_default():
    tasks = Rooms(reduction="batch_mean").tasks
    assert [type(t.metrics[0]).__name__ for t in tasks] == ["ConfusionMatrix", "BatchMean", "BatchMean"]
    assert [t.scores for t in tasks] == [t.scores for t in Rooms().tasks]


class NoWaiting(TorchDispatchMode):
    """Refuses what the host waits for on a GPU: numbers, and sizes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "item"), name
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), "boolean index"
        return function(*args, **(kwargs or {}))


@every_kind
def test_neither_loss_nor_metric_waits_for_the_device(kind):
    task, (prediction, target, _) = TASKS[kind], make(kind)
    (metric,) = task.metrics
    state = metric.zero()
    with NoWaiting():
        task.loss(prediction, target).backward()
        metric.update(state, prediction.detach(), target)


def test_absent_classes():
    """A class that is nowhere is left out; one that is only predicted counts 0."""
    target = torch.tensor([[[0, 0, 1, -100]]])
    classes = torch.tensor([[[0, 3, 1, 4]]])
    metric, prediction = ConfusionMatrix(5), nn.functional.one_hot(classes, 5).movedim(-1, 1).float()
    state = metric.zero()
    metric.update(state, prediction, target)
    assert state.nonzero().tolist() == [[0, 0], [0, 3], [1, 1]] and state.sum() == 3  # labels by predictions
    assert metric.compute(state) == pytest.approx({"miou": 100 * (0.5 + 1 + 0) / 3, "pixel_accuracy": 200 / 3})


def test_angles_at_the_ends():
    """Right: 0; opposite: 180; zeros: 90; NaN: 180. The limits belong to no share."""
    metric, up = Angles(), torch.tensor([0.0, 0, 1])
    angle = torch.tensor([11.24, 11.26, 22.49, 22.51, 29.99, 30.01]).deg2rad()
    tilted = torch.stack([angle.sin(), 0 * angle, angle.cos()], 1)
    vectors = torch.stack([up, -2 * up, 0 * up, up * math.nan, *tilted])
    state = metric.zero()
    metric.update(state, vectors.T[None, :, None], up.expand(1, 1, 10, 3))
    values = metric.compute(state)
    assert state[[0, -1, 9000]].tolist() == [1, 2, 1] and state.sum() == 10
    assert [values[k] for k in ("11", "22", "30")] == pytest.approx([20, 40, 60])
    assert values["median"] == pytest.approx((22.51 + 29.99) / 2, abs=0.006)


def test_a_depth_of_no_number_spoils_the_mean():
    """A network that has diverged is not to look good."""
    metric, state = DepthErrors(), DepthErrors().zero()
    metric.update(state, torch.full((1, 1, 2, 2), math.nan), torch.ones(1, 2, 2))
    assert all(math.isnan(value) for value in metric.compute(state).values())


# --------------------------------------------------------------------------------------------------------------- rooms


def rays(height: int, width: int) -> Tensor:
    x, y = ((torch.arange(n) + 0.5 - n / 2) / (FOCAL * max(height, width)) for n in (width, height))
    return torch.stack(torch.broadcast_tensors(x[None], y[:, None], torch.ones(1)), -1)


def from_depth(depth: Tensor) -> Tensor:
    """(N, H − 2, W − 2, 3) normals towards the camera, from the differences of the points that the depths tell."""
    points = depth[..., None] * rays(*depth.shape[1:])
    right, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    return nn.functional.normalize(torch.linalg.cross(down, right), dim=-1)


def neighbours(values: Tensor) -> list[Tensor]:
    return [values[:, 1:-1, 2:], values[:, 1:-1, :-2], values[:, 2:, 1:-1], values[:, :-2, 1:-1]]


@pytest.fixture(scope="module")
def maps() -> dict[str, Tensor]:
    return render(draw_rooms(16, stream(0, "rooms", "test")), 60, 80)


@pytest.mark.parametrize("flipped", [False, True])
def test_normals_are_those_of_the_depth(maps, flipped):
    """On planes to rounding; on balls nearly so. The mirror images of a depth and of its normals belong together."""
    depth, normals, kind = maps["depth"], maps["normals"], maps["segmentation"]
    if flipped:
        view, rows = Flip().draw(16, (60, 80), lambda name: stream(1, name)), torch.arange(16)
        assert 0 < (view.a < 0).sum() < 16
        depth, normals, kind = (
            TASKS[t].moves(x, rows, view) for t, x in (("depth", depth), ("normals", normals), ("segmentation", kind))
        )
    found, normal = from_depth(depth), normals[:, 1:-1, 1:-1]
    cosine = (found * normal).sum(-1)
    plane = torch.stack([(other == normal).all(-1) for other in neighbours(normals)]).all(0)
    alike = torch.stack([(other - depth[:, 1:-1, 1:-1]).abs() < 0.15 for other in neighbours(depth)]).all(0)
    assert plane.float().mean() > 0.7 and (plane & alike).float().mean() > 0.65
    assert cosine[plane & alike].quantile(0.001) > 0.999  # the rest: equal faces of two boxes, one before the other
    ball = torch.stack([other == 5 for other in neighbours(kind)]).all(0)
    assert ball.sum() > 200 and cosine[ball].quantile(0.1) > 0.95


def test_geometry_of_the_rooms(maps):
    """Unit normals, all towards the camera; the floor is a plane below it, and no floor lies above the horizon."""
    towards = (maps["normals"] * rays(60, 80)).sum(-1)
    assert (towards < 1e-5).all()
    torch.testing.assert_close(maps["normals"].norm(dim=-1), torch.ones(16, 60, 80))
    for kind, low, high in ((0, 1.1, 1.8), (1, 0.4, 2.2)):
        surface = maps["segmentation"] == kind
        distance = -(maps["depth"] * towards)  # of the pixel's plane from the camera
        for one in (d[s] for d, s in zip(distance, surface, strict=True) if s.any()):
            assert low < one.min() and one.max() < high and one.max() - one.min() < 1e-3
    assert set(maps["segmentation"].unique().tolist()) == {0, 1, 2, 3, 4, 5}
    assert (maps["depth"] > 0.2).all() and (maps["depth"] < 12).all()


def test_rooms_are_the_same_whatever_their_number():
    few, many, wide = (
        Rooms(train_size=n, test_size=2, height=8, width=w).load() for n, w in ((3, 12), (40, 12), (3, 20))
    )
    for name, column in few["train"].columns.items():
        assert torch.equal(column.nan_to_num(9), many["train"].columns[name][:3].nan_to_num(9)), name
    assert not torch.equal(few["train"].columns["image"][:2], few["test"].columns["image"])
    assert wide["train"].columns["normals"].shape == (3, 8, 20, 3)
    columns = many["train"].columns
    holes = columns["depth"].isnan()
    assert torch.equal(holes, columns["normals"].isnan().all(-1)) and 0.02 < holes.float().mean() < 0.04
    assert 0.02 < (columns["segmentation"] == -100).float().mean() < 0.04
