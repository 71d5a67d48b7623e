"""The Trainer of Hugging Face with a gradient method: `mtl.backward` in its `training_step`.

Run: pip install transformers accelerate, then python docs/examples/huggingface_trainer.py
"""

import torch
from problem import Rows, TwoHeads
from transformers import Trainer, TrainingArguments

import mtl


class MultiTaskTrainer(Trainer):
    """One process; with gradient accumulation or fp16 write your own loop around `mtl.Step`."""

    def __init__(self, *args, strategy, **kwargs):
        super().__init__(*args, **kwargs)
        self.strategy, self.seen = strategy, []

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        losses = model.losses(self._prepare_inputs(inputs))
        mtl.backward(losses, self.strategy, model.backbone, model.heads)  # the Trainer then makes the step
        self.seen.append(torch.stack(losses).detach())
        return self.seen[-1].sum()


def main(folder="trainer-output"):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, num_train_epochs=8, per_device_train_batch_size=32, learning_rate=0.01, max_grad_norm=0.0,
        report_to="none", save_strategy="no", remove_unused_columns=False, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = MultiTaskTrainer(TwoHeads(), arguments, train_dataset=Rows(), strategy=mtl.losses.CAGrad(tasks=2))
    trainer.train()
    print("losses", trainer.seen[0].tolist(), "became", trainer.seen[-1].tolist())
    return trainer


if __name__ == "__main__":
    main()
