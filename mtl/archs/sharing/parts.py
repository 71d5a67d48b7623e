"""What the sharing schemes have in common: experts, gates, and heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.archs.model import ArchError, HardSharing
from mtl.data.columns import Batch, Ragged
from mtl.tasks import Task

Build = Callable[[], nn.Module]  # makes a backbone with new weights
Shapes = Mapping[str, Sequence[int]]  # of one sample of each input


def heads(backbone: nn.Module, tasks: Sequence[Task]) -> nn.ModuleList:
    """One decoder for each task, as `HardSharing` makes them for this backbone."""
    return nn.ModuleList(next(iter(HardSharing(backbone, [task]).heads.values())) for task in tasks)


def expert(backbone: nn.Module) -> HardSharing:
    """A whole backbone: `expert(batch).features`."""
    return HardSharing(backbone, [])


class Glimpse:
    """What a gate sees of the inputs: images as means over the fields of a grid, other inputs as they are.

    Args:
        names: of the inputs.
        shapes: of one sample of each input.
        grid: fields along each axis of an image.

    Attributes:
        width: length of a sample's vector.
    """

    def __init__(self, names: Sequence[str], shapes: Shapes, grid: int):
        self.names, self.grid = names, grid
        self.width = sum(shapes[n][0] * grid**2 if len(shapes[n]) == 3 else math.prod(shapes[n]) for n in names)

    def __call__(self, batch: Batch) -> Tensor:
        """(N, width).

        Raises:
            ArchError: an input holds no real numbers, such as the tokens of a text, or no vector of one length.
        """
        seen = []
        for name in self.names:
            x = batch[name]
            if not x.is_floating_point():
                raise ArchError(f"a gate sees real numbers, and the input {name} holds {x.dtype}; use sharing=hard")
            if isinstance(x, Ragged):
                raise ArchError(f"a gate sees a vector, and samples of {name} have different lengths; use sharing=hard")
            seen.append((F.adaptive_avg_pool2d(x, self.grid) if x.ndim == 4 else x).flatten(1))
        return torch.cat(seen, 1)


def mixed(gate: nn.Module, seen: Tensor, experts: Tensor) -> Tensor:
    """Σₑ softmax(gate(seen))ₑ · expertₑ.

    Args:
        gate: (N, D) → (N, E).
        seen: (N, D).
        experts: (N, E, …).
    """
    weights = gate(seen).softmax(1).to(experts.dtype)
    return torch.einsum("ne,ne...->n...", weights, experts)


def stacked(maps: Iterable[Tensor]) -> Tensor:
    """The experts' features (N, …) as (N, E, …)."""
    return torch.stack(list(maps), 1)


def parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters of several modules."""
    return list(chain.from_iterable(module.parameters() for module in modules))


def layer_groups(backbone: nn.Module, paths: Sequence[str]) -> dict[str, list[str]]:
    """The microscope's layer groups of several copies of a backbone: equal layers of all copies are one group.

    Args:
        paths: names of the copies in the model.
    """
    named = getattr(backbone, "layer_groups", None) or {n: [n] for n, _ in backbone.named_children()}
    return {name: [f"{path}.{part}" for path in paths for part in parts] for name, parts in named.items()}
