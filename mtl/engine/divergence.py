"""Whether training has left the finite numbers: in a loss, a metric, the gradient or the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from mtl.data.batches import EvaluationBatches
from mtl.engine.trainer import Learner


def find(row: Mapping[str, float], learner: Learner, evaluations: Mapping[str, EvaluationBatches]) -> str | None:
    """The first value in a row that no longer means anything, such as "ink mae on test data became nan".

    A task without any label in a split has no loss and no metric there; its NaN is no divergence.

    Args:
        row: of metrics.jsonl, with or without its evaluation.
        learner: whose tasks the row is about.
        evaluations: the data of each split but "train".
    """
    wrong = {key: value for key, value in row.items() if not math.isfinite(value)}
    for split in ("train", *evaluations):
        where = "" if split == "train" else f" on {split} data"
        for task in learner.tasks:
            for name in ("loss", *(m.name for m in task.metrics)):
                value = wrong.get(f"{split}/{task.name}_{name}", 0.0)
                if math.isinf(value) or (math.isnan(value) and _has_labels(task, evaluations.get(split))):
                    return f"{task.name} {name.replace('_', ' ')}{where} became {value}"
    return f"gradient norm became {wrong['grad/norm']}" if "grad/norm" in wrong else None


def _has_labels(task, batches: EvaluationBatches | None) -> bool:
    if not task.partial:
        return True
    # Of training, nobody knows which samples the epoch's last, incomplete batch left out. The weights tell: `finite`.
    return batches is not None and bool(task.count(batches.split.targets[task.name]) > 0)


def finite(learner: Learner) -> bool:
    """Whether all parameters are finite numbers, of the model and of the method; the host waits once."""
    parameters = [*learner.model.parameters(), *learner.strategy.parameters()]
    return not parameters or bool(torch.stack([p.detach().isfinite().all() for p in parameters]).all())
