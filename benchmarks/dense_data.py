"""The images of dense.py, and the losses and metrics that other code writes by hand for three dense tasks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.data import Benchmark, Image, Split
from mtl.data.batches import ready
from mtl.tasks import Depth, Normals, Segmentation

CLASSES, MISSING = 13, 0.05
Field = tuple[Tensor, Tensor, Tensor, Tensor]  # images, classes, depths, normals of a batch, as other loops have them


@dataclass
class Noise(Benchmark):
    """Random images and label maps. 5 % of the pixels lack a class, 5 % lack depth and normal."""

    height: int = 96
    width: int = 72
    images: int = 80

    tasks = (Segmentation("segmentation", CLASSES), Depth("depth"), Normals("normals"))

    @cached_property
    def inputs(self) -> Mapping[str, Image]:
        return {"image": Image((3, self.height, self.width), mean=(0.5,), std=(0.25,))}

    def load(self) -> dict[str, Split]:
        draws, shape = torch.Generator().manual_seed(0), (self.images, self.height, self.width)
        holes, unknown = (torch.rand(shape, generator=draws) < MISSING for _ in range(2))
        normals = F.normalize(torch.randn(*shape, 3, generator=draws), dim=-1)
        columns = {
            "image": torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=draws),
            "segmentation": torch.randint(CLASSES, shape, generator=draws).to(torch.int8).masked_fill(unknown, -100),
            "depth": (0.5 + 9.5 * torch.rand(shape, generator=draws)).masked_fill(holes, 0.0),
            "normals": normals.masked_fill(holes[..., None], 0.0),
        }
        return {"train": Split(columns)}


class Data:
    """The images on the device: as uint8 for our epoch, and as batches for the other loops.

    Args:
        options: batch, height, width, device.
        batches: their number.
    """

    def __init__(self, options: Namespace, batches: int):
        self.size, self.device = options.batch, torch.device(options.device)
        self.benchmark = Noise(
            batch_size=self.size, height=options.height, width=options.width, images=batches * self.size,
            residency="device",
        )  # fmt: skip
        self.split = self.benchmark.load()["train"].to(self.device)
        parts = [slice(i * self.size, (i + 1) * self.size) for i in range(batches)]
        self.ready = [ready(self.benchmark, self.split.batch(part)) for part in parts]

    def field(self, memory_format: torch.memory_format) -> list[Field]:
        """The batches as the field has them: class −1 for no label, depths (N, 1, H, W), normals (N, 3, H, W)."""
        return [
            (
                batch["image"].contiguous(memory_format=memory_format),
                batch["segmentation"].long().masked_fill(batch["segmentation"] == -100, -1),
                batch["depth"][:, None].contiguous(),
                batch["normals"].movedim(-1, 1).contiguous(),
            )
            for batch in self.ready
        ]


def by_hand(predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
    """The three losses as published code has them: means over the labelled pixels."""
    (classes, depth, normals), (true_classes, true_depth, true_normals) = predictions, labels
    segmentation = F.cross_entropy(classes, true_classes, ignore_index=-1)
    known = (true_depth != 0).float()
    l1 = ((depth - true_depth).abs() * known).sum() / known.sum()
    known = (true_normals != 0).any(1, keepdim=True).float()
    unit = normals / normals.norm(dim=1, keepdim=True)
    return [segmentation, l1, 1 - (unit * true_normals * known).sum() / known.sum()]


class Metrics:
    """Training metrics with the operations of LibMTL's NYUv2 example, which wait for the device in every step."""

    def __init__(self, device: torch.device):
        self.matrix = torch.zeros(CLASSES, CLASSES, dtype=torch.int64, device=device)
        self.depth: list[tuple[float, float, int]] = []
        self.angles: list[np.ndarray] = []

    @torch.no_grad()
    def update(self, predictions: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        (classes, depth, normals), (true_classes, true_depth, true_normals) = predictions, labels
        likeliest, truth = classes.softmax(1).argmax(1).flatten(), true_classes.flatten()
        known = (truth >= 0) & (truth < CLASSES)
        pairs = CLASSES * truth[known] + likeliest[known]
        self.matrix += torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)
        known = true_depth != 0
        depth, true_depth = depth.masked_select(known), true_depth.masked_select(known)
        error = (depth - true_depth).abs()
        self.depth.append((error.mean().item(), (error / true_depth).mean().item(), len(error)))
        known = (true_normals != 0).any(1)
        cosines = (normals / normals.norm(dim=1, keepdim=True) * true_normals).sum(1).masked_select(known)
        self.angles.append(np.degrees(cosines.clamp(-1, 1).acos().cpu().numpy()))
