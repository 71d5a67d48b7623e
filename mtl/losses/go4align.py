"""GO4Align: tasks that behave alike form groups, and a group shares one weight.

Shen et al., "GO4Align: Group Optimization for Multi-Task Alignment", NeurIPS 2024. In every step, losses detached:

    p_i ∝ p_i exp(−β L_i),   γ_i = p_i Σ_j L_j / L_i,   w_i = mean of γ over i's group,   L = Σ_i w_i L_i,

where k-means on the T numbers γ_i makes the groups. p = 1/T at first, β = 1e-4. Σw = Σγ is not normalised: about T for
equal losses, more for others.

`clusters` is a hyper-parameter of the paper. The default of the authors' code (trainer.py for NYUv2) is 1, which gives
all tasks one weight: equal weighting with a step of varying length. The default here is 2, the least number that groups
anything; `clusters=1` is the authors'.

The authors call a library's k-means with random starts. On a line k-means has an exact solution, by dynamic programming
over the sorted numbers: it stays on the device and draws nothing. More groups than tasks (on which the default of a
well-known port, 5, crashes) are refused, except for a single task, which is a group of its own. A loss of exactly 0,
whose γ would be infinite, counts as absent in that step; an absent task keeps its p relative to the mean of the others.
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
        tasks: number or names of the tasks.
        clusters: number of groups; 1 for the mean of all indicators, T for no groups.
        step_size: β, how fast p moves away from tasks of high loss.

    Raises:
        ValueError: more groups than tasks, of which there are several.
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
        self.register_buffer("log_p", torch.zeros(self.tasks))  # up to a constant, which the softmax does not see

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        values = losses.detach()
        active = values > FLOOR if present is None else present & (values > FLOOR)
        values = masked(values, active)
        # Less the mean, so that log_p neither drifts out of float32's precision nor passes an absent task by.
        self.log_p -= self.step_size * masked(values - values.sum() / count(active, values), active).to(self.log_p)
        indicators = softmax(self.log_p.to(values), active) * values.sum() / values.clamp(min=FLOOR)
        return combine(losses, group_means(indicators, active, self.clusters), active)


def group_means(values: Tensor, active: Tensor, clusters: int) -> Tensor:
    """k-means on a line: (T,) the mean of each value's group in the best partition into at most `clusters` groups.

    A best group is a run of the sorted values, so the best partition into k groups that ends before j is the best one
    into k − 1 that ends before some i, and the run [i, j).

    Args:
        values: (T,) numbers.
        active: (T,) bool; the other values take no part, and their result is 0.
        clusters: k.
    """
    order = torch.where(active, values, torch.inf).argsort(stable=True)
    x, weight = masked(values, active)[order], active[order].to(values)
    position = torch.arange(len(x) + 1, device=x.device)
    start, end = position[:, None, None], position[None, :, None]
    run = ((start <= position[:-1]) & (position[:-1] < end)) * weight  # (T+1, T+1, T): who is in [start, end)
    centre = run @ x / run.sum(-1).clamp(min=1)
    cost = (run * (x - centre[..., None]).square()).sum(-1)
    cost = torch.where(position[:, None] <= position, cost, torch.inf)

    best, cuts = cost[0], []
    for _ in range(clusters - 1):
        best, cut = (best[:, None] + cost).min(0)
        cuts.append(cut)
    edge, group = position[-1:], torch.zeros_like(position[:-1])
    for cut in reversed(cuts):
        edge = cut.gather(0, edge)
        group += position[:-1] >= edge
    member = (group[:, None] == torch.arange(clusters, device=x.device)) * weight[:, None]  # (T, clusters)
    means = x @ member / member.sum(0).clamp(min=1)
    return torch.zeros_like(x).scatter(0, order, member @ means)
