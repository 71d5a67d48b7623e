"""Single-task learning: the loss of one task alone, L = L_k. Δm and every claim that "MTL helps" need this baseline.

The engine builds heads, losses and metrics for that task only. The other tasks do not exist in such a run.
"""

from collections.abc import Sequence

from torch import Tensor

from mtl.losses.base import LossWeighting, masked


class Single(LossWeighting):
    """L = L_k.

    Args:
        tasks: number or names of all tasks of the benchmark.
        task: the name of the task to train.

    Raises:
        ValueError: there is no task of this name.
    """

    def __init__(self, tasks: int | Sequence[str], task: str):
        super().__init__(tasks)
        if task not in self.names:
            raise ValueError(f"task: {task!r} is no task; the tasks are {', '.join(self.names)}")
        self.names = (task,)

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(losses, present).sum()
