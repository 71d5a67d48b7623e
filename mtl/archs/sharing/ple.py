"""PLE: Tang, Liu, Zhao & Gong, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for
Personalized Recommendations", RecSys 2020.

Several levels of CGC (cgc.py), one on another. At level l, task t has experts eₜˡ, and s are the shared experts. A gate
of each task, and one of the shared part, mix their outputs:

    xₜˡ = Σᵢ softmax(Wₜˡ g(xₜˡ⁻¹))ᵢ · [eₜˡ(xₜˡ⁻¹), sˡ(xₛˡ⁻¹)]ᵢ
    xₛˡ = Σᵢ softmax(Wₛˡ g(xₛˡ⁻¹))ᵢ · [e₁ˡ(x₁ˡ⁻¹), …, e_Tˡ(x_Tˡ⁻¹), sˡ(xₛˡ⁻¹)]ᵢ

The last level has no shared gate, and its xₜ goes to the head of task t. The paper's experts are layers on vectors, and
it reports two levels. Here an expert at level l is the l-th part of a backbone: each of its stages is a level, as
in LibMTL, unless `levels` joins some. `levels: 1` is CGC. A gate of the first level sees the images as in MMoE
(mmoe.py), later ones see the means over a map.

Where repositories differ
- LibMTL has no shared gate, and no shared stream: each shared expert runs once for every task, on that task's xₜ. Then
  a task's experts never serve another task. With the paper's equations they do: through the shared gate, an expert of
  any level except the last reaches all tasks. So these "task experts" are declared shared here. A task's own are its
  experts of the last level, its gates of the last two levels, and its head. LibMTL counts the shared experts alone.
- LibMTL's gates see whole flattened maps, and the stem is a level of its own there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from annotated_types import Ge
from torch import Tensor, nn

from mtl.archs.model import Model, Outputs
from mtl.archs.sharing.parts import Build, Glimpse, Shapes, heads, layer_groups, mixed, parameters, stacked
from mtl.archs.stages import own_of_stages, stages_of
from mtl.data.columns import Batch
from mtl.tasks import Task


class PLE(Model):
    """Levels of shared experts, task experts and gates.

    What the tasks share ends in several tensors. So methods on the gradients of features are refused.

    Args:
        build_backbone: makes a backbone in stages.
        tasks: the tasks.
        shapes: of one sample of each input.
        shared_experts: number of experts that all tasks share, at each level.
        task_experts: number of experts of each task, at each level.
        levels: number of levels; null: one for each stage of the backbone.
        grid: a gate sees images as means over grid x grid fields.

    Raises:
        ArchError: the backbone has no stages.
        ValueError: it has fewer stages than `levels`.
    """

    def __init__(
        self,
        build_backbone: Build,
        tasks: Sequence[Task],
        shapes: Shapes,
        shared_experts: Annotated[int, Ge(1)] = 1,
        task_experts: Annotated[int, Ge(1)] = 1,
        levels: Annotated[int, Ge(1)] | None = None,
        grid: Annotated[int, Ge(1)] = 8,
    ):
        super().__init__()
        self.shared = nn.ModuleList(build_backbone() for _ in range(shared_experts))
        self.own = nn.ModuleList(nn.ModuleList(build_backbone() for _ in range(task_experts)) for _ in tasks)
        stages = stages_of(first := self.shared[0], type(self).__name__)
        if levels is not None and levels > len(stages):
            raise ValueError(f"levels: {levels}; {type(first).__name__} has {len(stages)} stages, a level needs one")
        # The stages at which levels begin, and the end: 3 stages in 2 levels are [0, 2, 3].
        count = levels or len(stages)
        self.bounds = [round(i * len(stages) / count) for i in range(count + 1)]
        self.inputs = tuple(getattr(first, "inputs", self.inputs))
        self.index = {task.name: i for i, task in enumerate(tasks)}
        self.heads = heads(first, tasks)
        self.glimpse = Glimpse(self.inputs, shapes, grid)
        widths = [self.glimpse.width, *(stages[end - 1].channels for end in self.bounds[1:-1])]
        each, all_ = task_experts + shared_experts, len(tasks) * task_experts + shared_experts
        self.gates = nn.ModuleList(nn.ModuleList(nn.Linear(width, each) for width in widths) for _ in tasks)
        self.shared_gates = nn.ModuleList(nn.Linear(width, all_) for width in widths[:-1])
        paths = [f"shared.{e}" for e in range(shared_experts)]
        paths += [f"own.{t}.{e}" for t in range(len(tasks)) for e in range(task_experts)]
        self.layer_groups = layer_groups(first, paths)

    def forward(self, batch: Batch) -> Outputs:
        image, last = batch[self.inputs[0]], len(self.bounds) - 2
        kept = {id(net): [] for net in self._copies()}
        maps, common = [image] * len(self.own), image
        for level in range(last + 1):
            # What the gates see of a task's map, and of the shared one.
            glimpses = [self._glimpse(level, x, batch) for x in (*maps, common)]
            own = [
                [self._run(net, level, x, kept) for net in nets.children()]
                for nets, x in zip(self.own, maps, strict=True)
            ]
            shared = [self._run(net, level, common, kept) for net in self.shared]
            maps = [
                mixed(gates[level], seen, stacked([*mine, *shared]))
                for gates, seen, mine in zip(self.gates, glimpses[:-1], own, strict=True)
            ]
            if level < last:
                everything = [x for mine in own for x in mine] + shared
                common = mixed(self.shared_gates[level], glimpses[-1], stacked(everything))
        return Outputs([head(x) for head, x in zip(self.heads, maps, strict=True)])

    def _glimpse(self, level: int, x: Tensor, batch: Batch) -> Tensor:
        return x.mean((2, 3)) if level else self.glimpse(batch)

    def _run(self, net: nn.Module, level: int, x: Tensor, kept: dict[int, list[Any]]) -> Tensor:
        """One expert's output at a level. At the last level, it includes what makes a map the features."""
        for stage in stages_of(net, type(self).__name__)[self.bounds[level] : self.bounds[level + 1]]:
            x = stage(x, kept[id(net)])
        return x if level < len(self.bounds) - 2 else net.finish(x, kept[id(net)])

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        early = [p for nets in self.own for net in nets.children() for p in self._parts(net)[0]]
        gates = [p for task in self.gates for gate in task[:-2] for p in gate.parameters()]
        return [*parameters(self.shared), *early, *gates, *parameters(self.shared_gates)]

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        t = self.index[task]
        late = [p for net in self.own[t].children() for p in self._parts(net)[1]]
        return [*late, *parameters(self.gates[t][-2:], self.heads[t])]

    def _parts(self, net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """A backbone's parameters before the last level, and at the last level."""
        each, begin = own_of_stages(net, stages_of(net, type(self).__name__)), self.bounds[-2]
        return [p for stage in each[:begin] for p in stage], [p for stage in each[begin:] for p in stage]

    def _copies(self) -> list[nn.Module]:
        return [*self.shared, *(net for nets in self.own for net in nets.children())]
