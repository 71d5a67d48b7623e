"""QM9: 11 properties of small organic molecules. Ramakrishnan et al., Scientific Data 2014.

The targets, their order and their units are those of Nash-MTL, FAMO and LibMTL. Energies are in meV, atomisation
energies (U0, U, H, G) included. Those papers print μ, α, ⟨R²⟩ and c_v in D, a0³, a0² and cal/(mol K).

Their code standardises the labels by statistics of all molecules, test molecules included. Here it is the training
molecules alone; `data.statistics=all` reproduces the papers.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from mtl.data.columns import Ragged, Split
from mtl.data.molecules import LABELS, Quantities
from mtl.data.sdf import read_sdf
from mtl.errors import SetupError, one_line
from mtl.random import stream

HARTREE = 27211.386246  # meV
KCAL = 43.36414  # meV, of a kcal/mol


class Target(NamedTuple):
    """A property: its column in the files, the factor to its unit, and the unit."""

    column: str
    factor: float
    unit: str


TARGETS = {
    "mu": Target("mu", 1.0, "D"),
    "alpha": Target("alpha", 1.0, "a0³"),
    "homo": Target("homo", HARTREE, "meV"),
    "lumo": Target("lumo", HARTREE, "meV"),
    "r2": Target("r2", 1.0, "a0²"),
    "zpve": Target("zpve", HARTREE, "meV"),
    "u0": Target("u0_atom", KCAL, "meV"),
    "u": Target("u298_atom", KCAL, "meV"),
    "h": Target("h298_atom", KCAL, "meV"),
    "g": Target("g298_atom", KCAL, "meV"),
    "cv": Target("cv", 1.0, "cal/(mol K)"),
}
FILES = ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt")


@dataclass
class QM9(Quantities):
    """Molecules with 11 properties.

    Args:
        root: the folder that holds qm9/ with gdb9.sdf, gdb9.sdf.csv and uncharacterized.txt.
        file: an .npz file instead: arrays z (A,), pos (A, 3), offset (N + 1,), targets (N, T) and target_names (T,),
            and maybe bonds (B, 3) with bond_offset (N + 1,). Without bonds, the networks see none.
        test_size, val_size: the first molecules of the random order are for testing, the next ones for validation.
        split: "fixed": the same order for all runs. "seed": another order for each seed, as in Nash-MTL and FAMO, whose
            seeds have different test molecules.
    """

    batch_size: Annotated[int, Ge(1)] = 120
    root: str = "data"
    file: str | None = None
    test_size: Annotated[int, Ge(1)] = 10000
    val_size: Annotated[int, Ge(1)] = 10000
    split: Literal["fixed", "seed"] = "fixed"

    quantities = {name: target.unit for name, target in TARGETS.items()}

    def load(self) -> dict[str, Split]:
        whole = read_raw(Path(self.root) / "qm9") if self.file is None else read_npz(Path(self.file))
        held_out = self.test_size + self.val_size
        if (size := len(whole)) < held_out + 2:
            tenth = max(1, size // 10)
            raise SetupError(
                f"data: {size} molecules, too few for test_size={self.test_size} and val_size={self.val_size}; use "
                f"data.test_size={tenth} data.val_size={tenth}"
            )
        # The engine has seeded torch's global generator by the run's seed.
        order = torch.randperm(size, generator=stream(0, "qm9_split") if self.split == "fixed" else None)
        ends = {"train": (held_out, size), "val": (self.test_size, held_out), "test": (0, self.test_size)}
        # Sorted, so that evaluation goes through the molecules in the order of the files.
        parts = {name: Split(whole.batch(order[a:b].sort().values)) for name, (a, b) in ends.items()}
        return self.standardised(parts)


def read_npz(path: Path) -> Split:
    """The molecules of an .npz file, with properties in the units of `TARGETS`.

    Raises:
        SetupError: the file is missing or damaged, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except FileNotFoundError as error:
        raise SetupError(f"data.file={path}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise SetupError(f"data.file={path}: is damaged, or no .npz file ({one_line(error)[:80]})") from error
    if missing := [name for name in ("z", "pos", "offset", "targets", "target_names") if name not in arrays]:
        raise SetupError(f"data.file={path}: there is no array {missing[0]}, only {', '.join(arrays) or 'nothing'}")
    size = len(arrays["targets"])
    bonds = arrays.get("bonds", np.zeros((0, 3), np.int64))
    bond_offset = arrays.get("bond_offset", np.zeros(size + 1, np.int64))
    try:
        numbers = _column(arrays["z"], arrays["offset"], size)
        columns = {
            "numbers": numbers,
            "positions": _column(arrays["pos"], arrays["offset"], size),
            "bonds": _column(bonds, bond_offset, size),
        }
        labels = _labels(list(map(str, arrays["target_names"])), arrays["targets"])
    except (ValueError, TypeError, IndexError) as error:
        raise SetupError(f"data.file={path}: {one_line(error)}") from error
    return Split({**columns, LABELS: labels})


def _column(values: np.ndarray, offset: np.ndarray, size: int) -> Ragged:
    lengths = np.diff(offset.astype(np.int64))
    if len(lengths) != size or (lengths < 0).any() or offset[0] != 0 or offset[-1] != len(values):
        raise ValueError(f"offset must go from 0 to {len(values)} in {size} steps, one for each molecule")
    return Ragged(torch.from_numpy(values), torch.from_numpy(lengths))


def _labels(names: Sequence[str], values: Any) -> Tensor:
    table = torch.as_tensor(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or table.shape[1] != len(names):
        raise ValueError(f"targets have the shape {tuple(table.shape)}, and there are {len(names)} target_names")
    if missing := [t.column for t in TARGETS.values() if t.column not in names]:
        raise ValueError(f"there is no target {missing[0]}, only {', '.join(names)}")
    return torch.stack([table[:, names.index(t.column)] * t.factor for t in TARGETS.values()], 1)


def read_raw(folder: Path) -> Split:
    """The molecules of the raw files, without the uncharacterised ones, as torch_geometric has them.

    Raises:
        SetupError: a file is missing or damaged.
    """
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise SetupError(
            f"QM9 is not in {folder.resolve()}: {missing[0]} is missing. gdb9.sdf and gdb9.sdf.csv are in qm9.zip of "
            "MoleculeNet, uncharacterized.txt is file 3195404 of figshare; or give data.file=X.npz; "
            "or try data=molecules, which needs no file"
        )
    sdf, table, list_ = (folder / name for name in FILES)
    try:
        molecules = list(read_sdf(sdf))
    except (OSError, ValueError) as error:
        raise SetupError(f"{sdf} is damaged: {one_line(error)}") from error
    try:
        with table.open(newline="") as file:
            header, *rows = csv.reader(file)
        labels = _labels(header[1:], [row[1:] for row in rows])
    except (OSError, ValueError, TypeError) as error:
        raise SetupError(f"{table} is damaged: {one_line(error)[:100]}") from error
    if len(rows) != len(molecules):
        raise SetupError(f"{table} has {len(rows)} rows, and {sdf} has {len(molecules)} molecules; restore both")
    try:
        # The list is between nine lines of heading and one of its sum. Molecules are counted from 1.
        skipped = [int(line.split()[0]) - 1 for line in list_.read_text().split("\n")[9:-2]]
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[skipped] = False
    except (OSError, ValueError, IndexError) as error:
        raise SetupError(f"{list_} is damaged: {one_line(error)}") from error
    whole = Split(
        {
            "numbers": Ragged.of([torch.tensor(m.numbers, dtype=torch.uint8) for m in molecules]),
            "positions": Ragged.of([torch.tensor(m.positions) for m in molecules]),
            "bonds": Ragged.of([torch.tensor(m.bonds, dtype=torch.uint8).view(-1, 3) for m in molecules]),
            LABELS: labels,
        }
    )
    return Split(whole.batch(keep))
