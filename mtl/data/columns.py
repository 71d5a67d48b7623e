"""What a part of a data set holds: images, and a label of each for every task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Labelled images on the host.

    Attributes:
        images: (N, H, W, C) uint8; may be memory-mapped when larger than memory.
        targets: for each task by name, (N, …); −100 (classes) or NaN (numbers) where a sample carries no label.
    """

    images: Tensor
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor | slice) -> Split:
        """The samples at `index`."""
        return Split(self.images[index], {name: t[index] for name, t in self.targets.items()})
