"""Message passing over atoms, in plain torch: Gilmer et al., "Neural Message Passing for Quantum Chemistry", ICML 2017.

The filters are those of SchNet (Schütt et al., NeurIPS 2017): functions of the distance of two atoms. So predictions
depend neither on the order of the atoms nor on how the molecule is turned or shifted.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from mtl.data.columns import Ragged


class MPNN(nn.Module):
    """Features (N, width) of molecules, from atomic numbers and positions.

    Args:
        width: of the features of atoms and of molecules.
        layers: rounds of messages.
        cutoff: in angstrom; atoms farther apart send no messages.
        gaussians: functions of the distance, with centres from 0 to `cutoff`.
        elements: number of atomic numbers, from 0.
    """

    inputs = ("numbers", "positions")

    def __init__(
        self,
        width: Annotated[int, Ge(1)] = 64,
        layers: Annotated[int, Ge(1)] = 3,
        cutoff: Annotated[float, Gt(0)] = 5.0,
        gaussians: Annotated[int, Ge(2)] = 32,
        elements: Annotated[int, Ge(1)] = 100,
    ):
        super().__init__()
        self.out_features, self.cutoff = width, cutoff
        self.register_buffer("centres", torch.linspace(0, cutoff, gaussians))
        self.embed = nn.Embedding(elements, width)
        self.layers = nn.ModuleList(_Messages(width, gaussians) for _ in range(layers))
        self.read = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU())

    def forward(self, numbers: Ragged, positions: Ragged) -> Tensor:
        """Atoms of N molecules to features (N, width)."""
        first, second = positions.pairs()
        places = positions.values
        # A root has no derivative at 0, and the smallest number keeps it away from there.
        distance = (places[first] - places[second]).square().sum(1).clamp(min=1e-12).sqrt()
        step = self.cutoff / (len(self.centres) - 1)
        basis = torch.exp(-0.5 * ((distance[:, None] - self.centres) / step).square())
        # Falls smoothly to 0 at the cutoff. Pairs beyond it are not removed: their number is unknown to the host.
        near = 0.5 * (torch.cos(math.pi * (distance / self.cutoff).clamp(max=1)) + 1)
        atoms = self.embed(numbers.values)
        for layer in self.layers:
            atoms = layer(atoms, first, second, basis, near[:, None])
        total = _add(atoms, numbers.owner(), len(numbers))
        mean = total / numbers.lengths.clamp(min=1)[:, None]
        # The mean for quantities such as an orbital's energy, the sum for those that grow with the molecule.
        return self.read(torch.cat([mean, total / 16], 1))


class _Messages(nn.Module):
    """One round: each atom adds up its neighbours, filtered by their distances, and is updated by the sum."""

    def __init__(self, width: int, gaussians: int):
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(gaussians, width), nn.SiLU(), nn.Linear(width, width))
        self.sender = nn.Linear(width, width, bias=False)
        self.update = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, atoms: Tensor, first: Tensor, second: Tensor, basis: Tensor, near: Tensor) -> Tensor:
        messages = self.sender(atoms)[second] * (self.filter(basis) * near)
        return atoms + self.update(_add(messages, first, len(atoms)))


def _add(rows: Tensor, owner: Tensor, size: int) -> Tensor:
    """(size, …) the sums of the rows of each owner."""
    return rows.new_zeros(size, *rows.shape[1:]).index_add(0, owner, rows)
