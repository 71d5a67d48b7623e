"""Achievement-based Multi-Task Loss (AMTL): focal weights from how much of its potential a task has reached.

Yun, Cho, "Achievement-Based Training Progress Balancing for Multi-Task Learning", ICCV 2023:

    L = Π_i L_i^{w_i},   w = norm(max(0, 1 − a_i / (1 + m))^γ),   a_i = acc_i / p_i,   Σw = 1,

with potential p_i the accuracy of a network trained on task i alone, margin m, and norm a softmax or division by the
sum. w = 1/T before the first accuracy. γ = 2, m = 0.05, softmax in the authors' classes (0.5 and 0.15 on their command
line); acc is a moving average over the epochs, with 0.1 for the newest, as there. `mean=arithmetic` is their AMTL-A,
L = Σ_i w_i L_i. For a score that is better when lower, a_i = p_i / score_i.

A softmax of numbers in [0, 1] is nearly uniform; norm=sum is what tells tasks apart. Different from the authors' code:
max(0, ·), without which a task past p (1 + m) is weighted up again (γ = 2) or NaN (γ = 0.5); if all are past it,
norm=sum gives 1/T; absent tasks leave the mean, where there the total becomes 0; the accuracies are not the test set's.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from mtl.losses.arguments import by_task
from mtl.losses.base import LossWeighting, Mean, Statistics, combine, masked, moving_average, softmax, uniform
from mtl.losses.epochs import check_unit, finite_scores, refuse_score

Norm = Literal["softmax", "sum"]
Potential = Annotated[float, Gt(0)]


class AMTL(LossWeighting):
    """L = Π_i L_i^{w_i} with w from the achievements.

    Args:
        tasks: number or names of the tasks.
        potentials: scores of the single-task networks, in the unit of the scores (accuracies in percent), by name
            ({fine: 68.8, coarse: 78.9}) or in task order.
        gamma: γ; larger leans harder towards the tasks of low achievement.
        margin: m, how far past its potential a task still counts as not done.
        ema: share of the newest scores in their moving average; 1 keeps no history.
        norm: what makes the weights add up to 1.
        mean: how the weighted losses are combined.

    Raises:
        ValueError: not one positive potential for each task.
    """

    single_task_argument = "potentials"

    def __init__(
        self,
        tasks: int | Sequence[str],
        potentials: Mapping[str, Potential] | Sequence[Potential],
        gamma: Annotated[float, Ge(0)] = 2.0,
        margin: Annotated[float, Ge(0)] = 0.05,
        ema: Annotated[float, Gt(0), Le(1)] = 0.1,
        norm: Norm = "softmax",
        mean: Mean = "geometric",
    ):
        super().__init__(tasks)
        potentials = by_task("potentials", potentials, self.names)
        self.gamma, self.margin, self.ema = gamma, margin, ema
        self.norm, self.mean = norm, mean
        self.needs_positive = self.mean == "geometric"
        self.register_buffer("potentials", torch.tensor(potentials, dtype=torch.float32))
        self.register_buffer("average", torch.full((self.tasks,), torch.nan))
        self.register_buffer("raw", torch.ones(self.tasks))  # weights before norm; 1 is an achievement of 0

    def epoch_end(self, statistics: Statistics) -> None:
        """Follow the scores.

        Raises:
            ValueError: no scores were given, one is infinite or a negative error, or the scores are fractions where
                the potentials are percents.
        """
        scores, higher = finite_scores(self, statistics), statistics.higher_is_better
        for i, value in enumerate(scores.tolist()):
            if value < 0 and higher is not None and not higher[i]:
                refuse_score(self, i, value, "that is better when lower is an error, at least 0")
        check_unit(self, statistics, self.potentials)
        self.average.copy_(moving_average(self.average, scores.to(self.average), self.ema))
        achieved = self.average / self.potentials
        if higher is not None:
            achieved = torch.where(higher.to(achieved.device), achieved, 1 / achieved)
        raw = (1 - achieved / (1 + self.margin)).clamp(min=0) ** self.gamma
        raw = raw.clamp(max=1e30)  # an R² far below 0 has no bound; an infinite weight would be NaN
        self.raw.copy_(torch.where(achieved.isnan(), self.raw, raw))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        raw = self.raw.to(losses)
        if self.norm == "softmax":
            weights = softmax(raw, present)
        else:
            total = masked(raw, present).sum()
            weights = torch.where(total > 0, raw / total, uniform(present, losses))
        return combine(losses, weights, present, self.mean)
