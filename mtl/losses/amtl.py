"""Achievement-based Multi-Task Loss (AMTL): focal weights from how close each task is to its single-task accuracy.

Yun, Cho, "Achievement-Based Training Progress Balancing for Multi-Task Learning", ICCV 2023:

    L = Π_i L_i^{w_i},   w = norm(max(0, 1 − a_i / (1 + m))^γ),   a_i = acc_i / p_i,   Σw = 1.

The potential p_i is the accuracy of a network trained on task i alone. m is a margin. norm is a softmax or a division
by the sum. w = 1/T until the first accuracy is known. acc is a moving average over the epochs, in which the newest
epoch counts 0.1. For a score that is better when lower, a_i = p_i / score_i.

The authors' classes have γ = 2, m = 0.05 and the softmax; their command line has γ = 0.5 and m = 0.15.
`mean=arithmetic` is their AMTL-A, L = Σ_i w_i L_i. A softmax of numbers in [0, 1] is nearly uniform: choose
`norm=sum` to tell the tasks apart.

Differences from the authors' code:

- max(0, ·). Without it, a task beyond p (1 + m) gets a growing weight (γ = 2) or NaN (γ = 0.5).
- If all tasks are beyond p (1 + m), norm=sum gives 1/T.
- Absent tasks are left out of the mean. In the authors' code the total then becomes 0.
- The accuracies never come from the test set.
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
        potentials: scores of the single-task networks, by name ({fine: 68.8, coarse: 78.9}) or in task order. They
            have the unit of the run's scores: accuracies are in percent.
        gamma: γ; a larger value gives more weight to tasks of low achievement.
        margin: m; a task still gets weight until its score exceeds its potential by this share.
        ema: share of the newest scores in their moving average; 1 keeps no history.
        norm: how the weights are made to add up to 1.
        mean: how the weighted losses are combined.

    Raises:
        ValueError: a task has no potential, or one that is not positive.
    """

    single_task_argument = "potentials"

    reads_scores = True

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
        """Update the weights from the epoch's scores.

        Raises:
            ValueError: there are no scores, a score is infinite, or an error is negative. Also if the scores are
                fractions but the potentials are in percent.
        """
        scores, higher = finite_scores(self, statistics), statistics.higher_is_better
        for i, value in enumerate(scores.tolist()):
            if value < 0 and higher is not None and not higher[i]:
                refuse_score(self, i, value, "that is better when lower is an error, at least 0")
        check_unit(self, statistics, self.potentials)
        self.average.copy_(moving_average(self.average, scores.to(self.average), self.ema))
        achieved = self.average / self.potentials
        if higher is not None:  # for an error, a smaller value is the greater achievement
            achieved = torch.where(higher.to(achieved.device), achieved, 1 / achieved)
        raw = (1 - achieved / (1 + self.margin)).clamp(min=0) ** self.gamma
        raw = raw.clamp(max=1e30)  # an R² can be far below 0; an infinite weight would become NaN
        self.raw.copy_(torch.where(achieved.isnan(), self.raw, raw))  # NaN: the task has no score yet

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        raw = self.raw.to(losses)
        if self.norm == "softmax":
            weights = softmax(raw, present)
        else:
            total = masked(raw, present).sum()
            weights = torch.where(total > 0, raw / total, uniform(present, losses))
        return combine(losses, weights, present, self.mean)
