"""Losses and metrics of tasks against torch and scikit-learn; missing labels; accumulation over batches."""

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import nn

from mtl.tasks import Classification, Regression

N, CLASSES = 53, 7
KINDS = {
    "classification": (lambda partial: Classification("a", CLASSES, partial), nn.CrossEntropyLoss(), -100),
    "regression": (lambda partial: Regression("b", partial=partial), nn.MSELoss(), float("nan")),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def sample(kind: str, n: int = N):
    """Predictions (a leaf) and complete targets."""
    generator = torch.Generator().manual_seed(3)
    if kind == "classification":
        targets = torch.randint(CLASSES, (n,), generator=generator)
        return torch.randn(n, CLASSES, generator=generator, requires_grad=True), targets
    return torch.randn(n, 1, generator=generator, requires_grad=True), torch.randn(n, generator=generator)


def gappy(kind: str):
    """As `sample`, with two labels in five missing; also the mask of those present."""
    prediction, target = sample(kind)
    present = torch.arange(N) % 5 >= 2
    target[~present] = KINDS[kind][2]
    return prediction, target, present


def value_and_grad(loss, prediction):
    return loss.detach(), torch.autograd.grad(loss, prediction)[0]


@every_kind
@pytest.mark.parametrize("partial", [False, True])
def test_loss_equals_torch(kind, partial):
    """Value and gradient of the mean cross-entropy and of the mean squared error when every label is there."""
    make, peer, _ = KINDS[kind]
    prediction, target = sample(kind)
    task, shaped = make(partial), target if kind == "classification" else target[:, None]
    actual = value_and_grad(task.loss(prediction, target), prediction)
    torch.testing.assert_close(actual, value_and_grad(peer(prediction, shaped), prediction))
    assert task.count(target) == N
    assert task.criterion(prediction, target).shape == (N,)


@every_kind
def test_partial_loss_is_the_mean_over_the_labelled(kind):
    """Value and gradient as on the labelled subset alone; exactly no gradient for the others."""
    make, peer, _ = KINDS[kind]
    prediction, target, present = gappy(kind)
    shaped = target[present] if kind == "classification" else target[present][:, None]
    task = make(True)
    loss, grad = value_and_grad(task.loss(prediction, target), prediction)
    torch.testing.assert_close((loss, grad), value_and_grad(peer(prediction[present], shaped), prediction))
    assert grad[~present].abs().max() == 0 < grad[present].abs().max()
    assert torch.equal(task.labelled(target), present) and task.count(target) == present.sum()


@every_kind
def test_no_label_at_all_is_a_differentiable_zero(kind):
    """Loss 0 and gradient 0, not NaN."""
    make, _, missing = KINDS[kind]
    prediction, target = sample(kind)
    task = make(True)
    loss, grad = value_and_grad(task.loss(prediction, torch.full_like(target, missing)), prediction)
    assert loss == 0 and grad.abs().max() == 0


@every_kind
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("batch", [1, 10, N])
def test_metric_over_batches_equals_sklearn_over_samples(kind, partial, batch):
    """States add up to the figure over all labelled samples, batches without any label included."""
    prediction, target, present = gappy(kind) if partial else (*sample(kind), torch.ones(N, dtype=torch.bool))
    task = KINDS[kind][0](partial)
    (metric,) = task.metrics
    pairs = list(zip(prediction.detach().split(batch), target.split(batch), strict=True))
    state, count = sum(metric.update(*pair) for pair in pairs), sum(task.count(t) for _, t in pairs)
    shown, truth = prediction.detach()[present], target[present]
    if kind == "classification":
        expected = 100 * sklearn_metrics.accuracy_score(truth, shown.argmax(1))
        assert (metric.name, metric.unit, metric.higher_is_better) == ("accuracy", "%", True)
    else:
        expected = sklearn_metrics.mean_absolute_error(truth, shown[:, 0])
        assert (metric.name, metric.higher_is_better) == ("mae", False)
    assert metric.compute(state.tolist(), count.item()) == pytest.approx(expected, rel=1e-6)
