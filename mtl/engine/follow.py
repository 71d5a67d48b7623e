"""A run over several processes: what the others do while the leader runs the job."""

from __future__ import annotations

from collections.abc import Mapping

from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine.learner import Learner


def hand_out(learner: Learner, epoch: int) -> int:
    """The leader's learner, after `epoch` epochs, becomes that of all; returns the leader's epoch."""
    processes = learner.processes
    state = processes.hand_out({"epoch": epoch, **learner.state()} if processes.leads else None)
    if not processes.leads:
        learner.load_state(state)
    return state["epoch"]


def follow(learner: Learner, train: TrainingBatches, evaluations: Mapping[str, EvaluationBatches]) -> None:
    """The same training as the leader's, and nothing else."""
    with learner.processes.guard():
        for epoch in range(hand_out(learner, 0), learner.trainer.epochs):
            row = learner.train_epoch(train, epoch)
            for name, batches in evaluations.items():
                row.update(learner.evaluate(batches, name))
            learner.epoch_end(row)
