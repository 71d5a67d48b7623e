"""Dynamic Task Prioritization (DTP): focal-loss weights from each task's accuracy; hard tasks get more weight.

Guo et al., "Dynamic Task Prioritization for Multitask Learning", ECCV 2018:

    w_i = −(1 − κ_i)^γ log κ_i,   κ_i ← α acc_i + (1 − α) κ_i   after every epoch.

w = 1 until the first accuracy is known. γ = 1 and α = 0.1, as in the code of AMTL's authors, who recommend γ = 0.5.
Σw is not fixed: it shrinks to 0 as the accuracies grow. κ = 0 counts as 1e-12, which gives a weight of 28.

κ must be a share of right answers. Here it is the score in percent, divided by 100. An error has no such scale, so a
task whose main metric is better when lower is refused before training. So are tasks on maps such as depth; `loss=amtl`
takes both kinds. AMTL's authors give DTP the shares with δ < 1.25 (not measured here) and within 11.25°.

AMTL's authors use test accuracies; `Statistics` never holds any. `mean=geometric` is their DTP-G (Yun & Cho, ICCV
2023): L = Π_i L_i^{w_i/Σw}.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from mtl.losses.base import FLOOR, LossWeighting, Mean, Statistics, combine, moving_average
from mtl.losses.epochs import check_unit, finite_scores, refuse_score


class DTP(LossWeighting):
    """L = Σ_i w_i L_i with w = −(1 − κ)^γ log κ.

    Args:
        gamma: γ; a larger value gives more weight to tasks of low accuracy.
        ema: α, the share of the newest accuracy in κ; 1 keeps no history.
        mean: how the weighted losses are combined.
    """

    reads_scores = True
    needs_accuracies = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        gamma: Annotated[float, Ge(0)] = 1.0,
        ema: Annotated[float, Gt(0), Le(1)] = 0.1,
        mean: Mean = "arithmetic",
    ):
        super().__init__(tasks)
        self.gamma, self.ema, self.mean = gamma, ema, mean
        self.needs_positive = self.mean == "geometric"
        self.register_buffer("average", torch.full((self.tasks,), torch.nan))
        self.register_buffer("weights", torch.ones(self.tasks))

    def epoch_end(self, statistics: Statistics) -> None:
        """Update the weights from the epoch's accuracies.

        Raises:
            ValueError: there are no scores, or a score is not an accuracy in percent.
        """
        scores = finite_scores(self, statistics)
        # An error of 0.3 cannot be read as a share of right answers, and no formula of the paper converts it.
        if statistics.higher_is_better is not None and not statistics.higher_is_better.all():
            name = self.names[int(statistics.higher_is_better.int().argmin())]
            raise ValueError(
                f"scores: DTP needs accuracies, and {name!r} has a score that is better when lower; use AMTL"
            )
        for i, value in enumerate(scores.tolist()):
            if not -1e-3 < value < 100.001 and not math.isnan(value):  # the margin allows for rounding of a mean
                refuse_score(self, i, value, "is an accuracy in percent, from 0 to 100")
        check_unit(self, statistics)
        self.average.copy_(moving_average(self.average, scores.to(self.average), self.ema))
        kappa = (self.average / 100).clamp(FLOOR, 1)  # log 0 would be infinite
        weights = (1 - kappa) ** self.gamma * -kappa.log()
        self.weights.copy_(torch.where(self.average.isnan(), self.weights, weights))  # NaN: no accuracy yet

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return combine(losses, self.weights, present, self.mean)
