"""A user's own loss, for loss=custom: uncertainty weighting with a factor that grows over the epochs."""

import torch
from torch import nn


class MultiTaskLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.zeros(3))

    def forward(self, digit_loss, odd_loss, ink_loss, epoch, total_epochs):
        losses = torch.stack([digit_loss, odd_loss, ink_loss])
        return ((-self.scales).exp() * losses + self.scales).sum() * (1 + epoch / total_epochs)
