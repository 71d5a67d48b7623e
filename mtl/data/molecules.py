"""Molecules: the columns of every molecular data set, and procedural molecules that need no file.

A molecule has a column `numbers` (the atomic number of each atom), `positions` (in angstrom) and `bonds`, all of them
ragged. Nothing depends on the order of the atoms, nor on how the molecule lies in space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.base import Benchmark
from mtl.data.columns import Ragged, Split
from mtl.data.inputs import Input, Rows
from mtl.errors import SetupError
from mtl.random import stream
from mtl.tasks.quantity import Quantity

# A bond is a row (first atom, second atom, kind). Atoms are counted from 0 in each molecule. Kinds: 0 single, 1 double,
# 2 triple, 3 aromatic.
MOST = 30  # atoms; the largest of QM9 have 29
INPUTS: Mapping[str, Input] = {
    "numbers": Rows(below=10),
    "positions": Rows((3,)),
    "bonds": Rows((3,), below=MOST),
}


def standardise(parts: Mapping[str, Split], tasks: Sequence[Quantity], of: Sequence[str]) -> dict[str, Split]:
    """The splits with standardised labels, by the mean and deviation over the splits named in `of`.

    Each task's `standard` is set, so that errors are reported in units.

    Raises:
        SetupError: a label is the same for all molecules.
    """
    for task in tasks:
        try:
            task.standard.set(torch.cat([parts[name].columns[task.column] for name in of]))
        except ValueError as error:
            raise SetupError(f"labels of {task.name}: {error}") from error
    return {name: Split({**part.columns, **_labels(part, tasks)}) for name, part in parts.items()}


def _labels(part: Split, tasks: Sequence[Quantity]) -> dict[str, Tensor]:
    # In float64 first: of a total energy, float32 would lose the digits that tell molecules apart.
    return {t.column: ((part.columns[t.column].double() - t.standard.mean) / t.standard.std).float() for t in tasks}


@dataclass
class Molecules(Benchmark):
    """Chains of 4 to 12 atoms of three elements, and four quantities that follow from their geometry.

    `dipole` is the length of Σ qᵢ rᵢ, `energy` is Σ qᵢ qⱼ / (1 + dᵢⱼ²) over pairs, `radius` is the root mean square
    distance from the centre, and `contacts` is Σ exp(−dᵢⱼ²/2) over pairs. The charges q of C, N and O are 1, −1 and 2.

    Args:
        train_size, test_size: number of molecules. A larger data set starts with the molecules of a smaller one.
        statistics: the splits over which labels are standardised: "train", or "all" as in many papers on QM9, which
            lets the network's targets depend on test molecules.
    """

    batch_size: Annotated[int, Ge(1)] = 64
    train_size: Annotated[int, Ge(4)] = 2000
    test_size: Annotated[int, Ge(1)] = 500
    statistics: Literal["train", "all"] = "train"

    inputs = INPUTS

    @cached_property
    def tasks(self) -> Sequence[Quantity]:
        # Not of the class: each data set has a mean and deviation of its own.
        return tuple(Quantity(name) for name in ("dipole", "energy", "radius", "contacts"))

    def load(self) -> dict[str, Split]:
        parts = {"train": _chains(self.train_size, "train"), "test": _chains(self.test_size, "test")}
        return standardise(parts, self.tasks, ["train"] if self.statistics == "train" else list(parts))


def _chains(size: int, name: str) -> Split:
    chunks = [_chunk(name, i) for i in range(-(-size // 1024))]
    numbers, positions, atoms = (torch.cat(parts)[:size] for parts in zip(*chunks, strict=True))
    here = torch.arange(numbers.shape[1]) < atoms[:, None]
    charge = torch.tensor([1.0, -1.0, 2.0])[numbers] * here
    pairs = here[:, :, None] & here[:, None, :] & ~torch.eye(numbers.shape[1], dtype=torch.bool)
    square = (positions[:, :, None] - positions[:, None, :]).square().sum(3)
    centre = (positions * here[..., None]).sum(1) / atoms[:, None]
    away = ((positions - centre[:, None]).square().sum(2) * here).sum(1) / atoms
    labels = {
        "dipole": (charge[..., None] * (positions - centre[:, None])).sum(1).norm(dim=1),
        "energy": (charge[:, :, None] * charge[:, None, :] / (1 + square) * pairs).sum((1, 2)) / 2,
        "radius": away.sqrt(),
        "contacts": (torch.exp(-square / 2) * pairs).sum((1, 2)) / 2,
    }
    bond = torch.arange(numbers.shape[1] - 1)
    chain = torch.stack([bond, bond + 1, torch.zeros_like(bond)], 1).expand(size, -1, 3)
    return Split(
        {
            "numbers": Ragged((numbers + 6)[here], atoms),
            "positions": Ragged(positions[here], atoms),
            "bonds": Ragged(chain[here[:, 1:]], atoms - 1),
            **labels,
        }
    )


def _chunk(name: str, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """1,024 molecules, padded to 12 atoms: numbers (from 0) of elements, positions, and numbers of atoms."""
    # A stream for each chunk, so that a larger data set starts with the smaller one.
    generator = stream(0, "molecules", name, i)
    atoms = torch.randint(4, 13, (1024,), generator=generator)
    numbers = torch.randint(3, (1024, 12), generator=generator)
    steps = torch.randn(1024, 12, 3, generator=generator, dtype=torch.float64)
    # Each bond keeps a part of the direction of the bond before, as in a chain that is stiff.
    for k in range(1, 12):
        steps[:, k] += 0.8 * steps[:, k - 1]
    steps = 1.4 * steps / steps.norm(dim=2, keepdim=True)
    return numbers, steps.cumsum(1), atoms
