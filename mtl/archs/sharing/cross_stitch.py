"""Cross-stitch networks: Misra, Shrivastava, Gupta & Hebert, "Cross-stitch Networks for Multi-task Learning", CVPR
2016, arXiv 1604.03539.

Every task has a backbone of its own. After a stage l, task t goes on with a mixture of all tasks' maps:

    x̃ₜˡ = Σⱼ αₜⱼˡ xⱼˡ

The paper starts with α = 0.9 for the own map and 0.1 for the other one; with T tasks the others get 0.1 / (T − 1) each.
It trains the units 100 to 1,000 times faster than the backbones, which start from single-task networks. Here all learn
at one rate, and the backbones start as `arch` says: equal where they are pretrained, otherwise each with weights of its
own.

Where repositories differ
- LibMTL starts with α = 1 everywhere, which adds the maps up and makes them larger. It stitches after all stages except
  the last one, as we do. Vandenhende's code (Multi-Task-Learning-PyTorch) also stitches after the last one, and has a
  number for each channel: `per_channel: true`.
- The paper stitches after a pooling. Our stages end before it.
- LibMTL counts all backbones and units as shared. The last stage of a backbone serves one task, and so does a row of
  the last unit. Here they are that task's own. A gradient method must not weigh them by the other tasks' gradients,
  which are zero there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mtl.archs.model import ArchError, Model, Outputs
from mtl.archs.sharing.parts import Build, heads, layer_groups
from mtl.archs.stages import own_of_stages, stages_of
from mtl.data.columns import Batch
from mtl.tasks import Task


class CrossStitch(Model):
    """One backbone for each task; after each stage except the last, the tasks exchange maps.

    There is no tensor at which sharing ends. So methods on the gradients of features are refused.

    Args:
        build_backbone: makes a backbone in stages.
        tasks: the tasks.
        per_channel: a unit has a number for each pair of tasks and channel, not only for each pair.

    Raises:
        ArchError: the backbone has no stages, or a single one.
    """

    def __init__(self, build_backbone: Build, tasks: Sequence[Task], per_channel: bool = False):
        super().__init__()
        self.backbones = nn.ModuleList(build_backbone() for _ in tasks)
        stages = stages_of(first := self.backbones[0], type(self).__name__)
        if len(stages) < 2:
            raise ArchError(f"CrossStitch needs two stages or more, and {type(first).__name__} has one")
        self.inputs = tuple(getattr(first, "inputs", self.inputs))
        self.index = {task.name: i for i, task in enumerate(tasks)}
        self.heads = heads(first, tasks)
        # A parameter for each row: those of the last unit belong to different tasks.
        self.units = nn.ModuleList(
            nn.ParameterList(_row(t, len(tasks), stage.channels if per_channel else None) for t in range(len(tasks)))
            for stage in stages[:-1]
        )
        self.layer_groups = layer_groups(first, [f"backbones.{t}" for t in range(len(tasks))])

    def forward(self, batch: Batch) -> Outputs:
        tasks, image = range(len(self.backbones)), batch[self.inputs[0]]
        nets = [stages_of(net, type(self).__name__) for net in self.backbones]
        maps, kept = [image for _ in tasks], [[] for _ in tasks]
        for level in range(len(nets[0])):
            maps = [nets[t][level](maps[t], kept[t]) for t in tasks]
            if level < len(self.units):
                maps = [stitch(row, maps) for row in self.units[level].parameters()]
        features = [net.finish(x, k) for net, x, k in zip(self.backbones, maps, kept, strict=True)]
        return Outputs([head(x) for head, x in zip(self.heads, features, strict=True)])

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        early = [p for net in self.backbones for stage in self._stages(net)[:-1] for p in stage]
        return [*early, *(row for unit in self.units[:-1] for row in unit.parameters())]

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        t = self.index[task]
        return [*self._stages(self.backbones[t])[-1], self.units[-1][t], *self.heads[t].parameters()]

    def _stages(self, net: nn.Module) -> list[list[nn.Parameter]]:
        return own_of_stages(net, stages_of(net, type(self).__name__))


def stitch(row: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Σⱼ rowⱼ · mapⱼ.

    Args:
        row: (T,), or (T, C) with a number for each channel.
        maps: T maps (N, C, H, W).
    """
    weights = row.reshape(len(maps), 1, -1, 1, 1).to(maps[0].dtype)
    return (weights * torch.stack(list(maps))).sum(0)


def _row(task: int, tasks: int, channels: int | None) -> nn.Parameter:
    row = torch.full((tasks,), 0.1 / max(1, tasks - 1))
    row[task] = 0.9 if tasks > 1 else 1.0
    return nn.Parameter(row if channels is None else row[:, None].repeat(1, channels))
