"""Losses and metrics of tasks against torch and scikit-learn; missing labels; accumulation over batches."""

import math

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import nn

from mtl.tasks import Classification, Regression

N, CLASSES = 53, 7
MISSING = {"classification": -100, "regression": math.nan}
every_kind = pytest.mark.parametrize("kind", MISSING)


def make(kind: str, partial: bool, absent: int = 0):
    """A task, predictions (a leaf), targets of which `absent` in five are missing, and the mask of those present."""
    generator = torch.Generator().manual_seed(3)
    present = torch.arange(N) % 5 >= absent
    if kind == "classification":
        task, target = Classification("a", CLASSES, partial), torch.randint(CLASSES, (N,), generator=generator)
    else:
        task, target = Regression("b", partial=partial), torch.randn(N, generator=generator)
    target[~present] = MISSING[kind]
    return task, torch.randn(N, task.outputs, generator=generator, requires_grad=True), target, present


@every_kind
@pytest.mark.parametrize("partial, absent", [(False, 0), (True, 0), (True, 2)])
def test_loss_equals_torch_on_the_labelled(kind, partial, absent):
    """Mean cross-entropy and smooth L1 loss, value and gradient; samples without a label get no gradient."""
    task, prediction, target, present = make(kind, partial, absent)
    loss = task.loss(prediction, target)
    (grad,) = torch.autograd.grad(loss, prediction)
    if kind == "classification":
        expected = nn.CrossEntropyLoss()(prediction[present], target[present])
    else:
        expected = nn.SmoothL1Loss()(prediction[present], target[present][:, None])
    torch.testing.assert_close((loss, grad), (expected, *torch.autograd.grad(expected, prediction)))
    assert not grad[~present].any() and grad[present].any()
    assert torch.equal(task.labelled(target), present) and task.count(target) == present.sum()
    losses = task.criterion(prediction, target)
    assert losses.shape == (N,) and not losses[~present].any()


@every_kind
def test_no_label_at_all_is_a_differentiable_zero(kind):
    """Loss 0 and gradient 0, not NaN."""
    task, prediction, target, _ = make(kind, partial=True, absent=5)
    loss = task.loss(prediction, target)
    (grad,) = torch.autograd.grad(loss, prediction)
    assert task.count(target) == 0 and loss == 0 and (grad == 0).all()


@every_kind
@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("batch", [1, 10, N])
def test_metric_over_batches_equals_scikit_learn_over_samples(kind, absent, batch):
    """States and counts add up to the figure of all labelled samples, batches without any label included."""
    task, prediction, target, present = make(kind, absent > 0, absent)
    prediction, (metric,) = prediction.detach(), task.metrics
    pairs = list(zip(prediction.split(batch), target.split(batch), strict=True))
    state, count = sum(metric.update(*pair) for pair in pairs), sum(task.count(t) for _, t in pairs)
    if kind == "classification":
        expected = 100 * sklearn_metrics.accuracy_score(target[present], prediction[present].argmax(1))
    else:
        expected = sklearn_metrics.mean_absolute_error(target[present], prediction[present])
    assert metric.compute(state.tolist(), count.item()) == pytest.approx(expected, rel=1e-6)
    assert metric.higher_is_better is (kind == "classification")
