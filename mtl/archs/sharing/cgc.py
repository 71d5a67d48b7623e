"""CGC: Tang, Liu, Zhao & Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for
Personalized Recommendations", RecSys 2020, section 4.1: customized gate control, a single level of PLE.

Besides the experts s that all tasks share, each task has experts eₜ of its own. Its gate mixes these two kinds:

    zₜ = Σᵢ softmax(Wₜ g(x))ᵢ · [eₜ(x), s(x)]ᵢ

An expert is a whole backbone, as in LibMTL, which has 1 shared expert and 1 for each task with NYUv2. These are our
defaults, too. What a gate sees is as in MMoE (mmoe.py).

Only the shared experts count as shared, as in LibMTL. Gates, heads and a task's experts are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import nn

from mtl.archs.model import Model, Outputs, Views
from mtl.archs.sharing.parts import Build, Glimpse, Shapes, expert, heads, layer_groups, mixed, parameters, stacked
from mtl.data.columns import Batch
from mtl.tasks import Task


class CGC(Model):
    """Shared experts, experts of each task, and one gate for each task.

    The last shared tensor are the shared experts' features side by side, (N, S, …), for methods on the gradients of
    features.

    Args:
        build_backbone: makes an expert.
        tasks: the tasks.
        shapes: of one sample of each input.
        shared_experts: number of experts that all tasks share.
        task_experts: number of experts of each task.
        grid: a gate sees images as means over grid x grid fields.
    """

    def __init__(
        self,
        build_backbone: Build,
        tasks: Sequence[Task],
        shapes: Shapes,
        shared_experts: Annotated[int, Ge(1)] = 1,
        task_experts: Annotated[int, Ge(1)] = 1,
        grid: Annotated[int, Ge(1)] = 8,
    ):
        super().__init__()
        backbones = [build_backbone() for _ in range(shared_experts)]
        self.heads = heads(backbones[0], tasks)
        self.shared = nn.ModuleList(map(expert, backbones))
        self.own = nn.ModuleList(nn.ModuleList(expert(build_backbone()) for _ in range(task_experts)) for _ in tasks)
        self.inputs = self.shared[0].inputs
        self.index = {task.name: i for i, task in enumerate(tasks)}
        self.glimpse = Glimpse(self.inputs, shapes, grid)
        self.gates = nn.ModuleList(nn.Linear(self.glimpse.width, task_experts + shared_experts) for _ in tasks)
        self.layer_groups = layer_groups(backbones[0], [f"shared.{e}.backbone" for e in range(shared_experts)])

    def forward(self, batch: Batch, views: Views | None = None) -> Outputs:
        """The predictions of all tasks; `views` makes each task's input from the features."""
        features = stacked(e(batch).features for e in self.shared)
        seen, glimpse = [features] * len(self.heads) if views is None else views(features), self.glimpse(batch)
        predictions = []
        for gate, head, experts, shared in zip(self.gates, self.heads, self.own, seen, strict=True):
            own = stacked(e(batch).features for e in experts.children())
            predictions.append(head(mixed(gate, glimpse, torch.cat((own, shared), 1))))
        return Outputs(predictions, features)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return parameters(self.shared)

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        t = self.index[task]
        return parameters(self.own[t], self.gates[t], self.heads[t])
