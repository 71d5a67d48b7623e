"""Losses and metrics of tasks against torch and scikit-learn; missing labels; accumulation over batches."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import nn

from mtl.data.check import check_loaded
from mtl.data.columns import Split
from mtl.data.inputs import Numbers
from mtl.errors import SetupError
from mtl.metrics.base import Metric, Score
from mtl.metrics.labels import Accuracy, MeanAbsoluteError
from mtl.metrics.tally import Tally
from mtl.tasks import Classification, Regression, Task

N, CLASSES = 53, 7
MISSING = {"classification": -100, "regression": math.nan}
every_kind = pytest.mark.parametrize("kind", MISSING)


def make(kind: str, absent: int = 0):
    """A task, predictions (a leaf), targets of which `absent` in five are missing, and the mask of those present."""
    generator = torch.Generator().manual_seed(3)
    present = torch.arange(N) % 5 >= absent
    if kind == "classification":
        task, target = Classification("a", CLASSES), torch.randint(CLASSES, (N,), generator=generator)
    else:
        task, target = Regression("b"), torch.randn(N, generator=generator)
    target[~present] = MISSING[kind]
    return task, torch.randn(N, task.outputs, generator=generator, requires_grad=True), target, present


@every_kind
@pytest.mark.parametrize("absent", [0, 2])
def test_loss_equals_torch_on_the_labelled(kind, absent):
    """Mean cross-entropy and smooth L1 loss, value and gradient; samples without a label get no gradient."""
    task, prediction, target, present = make(kind, absent)
    loss = task.loss(prediction, target)
    (grad,) = torch.autograd.grad(loss, prediction)
    if kind == "classification":
        expected = nn.CrossEntropyLoss()(prediction[present], target[present])
    else:
        expected = nn.SmoothL1Loss()(prediction[present], target[present][:, None])
    torch.testing.assert_close((loss, grad), (expected, *torch.autograd.grad(expected, prediction)))
    assert not grad[~present].any() and grad[present].any()
    assert torch.equal(task.labelled(target), present) and task.count(target) == present.sum()
    assert torch.equal(task.units(target), present.long())
    losses = task.criterion(prediction, target)
    assert losses.shape == (N,) and not losses[~present].any()


def in_place(metric: Metric, prediction, target) -> torch.Tensor:
    """The state after one batch."""
    state = metric.zero()
    assert metric.update(state, prediction.detach(), target) is None
    return state


def check(task: Task, target: torch.Tensor) -> None:
    """What loading says of the labels of a training split."""
    split = Split({"x": torch.zeros(len(target), 1), task.column: target})
    try:
        check_loaded(
            SimpleNamespace(inputs={"x": Numbers((1,))}, tasks=(task,), augment=()), {"train": split, "test": split}
        )
    except SetupError as error:
        raise ValueError(str(error)) from error


@every_kind
def test_no_label_at_all_is_a_differentiable_zero(kind):
    """Loss 0 and gradient 0, not NaN."""
    task, prediction, target, _ = make(kind, absent=5)
    loss = task.loss(prediction, target)
    (grad,) = torch.autograd.grad(loss, prediction)
    assert task.count(target) == 0 and loss == 0 and (grad == 0).all()


@every_kind
@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("batch", [1, 10, N])
def test_metric_over_batches_equals_scikit_learn_over_samples(kind, absent, batch):
    """States and counts add up to the figure of all labelled samples, batches without any label included."""
    task, prediction, target, present = make(kind, absent)
    prediction, (metric,) = prediction.detach(), task.metrics
    pairs = list(zip(prediction.split(batch), target.split(batch), strict=True))
    states = [in_place(metric, *pair) for pair in pairs]
    together = metric.zero()
    for pair in pairs:
        metric.update(together, *pair)
    if kind == "classification":
        expected = 100 * sklearn_metrics.accuracy_score(target[present], prediction[present].argmax(1))
    else:
        expected = sklearn_metrics.mean_absolute_error(target[present], prediction[present])
    (score,) = metric.scores
    for state in (together, sum(states)):  # batch after batch, and states of parts that are added up
        assert metric.compute(state) == pytest.approx({score.name: expected}, rel=1e-6)
    assert score.higher_is_better is (kind == "classification")
    assert sum(task.count(t) for _, t in pairs) == present.sum()


@every_kind
def test_complete_labels_give_the_plain_mean_bit_for_bit(kind):
    """Loss and gradient, for every batch size: counting labels costs no rounding."""
    for size in (1, 2, 3, 7, 30, 49, 53):
        task, prediction, target, _ = make(kind)
        prediction, target = prediction[:size].detach().requires_grad_(), target[:size]
        loss, plain = task.loss(prediction, target), task.criterion(prediction, target).mean()
        assert torch.equal(loss, plain)
        assert torch.equal(*(torch.autograd.grad(x, prediction)[0] for x in (loss, plain)))


@pytest.mark.parametrize("kind, dtypes", [
    ("classification", (torch.int32, torch.int16, torch.uint8)),
    ("regression", (torch.float64, torch.float16, torch.int64)),
])  # fmt: skip
def test_labels_of_other_dtypes_are_the_same_labels(kind, dtypes):
    task, prediction, target, _ = make(kind)
    for dtype in dtypes:
        other = target.to(dtype)
        check(task, other)
        same, (metric,) = other.to(target.dtype), task.metrics
        loss = task.loss(prediction, other)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, task.loss(prediction, same), rtol=0, atol=0)
        torch.testing.assert_close(in_place(metric, prediction, other), in_place(metric, prediction, same))


def test_class_156_as_uint8_is_no_missing_label():
    """-100 is 156 in eight bits."""
    task, target = Classification("a", 200), torch.tensor([156, 3], dtype=torch.uint8)
    prediction = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    check(task, target)
    assert task.count(target) == 2
    assert task.loss(prediction, target) == nn.CrossEntropyLoss()(prediction, target.long())


@pytest.mark.parametrize("label, message", [
    ([0, 3], r"sample 1 has the label 3; a class must be an integer from 0 to 2, or -100"),
    ([-100, -1, 5], r"sample 1 has the label -1 \(2 labels are wrong\)"),
    ([0.0, 1.0], r"dtype float32; .*\.long\(\)"), ([[0], [1]], r"shape \(2, 1\); .* \(2,\), .* squeeze\(1\)"),
    ([[1, 0, 0], [0, 1, 0]], r"shape \(2, 3\); an integer for each sample, \(2,\)"),
    ([1j, 0j], "dtype complex64"),
])  # fmt: skip
def test_wrong_classes_are_named(label, message):
    check(Classification("a", 3), torch.tensor([0, 1, 2, -100]))
    with pytest.raises(ValueError, match=message):
        check(Classification("a", 3), torch.tensor(label))


@pytest.mark.parametrize("label, message", [
    (torch.tensor([0.0, math.inf]), r"sample 1 has the label inf; a number must be finite, or NaN"),
    (torch.tensor([math.nan, -math.inf]), "sample 1 has the label -inf"),
    (torch.tensor([1e300], dtype=torch.float64), r"sample 0 has the label 1e\+300"),
    (torch.zeros(4, 1), r"shape \(4, 1\); .* squeeze\(1\)"), (torch.tensor([1j]), "dtype complex64"),
])  # fmt: skip
def test_wrong_numbers_are_named(label, message):
    check(Regression("b"), torch.tensor([0.0, math.nan, -3.0]))
    with pytest.raises(ValueError, match=message):
        check(Regression("b"), label)


@pytest.mark.parametrize("returned", [
    lambda p, t: (p - t).square(),  # (N, N) by broadcasting
    lambda p, t: (p.squeeze(1) - t).square().mean(), lambda p, t: (p - t[:, None]).square(),
])  # fmt: skip
def test_a_criterion_returns_one_loss_for_each_sample(returned):
    @dataclass(frozen=True)
    class Own(Regression):
        def criterion(self, prediction, target):
            return returned(prediction, target)

    with pytest.raises(ValueError, match=r"Own.criterion returned the shape .* has the shape \(5,\)"):
        Own("b").loss(torch.randn(5, 1), torch.randn(5))
    with pytest.raises(ValueError, match=r"b is one number .* predicts the shape \(5, 2\)"):
        Regression("b", 2).loss(torch.randn(5, 2), torch.randn(5))


def test_a_metric_of_no_sample_is_nan():
    for metric in (Accuracy(), MeanAbsoluteError()):
        assert all(map(math.isnan, metric.compute(metric.zero()).values()))


def test_a_tally_is_no_alias_of_what_was_added():
    """A method may log a buffer, which it changes later in place; counts beyond 2^24 stay exact."""
    tally, buffer = Tally(), torch.tensor([1.0, 2.0])
    tally.add("weights", buffer)
    buffer += 10
    tally.add("weights", buffer)
    tally.add("count", torch.tensor(2**24 + 1))
    buffer += 100
    read = tally.read()
    assert read["weights"].tolist() == [12, 14] and read["count"].item() == 2**24 + 1
    assert buffer.tolist() == [111, 112]


def test_what_a_task_or_metric_says_no_more_is_named_with_what_to_write():
    """When the class is made, so that no old method is left out without a word."""
    for name, now in (("labelled", "units"), ("head", "decoder"), ("check", "wrong")):
        with pytest.raises(TypeError, match=rf"^Old defines {name}, .* write .*{now}\(t"):
            type("Old", (Regression,), {name: lambda self, x: x})
    for attributes in ({"name": "f1", "unit": "%"}, {"higher_is_better": True}):
        with pytest.raises(TypeError, match=r"^Old: a Metric says scores = \(Score\('f1'\),\) now"):
            type("Old", (MeanAbsoluteError,), attributes)
    assert type("New", (Accuracy,), {"name": "f1", "scores": (Score("f1"),)}).scores[0].name == "f1"
