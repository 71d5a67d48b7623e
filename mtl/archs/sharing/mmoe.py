"""MMoE: Ma, Zhao, Yi, Chen, Hong & Chi, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD 2018.

All tasks share E experts f₁ … f_E. Each task has a gate, which mixes their features anew for each sample:

    zₜ = Σₑ softmax(Wₜ g(x))ₑ · fₑ(x)

An expert is a whole backbone, as in LibMTL, whose default is 2 for NYUv2. The paper's experts are small layers on a
vector x (8 of them in its experiments), and its gates see x itself, g(x) = x, without a bias.

Where repositories differ
- LibMTL's gates see the flattened image: 331,776 weights for each expert and task with NYUv2. Ours see the means over
  the fields of a grid, 8 by 8, so that they fit images of any size. `grid: 32` is LibMTL's on CIFAR-100. Vectors are
  seen as they are. As in LibMTL, a gate has a bias, because images are normalised around 0.
- Experts are shared, and gates and heads are a task's own, here and in LibMTL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from annotated_types import Ge
from torch import nn

from mtl.archs.model import Model, Outputs, Views
from mtl.archs.sharing.parts import Build, Glimpse, Shapes, expert, heads, layer_groups, mixed, parameters, stacked
from mtl.data.columns import Batch
from mtl.tasks import Task


class MMoE(Model):
    """Shared experts, and one gate for each task.

    The last shared tensor are the experts' features side by side, (N, E, …), for methods on the gradients of features.

    Args:
        build_backbone: makes an expert.
        tasks: the tasks.
        shapes: of one sample of each input.
        experts: number of experts.
        grid: a gate sees images as means over grid x grid fields.
    """

    def __init__(
        self,
        build_backbone: Build,
        tasks: Sequence[Task],
        shapes: Shapes,
        experts: Annotated[int, Ge(1)] = 2,
        grid: Annotated[int, Ge(1)] = 8,
    ):
        super().__init__()
        backbones = [build_backbone() for _ in range(experts)]
        self.heads = heads(backbones[0], tasks)
        self.experts = nn.ModuleList(map(expert, backbones))
        self.inputs = self.experts[0].inputs
        self.index = {task.name: i for i, task in enumerate(tasks)}
        self.glimpse = Glimpse(self.inputs, shapes, grid)
        self.gates = nn.ModuleList(nn.Linear(self.glimpse.width, experts) for _ in tasks)
        self.layer_groups = layer_groups(backbones[0], [f"experts.{e}.backbone" for e in range(experts)])

    def forward(self, batch: Batch, views: Views | None = None) -> Outputs:
        """The predictions of all tasks; `views` makes each task's input from the features."""
        features = stacked(e(batch).features for e in self.experts)
        seen, glimpse = [features] * len(self.heads) if views is None else views(features), self.glimpse(batch)
        mixtures = [mixed(gate, glimpse, one) for gate, one in zip(self.gates, seen, strict=True)]
        return Outputs([head(x) for head, x in zip(self.heads, mixtures, strict=True)], features)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return parameters(self.experts)

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        return parameters(self.gates[self.index[task]], self.heads[self.index[task]])
