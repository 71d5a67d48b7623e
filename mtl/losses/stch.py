"""Smooth Tchebycheff scalarisation (STCH): a smooth maximum of the losses relative to their nadir.

Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, in the form that the authors
use for multi-task learning (LibMTL's too):

    L = T μ log Σ_i exp(log(L_i / n_i) / μ),   so w_i = T softmax(log(L / n) / μ)_i / L_i,

with nadir n_i the mean loss of epoch 4, counted from 0, and Σ_i log L_i up to the end of that epoch. μ = 1; the
smaller, the more the worst task counts. Σw is whatever the losses say.

Σ log L needs no case of its own: with n_i = L_i, a constant, w_i is 1 / L_i. So a task whose nadir is not known yet
counts as being at its nadir. One without a label in epoch 4 takes it from its first epoch with labels after that;
a mean of exactly 0, with which nothing can be compared, counts as no nadir either.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.losses.base import FLOOR, LossWeighting, Statistics, count, logs
from mtl.losses.epochs import mean_losses


class STCH(LossWeighting):
    """L = T μ log Σ_i (L_i / n_i)^{1/μ} with n learned in the warm-up.

    Args:
        tasks: number or names of the tasks.
        mu: μ; the limit 0 is the maximum over the tasks.
        warmup_epochs: epochs before the one that gives the nadir.
    """

    needs_positive = True

    def __init__(
        self, tasks: int | Sequence[str], mu: Annotated[float, Gt(0)] = 1.0, warmup_epochs: Annotated[int, Ge(0)] = 4
    ):
        super().__init__(tasks)
        self.mu, self.warmup_epochs = mu, warmup_epochs
        self.register_buffer("finished", torch.zeros((), dtype=torch.long))  # epochs
        self.register_buffer("nadir", torch.full((self.tasks,), torch.nan))

    def epoch_end(self, statistics: Statistics) -> None:
        losses = mean_losses(self, statistics).to(self.nadir)
        self.finished += 1
        wanted = self.nadir.isnan() & (self.finished > self.warmup_epochs) & (losses > 0)
        self.nadir.copy_(torch.where(wanted, losses, self.nadir))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        x = logs(losses, present)
        x = (x - torch.where(self.nadir.isnan(), x.detach(), self.nadir.to(x).clamp(min=FLOOR).log())) / self.mu
        if present is not None:
            x = torch.where(present, x, -torch.inf)
        # Nobody present: the logarithm of an empty sum.
        return count(present, losses) * self.mu * torch.logsumexp(x, 0).nan_to_num(neginf=0.0)
