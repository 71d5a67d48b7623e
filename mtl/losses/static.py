"""Static weighting: L = Σ_i w_i L_i with weights that never change.

With tuned weights it is the strong baseline of Xin et al., "Do Current Multi-Task Optimization Methods in Deep
Learning Even Help?", NeurIPS 2022.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.losses.base import LossWeighting, masked


class Static(LossWeighting):
    """L = Σ_i w_i L_i.

    Args:
        weights: one weight per task, by name or in task order. In {fine: 1, coarse: 0.5} a task that is left out
            weighs 1.

    Raises:
        ValueError: a name belongs to no task, the mapping is empty, or the list has not T entries. Also if a weight is
            negative, or all are 0.
    """

    def __init__(self, tasks: int | Sequence[str], weights: Mapping[str, float] | Sequence[float]):
        super().__init__(tasks)
        if isinstance(weights, Mapping):
            weights = {str(name): value for name, value in weights.items()}  # tasks=3 has names "0", "1", "2"
            if not weights:
                raise ValueError(
                    f"weights: names no task; the tasks are {', '.join(self.names)} (loss=equal weighs all 1)"
                )
            if unknown := set(weights) - set(self.names):
                raise ValueError(f"weights: {sorted(unknown)[0]!r} is no task; the tasks are {', '.join(self.names)}")
            # A task that is left out weighs 1, not 0: leaving it out must not switch it off.
            weights = [weights.get(name, 1.0) for name in self.names]
        if len(weights) != self.tasks:
            raise ValueError(f"weights: {len(weights)} given for {self.tasks} tasks ({', '.join(self.names)})")
        if min(weights) < 0:
            raise ValueError(f"weights: {min(weights)} is negative")
        if not any(weights):
            raise ValueError("weights: all are 0; nothing would be trained")
        self.register_buffer("weights", torch.tensor(list(weights), dtype=torch.float32))

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        return (self.weights.to(losses) * masked(losses, present)).sum()
