"""Lightning with a gradient method: `mtl.backward` in the place of `loss.backward()`.

Run: pip install lightning, then python docs/examples/lightning_loop.py
"""

import lightning as L
import torch
from problem import Rows, TwoHeads
from torch.utils.data import DataLoader

import mtl


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # Lightning's own backward pass knows one loss only
        self.model, self.strategy = TwoHeads(), mtl.losses.PCGrad(tasks=["sign", "total"])
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = self.model.losses(batch)
        info = mtl.backward(losses, self.strategy, self.model.backbone, self.model.heads)
        optimizer.step()
        self.seen.append(torch.stack(losses).detach())
        self.log("cosine", info.cosine)


def main():
    L.seed_everything(0, verbose=False)
    module = Module()
    trainer = L.Trainer(max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(Rows(), batch_size=32, shuffle=True))
    print("losses", module.seen[0].tolist(), "became", module.seen[-1].tolist())
    return module


if __name__ == "__main__":
    main()
