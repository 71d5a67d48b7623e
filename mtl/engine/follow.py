"""A run on several processes (torchrun): what the processes other than the first one do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine.learner import Learner
from mtl.engine.outcome import Outcome
from mtl.engine.stopping import ends


def hand_out(learner: Learner, epoch: int) -> int:
    """Copy the leader's state (weights, optimizer, method) to all processes. All processes must call this.

    Args:
        learner: receives the state, except in the leader.
        epoch: number of epochs that the leader has trained; ignored in the other processes.

    Returns:
        the leader's `epoch`.
    """
    processes = learner.processes
    state = processes.hand_out({"epoch": epoch, **learner.state()} if processes.leads else None)
    if not processes.leads:
        learner.load_state(state)
    return state["epoch"]


@dataclass
class Follower:
    """A run in a process other than the first one. It trains like the leader, but writes no files and no messages.

    Args:
        learner, train, evaluations: as in `mtl.engine.run.Job`.
        path: the run's directory, in which the leader writes.
    """

    learner: Learner
    train: TrainingBatches
    evaluations: Mapping[str, EvaluationBatches]
    path: str

    def execute(self) -> Outcome:
        """Train to the end. If training fails in any process, `Processes.guard` ends this one."""
        learner = self.learner
        with learner.processes.guard():
            epoch = hand_out(learner, 0)
            while epoch < learner.trainer.epochs and not ends(learner, False):
                row = learner.train_epoch(self.train, epoch)
                for name, batches in self.evaluations.items():
                    row.update(learner.evaluate(batches, name))
                learner.epoch_end(row)
                epoch += 1
        return Outcome("finished", 0, self.path)
