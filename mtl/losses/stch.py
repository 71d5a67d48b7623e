"""Smooth Tchebycheff scalarisation (STCH): a smooth maximum of the losses, each relative to its value after a warm-up.

Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, in the form that the
authors use for multi-task learning (LibMTL's too):

    L = T μ log Σ_i exp(log(L_i / n_i) / μ),   so w_i = T softmax(log(L / n) / μ)_i / L_i.

The nadir n_i is the mean loss of epoch 4, counted from 0. Up to the end of that epoch the loss is Σ_i log L_i. μ = 1;
a smaller μ gives the worst task more weight. Σw is not fixed.

The code needs no special case for Σ log L: with the constant n_i = L_i, w_i is 1 / L_i. So a task without a nadir
counts as being at its nadir. A task without labels in epoch 4 takes its nadir from its next epoch with labels. A mean
of exactly 0 counts as no nadir either, because nothing can be compared with it.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from mtl.losses.base import FLOOR, LossWeighting, Statistics, count, logs
from mtl.losses.epochs import mean_losses


class STCH(LossWeighting):
    """L = T μ log Σ_i (L_i / n_i)^{1/μ} with the nadir n from the epoch after the warm-up.

    Args:
        mu: μ; in the limit μ → 0 only the worst task counts.
        warmup_epochs: number of epochs before the one that gives the nadir.
    """

    needs_positive = True

    def __init__(
        self, tasks: int | Sequence[str], mu: Annotated[float, Gt(0)] = 1.0, warmup_epochs: Annotated[int, Ge(0)] = 4
    ):
        super().__init__(tasks)
        self.mu, self.warmup_epochs = mu, warmup_epochs
        self.register_buffer("finished", torch.zeros((), dtype=torch.long))  # number of finished epochs
        self.register_buffer("nadir", torch.full((self.tasks,), torch.nan))

    def epoch_end(self, statistics: Statistics) -> None:
        losses = mean_losses(self, statistics).to(self.nadir)
        self.finished += 1
        wanted = self.nadir.isnan() & (self.finished > self.warmup_epochs) & (losses > 0)
        self.nadir.copy_(torch.where(wanted, losses, self.nadir))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        x = logs(losses, present)
        # A task without a nadir is compared with its own current loss: x is 0, with the gradient of log L.
        x = (x - torch.where(self.nadir.isnan(), x.detach(), self.nadir.to(x).clamp(min=FLOOR).log())) / self.mu
        if present is not None:
            x = torch.where(present, x, -torch.inf)
        # If no task is present, the logarithm of the empty sum is −∞. The loss is then 0.
        return count(present, losses) * self.mu * torch.logsumexp(x, 0).nan_to_num(neginf=0.0)
