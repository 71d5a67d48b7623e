"""Whether training has left the finite numbers: in a loss, a metric, the gradient or the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from mtl.data.batches import EvaluationBatches
from mtl.data.check import pieces
from mtl.engine.learner import Learner
from mtl.tasks import Task


def find(
    row: Mapping[str, float],
    tasks: Sequence[Task],
    evaluations: Mapping[str, EvaluationBatches],
    partial: Collection[str],
) -> str | None:
    """The first value in a row that no longer means anything, such as "ink mae on test data became nan".

    A task without any label in a split has no loss and no metric there; its NaN is no divergence.

    Args:
        row: of metrics.jsonl, with or without its evaluation.
        tasks: that the row is about.
        evaluations: the data of each split except "train".
        partial: names of the tasks that lack labels in the training data.
    """
    wrong = {key: value for key, value in row.items() if not math.isfinite(value)}
    for split in ("train", *evaluations):
        where = "" if split == "train" else f" on {split} data"
        for task in tasks:
            for name in ("loss", *(score.name for score in task.scores)):
                value = wrong.get(f"{split}/{task.name}_{name}", 0.0)
                if math.isinf(value) or (math.isnan(value) and _has_labels(task, evaluations.get(split), partial)):
                    return f"{task.name} {name.replace('_', ' ')}{where} became {value}"
    return f"gradient norm became {wrong['grad/norm']}" if "grad/norm" in wrong else None


def _has_labels(task: Task, batches: EvaluationBatches | None, partial: Collection[str]) -> bool:
    if batches is None:
        # Nobody knows which samples the epoch's last, incomplete batch left out. The weights tell: `finite`.
        return task.name not in partial
    return any(bool(task.labelled(part).any()) for part in pieces(batches.split, task.column))


def finite(learner: Learner) -> bool:
    """Whether all parameters are finite numbers, of the model and of the method; the host waits once."""
    parameters = [*learner.model.parameters(), *learner.strategy.parameters()]
    return not parameters or bool(torch.stack([p.detach().isfinite().all() for p in parameters]).all())
