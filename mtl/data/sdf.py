"""Molecules from an .sdf file (MDL molfile V2000), without RDKit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SYMBOLS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
AROMATIC = 3  # kind of a bond; 0, 1, 2 are single, double, triple


class Molecule(NamedTuple):
    """One record of a file.

    Attributes:
        numbers: atomic number of each atom.
        positions: (x, y, z) of each atom in angstrom.
        bonds: (first atom, second atom, kind), with atoms from 0 and kinds 0 to 3.
    """

    numbers: list[int]
    positions: list[tuple[float, float, float]]
    bonds: list[tuple[int, int, int]]


def read_sdf(path: Path) -> Iterator[Molecule]:
    """The molecules of a file, one after another.

    Raises:
        ValueError: a record is no molecule; the message has its number.
        OSError: the file cannot be read.
    """
    record: list[str] = []
    number = 0
    with path.open(encoding="ascii", errors="replace") as file:
        for line in file:
            if not line.startswith("$$$$"):
                record.append(line)
                continue
            number += 1
            try:
                yield _molecule(record)
            except (ValueError, KeyError, IndexError) as error:
                raise ValueError(f"record {number} is no molecule of H, C, N, O and F in the V2000 format") from error
            record = []
    if any(line.strip() for line in record):
        raise ValueError(f"the file ends within record {number + 1}")


def _molecule(lines: list[str]) -> Molecule:
    counts = lines[3]
    atoms, bonds = int(counts[:3]), int(counts[3:6])  # in fixed columns: "100 99" and "100100" are both possible
    numbers, positions = [], []
    for line in lines[4 : 4 + atoms]:
        x, y, z, symbol = line.split()[:4]
        numbers.append(SYMBOLS[symbol])
        positions.append((float(x), float(y), float(z)))
    found = [(int(line[:3]) - 1, int(line[3:6]) - 1, int(line[6:9]) - 1) for line in lines[4 + atoms :][:bonds]]
    if len(numbers) != atoms or len(found) != bonds:
        raise ValueError
    if any(not (0 <= i < atoms and 0 <= j < atoms and i != j and 0 <= kind <= AROMATIC) for i, j, kind in found):
        raise ValueError
    return Molecule(numbers, positions, with_aromatic(numbers, found))


def with_aromatic(numbers: list[int], bonds: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The bonds, with those of aromatic rings marked as kind 3.

    A ring of 5 or 6 atoms is aromatic if it has six π electrons (Hückel's rule): one of each atom with a double bond to
    a ring's atom, none of an atom with a double bond to an atom outside of rings, two of another N or O. RDKit knows
    more cases, such as large fused rings.
    """
    if sum(kind == 1 for _, _, kind in bonds) < 2:
        return bonds
    near: dict[int, list[int]] = {}
    double: dict[int, list[int]] = {}
    for i, j, kind in bonds:
        for a, b in ((i, j), (j, i)):
            if numbers[a] > 1 and numbers[b] > 1:
                near.setdefault(a, []).append(b)
                if kind == 1:
                    double.setdefault(a, []).append(b)
    rings = {frozenset(ring): ring for start in near for ring in _rings(near, [start])}
    cyclic = {atom for ring in rings for atom in ring}

    def electrons(atom: int) -> int:
        if partners := double.get(atom):
            return 1 if any(p in cyclic for p in partners) else 0
        return 2 if numbers[atom] in (7, 8) else 9  # 9: a saturated carbon, with which no ring is aromatic

    marked = set()
    for ring in rings.values():
        if sum(map(electrons, ring)) == 6:
            marked |= {frozenset(pair) for pair in zip(ring, [*ring[1:], ring[0]], strict=True)}
    return [(i, j, AROMATIC if frozenset((i, j)) in marked else kind) for i, j, kind in bonds]


def _rings(near: dict[int, list[int]], path: list[int]) -> Iterator[list[int]]:
    """All rings of 5 or 6 atoms that go on from `path`, whose first atom is the ring's smallest."""
    for atom in near[path[-1]]:
        if atom == path[0] and len(path) in (5, 6):
            yield path
        elif atom > path[0] and atom not in path and len(path) < 6:
            yield from _rings(near, [*path, atom])
