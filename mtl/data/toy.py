"""The two-dimensional toy problem of CAGrad as a data set, so that every method can be tried on it.

Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, appendix: two losses of x in R²,
with s = (1, −1) and u_i = −x₁/2 + s_i (tanh x₂ − 7/2),

    L_i = c₊ (log max(|u_i|, 5e-6) + 6) + c₋ ([(x₁ − 7 s_i)² + 0.1 (x₂ + 8)²] / 10 − 20),   c± = max(± tanh(x₂/2), 0),

The losses have narrow valleys above x₂ = 0 and two bowls below. The Pareto set is x₂ = −8.3552, |x₁| ≤ 7. The least
average loss is −15.09, in its middle. Nash-MTL (Navon et al., ICML 2022) multiplies L_1 by 0.1, which moves this
minimum to x₁ = −5.7.

Images are blank and all alike. `arch=point` predicts the point x for every task, and each task's loss is L_i(x).
L_i is negative in places, but some methods take logarithms or ratios of losses. So, as in FAMO's code, a method sees
L_i minus its lower bound (−21 · scale and −21). A constant changes no gradient. The metric `value` is L_i itself.
`mtl.studies.toy_descent` follows the same trajectories in plain float64 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.data import Benchmark, Image, Split
from mtl.errors import ConfigError
from mtl.metrics.base import Mean, Metric, Score
from mtl.tasks import Task

FLOOR, LOWER = 5e-6, -21.0
SIGNS = (1.0, -1.0)  # s_1 and s_2


def toy_loss(points: Tensor, sign: float) -> Tensor:
    """(…) the unscaled loss with s_i = `sign` at points (…, 2), in their dtype. It can be differentiated twice.

    At x₂ = 0 both gates have a kink. We use their one-sided derivatives there, as older torch.clamp did. torch 2.15
    uses 0, which would freeze every method at Nash-MTL's start (0, 0).
    """
    x1, x2 = points.unbind(-1)
    half = torch.tanh(x2 / 2)
    up, down = half.masked_fill(half < 0, 0.0), -half.masked_fill(half > 0, 0.0)
    distance = (sign * (torch.tanh(x2) - 3.5) - x1 / 2).abs()
    valley = distance.masked_fill(distance <= FLOOR, FLOOR).log() + 6
    bowl = ((x1 - 7 * sign).square() + 0.1 * (x2 + 8).square()) / 10 - 20
    return up * valley + down * bowl


def toy_losses(points: Tensor, scale: float = 1.0) -> Tensor:
    """(…, 2) both losses at points (…, 2). The first one is multiplied by `scale`."""
    first, second = (toy_loss(points, sign) for sign in SIGNS)
    return torch.stack([scale * first, second], -1)


class Value(Mean):
    """The metric: the loss L_i itself, which may be negative.

    Args:
        task: the task of the loss.
    """

    scores = (Score("value", higher_is_better=False),)

    def __init__(self, task: ToyTask):
        self.task = task

    def add(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.task.at(prediction).sum(), self.task.count(target)


@dataclass(frozen=True)
class ToyTask(Task):
    """One of the two losses as a task. Predictions are points (N, 2); the criterion is the loss minus its lower bound.

    Args:
        name, outputs, target: as in `Task`.
        sign: s_i.
        scale: of the loss.
    """

    sign: float = 1.0
    scale: float = 1.0

    @property
    def metrics(self) -> Sequence[Metric]:
        return (Value(self),)

    def at(self, points: Tensor) -> Tensor:
        """(N,) the scaled loss at points (N, 2).

        Raises:
            ConfigError: the points do not have two coordinates.
        """
        if points.shape[1:] != (2,):
            shape = tuple(points.shape[1:])
            raise ConfigError(
                f"arch: the toy's losses take a point in the plane, not the shape {shape}; use arch=point"
            )
        return self.scale * toy_loss(points, self.sign)

    def units(self, target: Tensor) -> Tensor:
        return torch.ones_like(target, dtype=torch.int64)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.at(prediction) - self.scale * LOWER


@dataclass
class Toy(Benchmark):
    """The toy problem as tasks L1 and L2, for `arch=point`.

    Args:
        scale: of the first loss: 1 in CAGrad, 0.1 in Nash-MTL.
        steps: number of steps in an epoch (fewer with limit_train or val_fraction).
        batch_size: number of blank images in a step. It changes no loss, but at least 6 are needed: some methods split
            a batch into three parts of two. A power of two makes the mean over the batch exact.
    """

    batch_size: Annotated[int, Ge(6)] = 8
    scale: Annotated[float, Gt(0)] = 1.0
    steps: Annotated[int, Ge(1)] = 100

    inputs = {"image": Image((1, 1, 1))}

    @property
    def tasks(self) -> Sequence[Task]:
        first, second = SIGNS
        return ToyTask("L1", sign=first, scale=self.scale), ToyTask("L2", sign=second)

    def load(self) -> dict[str, Split]:
        def blank(size: int) -> Split:
            labels = {task.name: torch.zeros(size) for task in self.tasks}
            return Split({"image": torch.zeros(size, 1, 1, 1, dtype=torch.uint8), **labels})

        return {"train": blank(self.steps * self.batch_size), "test": blank(1)}
