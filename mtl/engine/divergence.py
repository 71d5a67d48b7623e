"""Finds NaN and infinity in a training: in losses, metrics, the gradient or the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtl.data.batches import EvaluationBatches
from mtl.data.check import has_labels
from mtl.engine import guard
from mtl.errors import Diverged
from mtl.losses.delayed import Delayed
from mtl.tasks import Task


class Alarm:
    """Ends an epoch early if a loss or the gradient becomes NaN or infinite.

    The device notes the first such step. The host reads this note without waiting: at once on a CPU, and at most
    `mtl.losses.delayed.LATE` + 1 steps later on a GPU. So a diverged run does not train to the end of its epoch.

    Args:
        names: names of the T tasks.
        epoch: number of the epoch, counted from 0.
        strategy: name of the method, for the message.
    """

    def __init__(self, names: Sequence[str], epoch: int, strategy: str):
        self.names, self.epoch, self.strategy = [*(f"{name} loss" for name in names), "gradient norm"], epoch, strategy
        self._steps, self._delayed = 0, Delayed()
        self._first: Tensor | None = None  # (2, T + 1) the step and value of the first number that was not finite

    @torch.no_grad()
    def see(self, losses: Sequence[Tensor], norm: Tensor, counts: Tensor | None = None) -> None:
        """Check one step.

        Args:
            losses: T scalars.
            norm: () norm of the gradient.
            counts: (T,) bool, the tasks whose losses count; None for all.

        Raises:
            Diverged: a loss or norm of a step so far is NaN or infinite. The message names task, step and method.
        """
        self._steps += 1
        values = torch.stack([*losses, norm.to(losses[0])])
        if counts is not None:
            values = torch.where(torch.cat([counts, counts.new_ones(1)]), values, 0.0)
        finite = values.isfinite()
        if (known := guard.host(finite)) is not None:
            if not all(known):
                i = known.index(False)
                raise self._diverged(i, self._steps, values[i].item())
            return
        if self._first is None:
            self._first = torch.zeros(2, len(values), dtype=torch.float64, device=values.device)
        now = torch.stack([torch.full_like(values, self._steps), values]).double()
        self._first = torch.where(finite | (self._first[0] > 0), self._first, now)
        if (first := self._delayed.read(self._first)) is not None and any(first[0]):
            step, i = min((int(step), i) for i, step in enumerate(first[0]) if step)
            raise self._diverged(i, step, first[1][i])

    def _diverged(self, i: int, step: int, value: float) -> Diverged:
        message = f"{self.names[i]} became {value} in epoch {self.epoch + 1}, at step {step} with {self.strategy}"
        if self.epoch == 0 and step == 1 and i < len(self.names) - 1:  # before any update
            return Diverged(message, "no rate is to blame: look for NaN and huge numbers among inputs and labels")
        return Diverged(message)


def find(
    row: Mapping[str, float],
    tasks: Sequence[Task],
    evaluations: Mapping[str, EvaluationBatches],
    partial: Collection[str],
) -> str | None:
    """Describe the first NaN or infinity in a row, such as "ink mae on test data became nan"; None if there is none.

    If a task has no label in a split, its loss and metrics there are NaN. This is not divergence.

    Args:
        row: a row of metrics.jsonl, with or without evaluation.
        tasks: the run's tasks.
        evaluations: the data of each split except "train".
        partial: names of the tasks that lack labels in the training data.
    """
    wrong = {key: value for key, value in row.items() if not math.isfinite(value)}
    for split in ("train", *evaluations):
        where = "" if split == "train" else f" on {split} data"
        for task in tasks:
            lack = {score.name for score in task.scores if score.may_lack}
            for name in ("loss", *(score.name for score in task.scores)):
                value = wrong.get(f"{split}/{task.name}_{name}", 0.0)
                known = math.isnan(value) and name not in lack
                if math.isinf(value) or (known and _has_labels(task, evaluations.get(split), partial)):
                    return f"{task.name} {name.replace('_', ' ')}{where} became {value}"
    return f"gradient norm became {wrong['grad/norm']}" if "grad/norm" in wrong else None


def _has_labels(task: Task, batches: EvaluationBatches | None, partial: Collection[str]) -> bool:
    """Whether a task has labels in a split; `batches` is None for the training split."""
    if batches is None:
        # With few labels, all of them may have been in the last, incomplete batch, which was left out. If the training
        # has really diverged, the weights show it: see `finite`.
        return task.name not in partial
    return has_labels(batches.split, task)


def finite(*modules: nn.Module) -> bool:
    """Whether all parameters of the modules are finite. The host waits for the device, once."""
    parameters = [p for module in modules for p in module.parameters()]
    return not parameters or bool(torch.stack([p.detach().isfinite().all() for p in parameters]).all())
