"""PIVRG: FairGrad in which the tasks that lost most against single-task learning are served most.

Qin, Wang, Yan, "Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction",
CVPR 2025. It is FairGrad's equation with α = 2 and a target v_i for each task:

    G w = (v / w)^{1/2},   v = T softmax(Δ / τ),   τ = max((max Δ − min Δ) / ln b, τ_min).

Δ_i is task i's drop in per cent against its single-task result; positive is worse. b = 2 and τ_min = 10 (NYUv2); 1.8
and 20 for Cityscapes, 1.8 and 100 for QM9. v = 1 in the first epoch.

Δ is computed after each epoch, from validation data if the run has some, otherwise from training data. The authors'
code partly reads test predictions. Heads get the gradient of their own loss. `max_norm` = 1 is the authors' clip.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from mtl.losses.arguments import by_task
from mtl.losses.base import GramianWeighting, Statistics, masked, renormalised
from mtl.losses.epochs import check_unit, finite_scores
from mtl.losses.host import on_host
from mtl.losses.solvers import double, fair_weights


class PIVRG(GramianWeighting):
    """weights = w with (G w)_i = (v_i / w_i)^½.

    Args:
        baselines: the single-task result of each task, by name or in task order; train them with loss=single. They
            have the unit of the tables: accuracies are in percent.
        bound: b, the ratio between the largest and the smallest target. It is smaller if τ_min acts.
        min_temperature: τ_min, in per cent.
        max_norm: clip of the shared gradient's norm; None does not clip.

    Raises:
        ValueError: a baseline is missing, belongs to no task, or is 0.
    """

    claims = ("non_conflicting", "scale_free")
    single_task_argument = "baselines"

    reads_scores = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        baselines: Mapping[str, float] | Sequence[float],
        bound: Annotated[float, Gt(1)] = 2.0,
        min_temperature: Annotated[float, Gt(0)] = 10.0,
        max_norm: Annotated[float, Gt(0)] | None = 1.0,
    ):
        super().__init__(tasks)
        self.bound, self.min_temperature, self.max_norm = bound, min_temperature, max_norm
        baselines = by_task("baselines", baselines, self.names)
        if 0 in baselines:
            raise ValueError("baselines: a result of 0 cannot be compared with")
        self.register_buffer("baselines", torch.tensor(baselines, dtype=torch.float64))
        self.register_buffer("targets", torch.ones(self.tasks, dtype=torch.float64))

    def epoch_end(self, statistics: Statistics) -> None:
        """Update the targets v from the epoch's scores.

        Raises:
            ValueError: the scores or their direction are missing, or a score is infinite. Also if the scores are
                fractions but the baselines are in percent.
        """
        scores = finite_scores(self, statistics).to(self.baselines.device)
        if statistics.higher_is_better is None:
            raise ValueError("higher_is_better: PIVRG needs the direction of the scores, and Statistics holds none")
        check_unit(self, statistics, self.baselines)
        higher = statistics.higher_is_better.to(self.baselines.device)
        worse = torch.where(higher, -100.0, 100.0)
        baselines = double(self.baselines)
        drop = worse * (scores.to(baselines) - baselines) / baselines.abs()
        known = ~drop.isnan()  # a task without labels in the whole epoch gets the mean drop of the others
        drop = torch.where(known, drop, drop[known].mean() if known.any() else 0.0)
        spread = (drop.max() - drop.min()) / math.log(self.bound)
        self.targets.copy_(self.tasks * torch.softmax(drop / spread.clamp(min=self.min_temperature), 0))

    def weights(self, gramian: Tensor, present: Tensor | None = None) -> Tensor:
        return _fair(gramian, self.targets, present)


@on_host
def _fair(gramian: Tensor, targets: Tensor, present: Tensor | None) -> Tensor:
    targets = renormalised(targets, present)
    if present is not None:
        targets = torch.where(present, targets, 1.0)
    return masked(fair_weights(gramian, 2.0, targets), present)
