"""Losses against the published equations in NumPy; metrics against torchmetrics, on random and degenerate maps; bf16.

Equations of dense losses: Liu et al. (MTAN), CVPR 2019, section 3.2. Masks: a pixel without a label counts nothing.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtl.metrics.base import Metric
from mtl.metrics.dense import Angles, ConfusionMatrix, DepthErrors
from mtl.tasks import Classification, Depth, Disparity, Normals, Regression, Segmentation
from mtl.tasks.binary import Binary
from mtl.tasks.dense import SHORTEST
from mtl.tasks.quantity import Quantity

# ------------------------------------------------------------------------------------------------------ the equations
# One labelled unit each: prediction (outputs,) and label, NumPy's float64. None: the unit has no label.


def cross_entropy(y: np.ndarray, label: np.ndarray) -> float | None:
    return None if label == -100 else -math.log(np.exp(y[int(label)]) / np.exp(y).sum())


def absolute(y: np.ndarray, depth: np.ndarray) -> float | None:
    return None if depth == 0 or np.isnan(depth) else abs(y[0] - depth)


def one_minus_cosine(y: np.ndarray, normal: np.ndarray) -> float | None:
    """Published with y / ‖y‖, which is undefined for y = 0."""
    unlabelled = np.isnan(normal).any() or (normal == 0).all()
    return None if unlabelled else 1 - y @ normal / max(math.sqrt(y @ y), SHORTEST)


def binary_cross_entropy(y: np.ndarray, label: np.ndarray) -> float | None:
    p = 1 / (1 + math.exp(-y[0]))
    return None if label == -100 else -(label * math.log(p) + (1 - label) * math.log(1 - p))


def huber(y: np.ndarray, number: np.ndarray, mean: float = 3.0, std: float = 2.0) -> float | None:
    error = abs(y[0] - (number - mean) / std)
    return None if np.isnan(number) else error**2 / 2 if error < 1 else error - 0.5


def square(y: np.ndarray, number: np.ndarray) -> float | None:
    return None if np.isnan(number) else (y[0] - number) ** 2


CASES = {  # task, its equation, whether it is of pixels, the marks of "no label"
    "segmentation": (Segmentation("s", 4), cross_entropy, True, (-100,)),
    "depth": (Depth("d"), absolute, True, (0.0, math.nan)),
    "disparity": (Disparity("d"), absolute, True, (0.0, math.nan)),
    "normals": (Normals("n"), one_minus_cosine, True, (0.0, math.nan)),
    "classification": (Classification("c", 4), cross_entropy, False, (-100,)),
    "binary": (Binary("b"), binary_cross_entropy, False, (-100,)),
    "regression": (Regression("r", mean=3.0, std=2.0), huber, False, (math.nan,)),
    "quantity": (Quantity("q"), square, False, (math.nan,)),
}


def make(kind: str, share: float, size: tuple[int, ...] = (3, 2, 3), seed: int = 0) -> SimpleNamespace:
    """Predictions (N, outputs, …) in float64, and labels (N, …); about `share` of the units has a label."""
    (task, _, pixels, marks), draws = CASES[kind], torch.Generator().manual_seed(seed)
    shape = size if pixels else size[:1]
    if kind == "normals":
        target = nn.functional.normalize(torch.randn(*shape, 3, generator=draws, dtype=torch.float64), dim=-1)
        # Its sum is 0, by which MTAN's code knows a pixel without a label. It has one.
        target.view(-1, 3)[0] = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    elif -100 in marks:
        target = torch.randint(max(task.outputs, 2), shape, generator=draws)
    else:
        target = torch.rand(shape, generator=draws, dtype=torch.float64) * 9 + 0.5
    known = torch.rand(shape, generator=draws) < share
    for k, mark in enumerate(marks):  # all marks of no label, in turns
        target[~known & (torch.arange(known.numel()).view(shape) % len(marks) == k)] = mark
    prediction = torch.randn(shape[0], task.outputs, *shape[1:], generator=draws, dtype=torch.float64)
    if kind == "normals":
        prediction[0, :, 0, 1] *= 3e-4  # so short that it is not divided by its length
    return SimpleNamespace(task=task, prediction=prediction, target=target, known=known)


def published(kind: str, prediction: np.ndarray, target: np.ndarray) -> float:
    """The mean over all labelled units of a batch; 0 without any, where the published code divides 0 by 0."""
    equation, outputs = CASES[kind][1], prediction.shape[1]
    units = np.moveaxis(prediction, 1, -1).reshape(-1, outputs)
    labels = target.reshape(len(units), -1) if kind == "normals" else target.reshape(-1)
    values = [v for y, label in zip(units, labels, strict=True) if (v := equation(y, label)) is not None]
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("share", [1, 0.5, 0])
def test_losses_equal_the_published_equations_and_their_slopes(kind, share):
    """The gradient is compared with central differences of the equation."""
    one = make(kind, share)
    prediction, y, step = one.prediction.requires_grad_(), one.prediction.detach().numpy().copy(), 1e-6
    loss = one.task.loss(prediction, one.target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    target, slopes = one.target.numpy(), np.zeros_like(y)
    for place in np.ndindex(*y.shape):
        ends = []
        for sign in (1, -1):
            moved = y.copy()
            moved[place] += sign * step
            ends.append(published(kind, moved, target))
        slopes[place] = (ends[0] - ends[1]) / (2 * step)
    assert loss.item() == pytest.approx(published(kind, y, target), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-5, atol=1e-8)
    assert (loss == 0 and not gradient.any()) if share == 0 else loss > 0


# ------------------------------------------------------------------------------------------------------------- metrics

SIZE, UNEVEN = (7, 5, 8), ((0, 1), (1, 5), (5, 7))


def found(metric: Metric, prediction: Tensor, target: Tensor) -> dict[str, float]:
    state = metric.zero()
    for a, b in UNEVEN:
        metric.update(state, prediction[a:b], target[a:b])
    return dict(metric.compute(state))


@pytest.mark.parametrize("kind", CASES)
def test_no_label_at_all_has_no_value(kind):
    one = make(kind, 0, SIZE)
    values = found(one.task.metrics[0], one.prediction, one.target)
    assert values and all(map(math.isnan, values.values()))


@pytest.mark.parametrize("reduction", ["pooled", "batch_mean"])
@pytest.mark.parametrize("kind", CASES)
def test_metrics_of_bf16_are_those_of_the_same_numbers_in_float64(kind, reduction):
    """Neither labels nor sums are rounded to three digits; an angle may change its bin of 0.01 degrees."""
    one = make(kind, 0.7, (7, 40, 50))
    task = replace(one.task, reduction=reduction) if hasattr(one.task, "reduction") else one.task
    rounded = one.prediction.bfloat16()
    values, wanted = (found(task.metrics[0], p, one.target) for p in (rounded, rounded.double()))
    assert values == pytest.approx(wanted, rel=1e-6, abs=1e-3 if kind == "normals" else 0)


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics import classification, regression

    return SimpleNamespace(**vars(classification), **{k: v for k, v in vars(regression).items() if k[0].isupper()})


def theirs(metric, prediction: Tensor, target: Tensor) -> float:
    for a, b in UNEVEN:
        metric.update(prediction[a:b], target[a:b])
    return metric.compute().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [1, 0.5, 0.02])
def test_a_confusion_matrix_equals_torchmetrics(oracle, seed, share):
    """Of six classes, 4 and 5 are nowhere labelled, 2 is nowhere at all, 1 and 5 are never predicted."""
    one, options = make("segmentation", share, SIZE, seed), {"num_classes": 6, "ignore_index": -100}
    logits = torch.randn(7, 6, 5, 8, generator=torch.Generator().manual_seed(seed))
    logits[:, [1, 2, 5]] = -9.0
    target = one.target.where(one.target != 2, 1)
    logits = logits.masked_fill(~one.known[:, None], math.nan)
    values, metric = found(ConfusionMatrix(6), logits, target), oracle.MulticlassConfusionMatrix(**options)
    wanted = {
        "miou": 100 * theirs(oracle.MulticlassJaccardIndex(**options), logits, target),
        "pixel_accuracy": 100 * theirs(oracle.MulticlassAccuracy(**options, average="micro"), logits, target),
    }
    assert values == pytest.approx(wanted)
    state = ConfusionMatrix(6).zero()
    ConfusionMatrix(6).update(state, logits, target)
    metric.update(logits, target)
    assert torch.equal(state, metric.compute()) and not state[:, [1, 2, 5]].any() and not state[[2, 4, 5]].any()


@pytest.mark.parametrize("share", [1, 0.5, 0.02])
def test_depth_errors_equal_torchmetrics(oracle, share):
    """It knows no mask, so it gets the labelled pixels of each batch."""
    one, wanted = make("depth", share, SIZE), {}
    for name, kind in (("abs_err", oracle.MeanAbsoluteError), ("rel_err", oracle.MeanAbsolutePercentageError)):
        metric = kind().double()
        for a, b in UNEVEN:
            known = one.known[a:b]
            if known.any():
                metric.update(one.prediction[a:b, 0][known], one.target[a:b][known])
        wanted[name] = metric.compute().item()
    assert found(DepthErrors(), one.prediction, one.target) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("share", [1, 0.5, 0.02])
def test_angles_equal_torchmetrics_cosines(oracle, share):
    """To half a bin of the histogram, 0.005 degrees."""
    one, metric = make("normals", share, SIZE), oracle.CosineSimilarity(reduction="none")
    metric.update(one.prediction.movedim(1, -1)[one.known], one.target[one.known])
    angles = metric.compute().clamp(-1, 1).acos().rad2deg().numpy()
    wanted = {"mean": angles.mean(), "median": np.median(angles)}
    wanted |= {name: 100 * (angles < limit).mean() for name, limit in Angles.limits.items()}
    assert found(Angles(), one.prediction, one.target) == pytest.approx(wanted, abs=0.006)


def test_metrics_of_one_label_a_sample_equal_torchmetrics(oracle):
    kinds = {
        "classification": {"accuracy": oracle.MulticlassAccuracy(4, average="micro", ignore_index=-100)},
        "binary": {"f1": oracle.BinaryF1Score(ignore_index=-100), "accuracy": oracle.BinaryAccuracy(ignore_index=-100)},
    }
    for kind, metrics in kinds.items():
        one = make(kind, 0.7, SIZE)
        shown = one.prediction.squeeze(1).sigmoid() if kind == "binary" else one.prediction
        wanted = {name: 100 * theirs(metric, shown, one.target) for name, metric in metrics.items()}
        assert found(one.task.metrics[0], one.prediction, one.target) == pytest.approx(wanted)
    one = make("regression", 0.7, SIZE)
    error = oracle.MeanAbsoluteError().double()(2 * one.prediction[one.known, 0] + 3, one.target[one.known])
    assert found(one.task.metrics[0], one.prediction, one.target) == pytest.approx({"mae": error.item()}, rel=1e-6)
