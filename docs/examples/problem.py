"""What the loops beside this file train: two tasks on random rows, and a network with a head for each. PyTorch only."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset


class Rows(Dataset):
    """Items {"row": (8,), "sign": class, "total": number}."""

    def __init__(self, size: int = 256, seed: int = 0):
        self.row = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.row)

    def __getitem__(self, i):
        return {"row": self.row[i], "sign": (self.row[i, 0] > 0).long(), "total": self.row[i, :4].sum()}


class TwoHeads(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, width), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(width, 2), nn.Linear(width, 1)])

    def forward(self, row):
        features = self.backbone(row)
        return [head(features) for head in self.heads]

    def losses(self, batch):
        sign, total = self(batch["row"])
        return [cross_entropy(sign, batch["sign"]), mse_loss(total.squeeze(1), batch["total"])]
