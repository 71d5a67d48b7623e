"""MTAN: Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, on any backbone in stages.

All tasks share the backbone. In each stage l, task t masks the shared map, and hands the rest on:

    maskₜˡ = σ(BN(conv₁ₓ₁(ReLU(BN(conv₁ₓ₁([uˡ; xₜˡ⁻¹]))))))        xₜˡ = resize(fˡ(maskₜˡ ⊙ pˡ))

uˡ is the shared map before the last block of the stage, pˡ the one after it. fˡ, a convolution 3x3 with batch norm and
ReLU, is shared by the tasks. It gives the channels of the next stage. The last stage has no f: the masked map is what
the backbone turns into the task's features. Where the backbone then also reads earlier stages' maps, as a feature
pyramid and DeepLabV3+ do, a task gets its masked ones.

Where repositories differ
- The paper's network is SegNet, whose decoder has masks, too, and which masks before it pools: `arch=segnet_mtan`.
- On ResNets, LibMTL has a residual block as f, and divides the masks' inner width by 4 on ResNet-50: `reduction: 4`.
  Its masks' convolutions have biases.
- LibMTL leaves masks and f out of the shared parameters. The masks are a task's own, and so they are here. f serves
  all tasks, and is shared here. `mtl/archs/segnet.py` says what others do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from mtl.archs.maps import layer
from mtl.archs.model import Model, Outputs
from mtl.archs.sharing.parts import Build, heads, layer_groups, parameters
from mtl.archs.stages import resize, stages_of
from mtl.data.columns import Batch
from mtl.tasks import Task


class MTAN(Model):
    """A shared backbone, and a mask for each task and stage.

    There is no tensor at which sharing ends. So methods on the gradients of features are refused.

    Args:
        build_backbone: makes a backbone in stages.
        tasks: the tasks.
        reduction: the masks' inner width is the stage's channels divided by this.

    Raises:
        ArchError: the backbone has no stages.
    """

    def __init__(self, build_backbone: Build, tasks: Sequence[Task], reduction: Annotated[int, Ge(1)] = 1):
        super().__init__()
        self.backbone = build_backbone()
        stages = stages_of(self.backbone, type(self).__name__)
        self.inputs = tuple(getattr(self.backbone, "inputs", self.inputs))
        self.index = {task.name: i for i, task in enumerate(tasks)}
        self.heads = heads(self.backbone, tasks)
        # What a task brings along from the stage before has the channels of this stage, because f gives them.
        widths = [(s.inner + (s.channels if i else 0), s.channels) for i, s in enumerate(stages)]
        self.masks = nn.ModuleList(nn.ModuleList(mask(n, c, reduction) for n, c in widths) for _ in tasks)
        self.onward = nn.ModuleList(layer(a.channels, b.channels) for a, b in pairwise(stages))
        self.layer_groups = layer_groups(self.backbone, ["backbone"])

    def forward(self, batch: Batch) -> Outputs:
        x, kept, maps = batch[self.inputs[0]], [], []
        seen = [None] * len(self.masks)
        for level, stage in enumerate(stages_of(self.backbone, type(self).__name__)):
            before = stage.start(x, kept)
            x = stage.end(before)
            for t, masks in enumerate(self.masks):
                parts = [before] if seen[t] is None else [before, self.onward[level - 1](seen[t])]
                seen[t] = masks[level](torch.cat([resize(part, x) for part in parts], 1)) * x
            maps.append((x, list(seen)))
        features = [self.backbone.finish(s, _as_seen(t, kept, maps)) for t, s in enumerate(seen)]
        return Outputs([head(f) for head, f in zip(self.heads, features, strict=True)])

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return parameters(self.backbone, self.onward)

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        return parameters(self.masks[self.index[task]], self.heads[self.index[task]])


def _as_seen(task: int, kept: Sequence[Any], maps: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> list[Any]:
    """What the backbone kept, with the task's masked maps in the places of the stages' maps.

    Args:
        maps: of each stage the map, and the masked map of each task.
    """
    return [next((masked[task] for whole, masked in maps if whole is one), one) for one in kept]


def mask(inputs: int, outputs: int, reduction: int) -> nn.Sequential:
    """Maps (N, inputs, H, W) → a mask in [0, 1] of shape (N, outputs, H, W)."""
    inner = max(1, outputs // reduction)
    return nn.Sequential(
        *layer(inputs, inner, 1), nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.Sigmoid()
    )
