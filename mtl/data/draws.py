"""Which samples an epoch trains on, in which order, and the random view of each.

Everything is drawn on the CPU, and is a function of the seed and the number of the epoch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from mtl.random import stream
from mtl.views import Augment, View


@dataclass(frozen=True)
class Draws:
    """All samples in a random order.

    Args:
        size: number of training samples.
        batch: samples in a step.
        augment: the random views of the images.
        picture: (height, width) of the images; None without images.
    """

    size: int
    batch: int
    augment: Sequence[Augment]
    picture: tuple[int, int] | None

    @property
    def samples(self) -> int:
        """Number of samples in an epoch."""
        return self.size

    def order(self, seed: int, epoch: int) -> Tensor:
        """(samples,) int64, the samples of an epoch in the order of training. Each `batch` of them makes a step."""
        return torch.randperm(self.size, generator=stream(seed, "order", epoch))

    def view(self, seed: int, epoch: int, order: Tensor) -> View | None:
        """The random views (crop, flip) of the samples in `order`; None without augmentation."""
        return self._drawn(self.augment, len(order), seed, epoch)

    def _drawn(self, augment: Sequence[Augment], size: int, seed: int, epoch: int, *part: str | int) -> View | None:
        view, draws = None, partial(stream, seed)
        for one in augment:
            # Each kind of augmentation has its own random stream. So adding a flip does not change the crops.
            drawn = one.draw(size, self.picture, lambda name: draws(name, epoch, *part))
            view = drawn if view is None else view.then(drawn)
        return None if view is None else replace(view, picture=self.picture)


@dataclass(frozen=True)
class PartDraws(Draws):
    """The samples of several parts, mixed, or in balanced batches.

    Balanced: each step has a fixed number of samples of each part. An epoch ends when the part that lasts longest has
    been seen once. Shorter parts go on with their next permutation, in the next epoch, too.

    Args:
        part: (size,) int64, the part of each sample.
        augments: each part's own views.
        shares: samples of each part in a step; None for mixed samples.
    """

    part: Tensor
    augments: Sequence[Sequence[Augment]]
    shares: Sequence[int] | None = None

    @property
    def samples(self) -> int:
        return self.size if self.shares is None else self._steps * self.batch

    def order(self, seed: int, epoch: int) -> Tensor:
        if self.shares is None:
            return super().order(seed, epoch)
        drawn = [self._next(p, seed, epoch).view(self._steps, -1) for p in range(len(self.shares))]
        return torch.cat(drawn, dim=1)[:, self._mix].flatten()

    def view(self, seed: int, epoch: int, order: Tensor) -> View | None:
        if all(one == self.augments[0] for one in self.augments):
            return super().view(seed, epoch, order)
        found, part = View.identity(len(order)), self.part[order]
        whole = True
        for p, augment in enumerate(self.augments):
            where = part == p
            view = self._drawn(augment, int(where.sum()), seed, epoch, "part", p)
            if view is not None:
                found.a[where], found.b[where] = view.a, view.b
                whole &= view.whole
        return View(found.a, found.b, whole, self.picture)

    @cached_property
    def _members(self) -> list[Tensor]:
        """The samples of each part."""
        return [(self.part == p).nonzero().flatten() for p in range(len(self.augments))]

    @cached_property
    def _steps(self) -> int:
        return max(-(-len(own) // share) for own, share in zip(self._members, self.shares, strict=True))

    @cached_property
    def _mix(self) -> Tensor:
        """The order in which a step's samples stand. Each part is spread evenly: some methods divide a batch."""
        return spread(self.shares)

    def _next(self, p: int, seed: int, epoch: int) -> Tensor:
        """A part's samples in one epoch: a piece of its permutations, one after another."""
        own, count = self._members[p], self._steps * self.shares[p]
        if not len(own):  # limited to so few samples that none is left
            return own.new_empty(0)
        first, skipped = divmod(epoch * count, len(own))
        passes = range(first, (epoch * count + count - 1) // len(own) + 1)
        orders = [torch.randperm(len(own), generator=stream(seed, "order", "part", p, k)) for k in passes]
        return own[torch.cat(orders)[skipped : skipped + count]]


def spread(sizes: Sequence[int]) -> Tensor:
    """Positions of sizes[0] + sizes[1] + … items, such that every stretch has items of each kind, in proportion."""
    places = torch.cat([(torch.arange(size, dtype=torch.float64) + 0.5) / size for size in sizes])
    return places.argsort(stable=True)
