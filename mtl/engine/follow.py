"""A run over several processes: the part of those that do not lead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine.learner import Learner
from mtl.engine.outcome import Outcome


def hand_out(learner: Learner, epoch: int) -> int:
    """Give all processes the leader's learner, which has trained `epoch` epochs; return the leader's epoch."""
    processes = learner.processes
    state = processes.hand_out({"epoch": epoch, **learner.state()} if processes.leads else None)
    if not processes.leads:
        learner.load_state(state)
    return state["epoch"]


@dataclass
class Follower:
    """A run in a process that does not lead: the same training as the leader's, and nothing else.

    Args:
        learner, train, evaluations: as in `mtl.engine.run.Job`.
        path: of the run's directory, in which the leader writes.
    """

    learner: Learner
    train: TrainingBatches
    evaluations: Mapping[str, EvaluationBatches]
    path: str

    def execute(self) -> Outcome:
        """Train to the end; `Processes.guard` ends this process if training fails in any of them."""
        learner = self.learner
        with learner.processes.guard():
            for epoch in range(hand_out(learner, 0), learner.trainer.epochs):
                row = learner.train_epoch(self.train, epoch)
                for name, batches in self.evaluations.items():
                    row.update(learner.evaluate(batches, name))
                learner.epoch_end(row)
        return Outcome("finished", 0, self.path)
