"""GO4Align: groups the tasks that behave alike; the tasks of a group share one weight.

Shen et al., "GO4Align: Group Optimization for Multi-Task Alignment", NeurIPS 2024. In every step, losses detached:

    p_i ∝ p_i exp(−β L_i),   γ_i = p_i Σ_j L_j / L_i,   w_i = mean of γ over i's group,   L = Σ_i w_i L_i.

k-means on the T numbers γ_i makes the groups. p starts at 1/T. β = 1e-4. Σw = Σγ is not normalised: it is about T if
the losses are equal, and larger otherwise.

`clusters` is a hyper-parameter of the paper. The authors' code has 1 by default (trainer.py for NYUv2). All tasks
then have one weight: equal weighting with a step of varying length. The default here is 2, the least number that
makes groups.

The authors call a library's k-means with random starts. In one dimension k-means has an exact solution: dynamic
programming over the sorted numbers. It stays on the device and draws nothing.

- More groups than tasks are refused, except for a single task, which forms one group. A well-known port has the
  default 5 and crashes there.
- A loss of exactly 0 would give an infinite γ. Its task counts as absent in that step.
- An absent task keeps its p relative to the mean of the others.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.losses.base import FLOOR, LossWeighting, combine, count, masked, softmax


class GO4Align(LossWeighting):
    """L = Σ_i w_i L_i with one weight for each group of tasks.

    Args:
        clusters: number of groups. 1 gives all tasks the mean weight; T gives each task its own.
        step_size: β, how fast p decreases for tasks of high loss.

    Raises:
        ValueError: there are more groups than tasks, and more than one task.
    """

    needs_positive = True

    def __init__(
        self,
        tasks: int | Sequence[str],
        clusters: Annotated[int, Ge(1)] = 2,
        step_size: Annotated[float, Ge(0)] = 1e-4,
    ):
        super().__init__(tasks)
        if clusters > self.tasks > 1:
            raise ValueError(f"clusters: {clusters} groups of {self.tasks} tasks ({', '.join(self.names)})")
        self.clusters, self.step_size = clusters, step_size
        self.register_buffer("log_p", torch.zeros(self.tasks))  # up to a constant, which the softmax removes

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        values = losses.detach()
        # A loss of 0 would give an infinite indicator, so its task does not take part.
        active = values > FLOOR if present is None else present & (values > FLOOR)
        values = masked(values, active)
        # The mean is subtracted for two reasons. log_p does not drift out of float32's precision, and an absent task,
        # which stays where it is, keeps its place relative to the mean of the others.
        self.log_p -= self.step_size * masked(values - values.sum() / count(active, values), active).to(self.log_p)
        indicators = softmax(self.log_p.to(values), active) * values.sum() / values.clamp(min=FLOOR)
        return combine(losses, group_means(indicators, active, self.clusters), active)


def group_means(values: Tensor, active: Tensor, clusters: int) -> Tensor:
    """k-means on a line: (T,) the mean of each value's group in the best partition into at most `clusters` groups.

    In one dimension a best group is a run of neighbours among the sorted values. So the best partition of the first j
    values into k groups has two parts: the best partition of the first i values into k − 1 groups, and the run [i, j).
    The algorithm tries all i.

    Args:
        values: (T,) numbers.
        active: (T,) bool; the other values are ignored, and their result is 0.
        clusters: largest number of groups.
    """
    order = torch.where(active, values, torch.inf).argsort(stable=True)
    x, weight = masked(values, active)[order], active[order].to(values)
    position = torch.arange(len(x) + 1, device=x.device)
    start, end = position[:, None, None], position[None, :, None]
    run = ((start <= position[:-1]) & (position[:-1] < end)) * weight  # (T+1, T+1, T): which values lie in [start, end)
    centre = run @ x / run.sum(-1).clamp(min=1)
    # (T+1, T+1) squared distances of the run's values from their mean; infinite if the run ends before it starts.
    cost = (run * (x - centre[..., None]).square()).sum(-1)
    cost = torch.where(position[:, None] <= position, cost, torch.inf)

    best, cuts = cost[0], []  # best[j]: least cost of the first j values; with one group it is the run [0, j)
    for _ in range(clusters - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    # Walk back from the end: each cut is the start of the group before it. A value's group number is the number of cuts
    # at or before it.
    edge, group = position[-1:], torch.zeros_like(position[:-1])
    for cut in reversed(cuts):
        edge = cut.gather(0, edge)
        group += position[:-1] >= edge
    member = (group[:, None] == torch.arange(clusters, device=x.device)) * weight[:, None]  # (T, clusters)
    means = x @ member / member.sum(0).clamp(min=1)
    return torch.zeros_like(x).scatter(0, order, member @ means)
