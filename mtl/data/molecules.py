"""Molecules: the columns of every molecular data set, and procedural molecules that need no file.

A molecule has a column `numbers` (the atomic number of each atom), `positions` (in angstrom) and `bonds`, all of them
ragged. Nothing depends on the order of the atoms, nor on how the molecule lies in space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

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
LABELS = "targets"  # column with the labels of all quantities
MOST = 30  # atoms; the largest of QM9 have 29
INPUTS: Mapping[str, Input] = {
    "numbers": Rows(below=10),
    "positions": Rows((3,)),
    "bonds": Rows((3,), below=MOST),
}


@dataclass
class Quantities(Benchmark):
    """The base class of molecules with K quantities as tasks: their labels are a matrix, the column `targets` (N, K).

    Args:
        statistics: the splits over which labels are standardised: "train", or "all" as in many papers on QM9, which
            lets the network's targets depend on test molecules.
    """

    statistics: Literal["train", "all"] = "train"

    inputs = INPUTS
    quantities: ClassVar[Mapping[str, str]]  # the unit of each, in the order of the matrix's columns
    _recalled = False

    @cached_property
    def tasks(self) -> Sequence[Quantity]:
        # Not of the class: each data set has a mean and deviation of its own.
        named = enumerate(self.quantities.items())
        return tuple(Quantity(name, target=LABELS, index=i, unit=unit) for i, (name, unit) in named)

    def facts(self) -> dict[str, Any]:
        # A subclass may have other tasks beside the quantities.
        own = [task for task in self.tasks if isinstance(task, Quantity)]
        return {task.name: task.standard.facts() for task in own if task.standard.known}

    def recall(self, facts: Mapping[str, Any]) -> None:
        for task in self.tasks:
            if task.name in facts:
                task.standard.recall(facts[task.name])
        self._recalled = True

    def standardised(self, parts: Mapping[str, Split]) -> dict[str, Split]:
        """The splits with standardised labels. A model that is loaded keeps the statistics of its training.

        Raises:
            SetupError: a label is the same for all molecules.
        """
        if not self._recalled:
            of = ["train"] if self.statistics == "train" else list(parts)
            values = torch.cat([parts[name].columns[LABELS] for name in of])
            for task in self.tasks:
                try:
                    task.standard.set(task.select(values).contiguous())
                except ValueError as error:
                    raise SetupError(f"labels of {task.name}: {error}") from error
        return {n: Split({**part.columns, LABELS: self._labels(part.columns[LABELS])}) for n, part in parts.items()}

    def _labels(self, values: Tensor) -> Tensor:
        found = values.clone().float()
        for task in self.tasks:
            found[:, task.index] = task.standard.of(task.select(values))
        return found


@dataclass
class Molecules(Quantities):
    """Chains of 4 to 12 atoms of three elements, and four quantities that follow from their geometry.

    `dipole` is the length of Σ qᵢ rᵢ, `energy` is Σ qᵢ qⱼ / (1 + dᵢⱼ²) over pairs, `radius` is the root mean square
    distance from the centre, and `contacts` is Σ exp(−dᵢⱼ²/2) over pairs. The charges q of C, N and O are 1, −1 and 2.

    Args:
        train_size, test_size: number of molecules. A larger data set starts with the molecules of a smaller one.
    """

    batch_size: Annotated[int, Ge(1)] = 64
    train_size: Annotated[int, Ge(4)] = 2000
    test_size: Annotated[int, Ge(1)] = 500

    quantities = dict.fromkeys(("dipole", "energy", "radius", "contacts"), "")

    def load(self) -> dict[str, Split]:
        return self.standardised({"train": _chains(self.train_size, "train"), "test": _chains(self.test_size, "test")})


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
            LABELS: torch.stack([labels[name] for name in Molecules.quantities], 1),
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
