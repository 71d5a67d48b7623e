"""One shared backbone and one head per task, usually a linear layer (hard parameter sharing)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtl.archs.check import ArchError, as_before, check_features
from mtl.tasks import Task


class MultiTaskModel(nn.Module):
    """Backbone → features (N, F) → a prediction (N, outputs) for each task.

    Args:
        backbone: a module from images (N, C, H, W) to features (N, F), with the width F as `out_features`.
        tasks: the tasks, in the order in which predictions are returned.

    Raises:
        ArchError: the backbone or a head is no module, or the backbone has no `out_features`.
        ValueError: a task has no head for so many features.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[Task]):
        super().__init__()
        name = type(backbone).__name__
        if not isinstance(backbone, nn.Module):
            raise ArchError(f"a {name} was built; a torch.nn.Module is needed")
        width = getattr(backbone, "out_features", None)
        if not isinstance(width, Integral) or width < 1:
            raise ArchError(f"{name} needs an int attribute out_features: the width of its features, not {width!r}")
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        for task in tasks:
            head = task.head(int(width))
            if not isinstance(head, nn.Module):
                made = f"{type(task).__name__}.head made a {type(head).__name__} for task {task.name!r}"
                raise ArchError(f"{made}; a torch.nn.Module is needed")
            # Past ModuleDict's own check, which refuses a task that is called "type" or "values".
            self.heads._modules[task.name] = head

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (N, C, H, W) to a prediction (N, outputs) for each task.

        Raises:
            ArchError: the backbone does not return features (N, out_features) of the images' dtype.
        """
        features = self.backbone(images)
        check_features(self.backbone, features, images)
        return self.predict([features] * len(self.heads))

    def predict(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Each task's prediction from its own view (N, F) of the features; usually all views are the same tensor."""
        return [head(view) for head, view in zip(self.heads.values(), features, strict=True)]

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that all tasks use; per-task gradients are taken of these."""
        return self.backbone.parameters()

    def head_parameters(self, task: str) -> Iterator[nn.Parameter]:
        """Parameters that only `task` uses."""
        return self.heads[task].parameters()


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image's forward pass (convolutions and linear layers), on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with as_before(model), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() // 2
