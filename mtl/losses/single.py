"""Single-task learning: the one task's loss alone, L = L_k. The baseline that Δm and every "MTL helps" claim need.

The engine builds heads, losses and metrics for that one task only: the other tasks do not exist in such a run.
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
        ValueError: `task` is none of the tasks.
    """

    def __init__(self, tasks: int | Sequence[str], task: str):
        super().__init__(tasks)
        if task not in self.names:
            raise ValueError(f"task: {task!r} is no task; the tasks are {', '.join(self.names)}")
        self.names = (task,)

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return masked(losses, present).sum()
