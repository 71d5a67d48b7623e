"""Early stopping: a run ends when its validation result has not been better for `trainer.patience` epochs.

The decision follows from the rows of metrics.jsonl alone. So a resumed run stops after the same epoch as one that was
not interrupted, and nothing has to be saved. Better is what makes an epoch best.pt: see `mtl.engine.summary.best`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mtl.data.check import has_labels
from mtl.data.columns import Split
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.engine.summary import Row, Selection, best, selection
from mtl.errors import ConfigError
from mtl.tracking.console import count


def stops(rows: Sequence[Row], trainer: Execution, chosen: Selection) -> bool:
    """Whether a run stops after `rows`, before `trainer.epochs`.

    In a run with stages only the last stage may end early, and its epochs alone are waited for. An earlier stage must
    not be cut off, because the stages after it build on it.

    Args:
        rows: of the epochs so far.
        trainer: `patience` epochs in a row without a better result end the run; None: no number does.
        chosen: what chooses best.pt.
    """
    if trainer.patience is None or not 0 < len(rows) < trainer.epochs:
        return False
    begin = trainer.epochs - trainer.plan[-1].epochs  # number of epochs before the last stage
    return len(rows) - max(best(rows, chosen)["epoch"], begin) >= trainer.patience


def ends(learner: Learner, stop: bool) -> bool:
    """The first process's `stop`, in all processes. Each of them must call this before every epoch.

    Their own results may differ in the last bits, on several GPUs. If each decided by itself, some would wait for ever.
    """
    processes = learner.processes
    if processes is None or learner.trainer.patience is None:
        return stop
    return processes.hand_out({"stop": stop} if processes.leads else None)["stop"]


def check_patience(learner: Learner, validation: Split | None, select: str) -> None:
    """Check, if `trainer.patience` is set, that a validation result can tell when to stop.

    Args:
        learner: of the run.
        validation: the validation data; None without any.
        select: the benchmark's, as for `mtl.engine.summary.selection`.

    Raises:
        ConfigError: it cannot. The test set never does instead.
    """
    if (patience := learner.trainer.patience) is None:
        return
    key, by = f"trainer.patience={patience}", selection(learner.tasks, True, select)
    if validation is None:
        raise ConfigError(f"{key}: needs validation data, since test data must not decide when a run stops; "
                          "set data.val_fraction=0.1")  # fmt: skip
    deciding = [task for task in learner.tasks if f"val/{task.name}_{task.scores[0].name}" in by.keys]
    stages = learner.trainer.plan
    if not any(stages[-1].counts(task.name) for task in deciding):
        raise ConfigError(f"{key}: {by.by} decides, and the last stage does not train {deciding[0].name}; name it in "
                          f"trainer.stages[{len(stages) - 1}].tasks, or leave the patience out")  # fmt: skip
    if not any(has_labels(validation, task) for task in deciding):
        raise ConfigError(f"{key}: {by.by} decides, and no validation sample has a label of {deciding[0].name}; "
                          "set a larger data.val_fraction")  # fmt: skip


def said(rows: Sequence[Row], patience: int, chosen: Selection) -> str:
    """The line for the console."""
    without, epoch = count(patience, "epoch"), best(rows, chosen)["epoch"]
    return f"stopped after epoch {len(rows)}: no better {chosen.by} for {without} (best: epoch {epoch})"
