"""A table in a file: .csv or .tsv, or .npz with an array for each column. Labels become numbers here."""

from __future__ import annotations

import csv
import math
import zipfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtl.errors import SetupError, one_line, suggest

DELIMITERS = ",;\t"
NONE = -100  # the class of a sample without a label


@dataclass(frozen=True)
class Sheet:
    """The columns of a table.

    Attributes:
        file: it was read from.
        rows: of each sample, its row in the file; spreadsheets count the header as row 1.
        texts: columns as they stand in the file, an array (N, …) each: str, or what an .npz file holds.
        columns: of the file that hold the numbers.
        names: of the F numbers; a column of an .npz file may be a matrix of several.
        numbers: (N, F) float64.
    """

    file: Path
    rows: Sequence[int]
    texts: Mapping[str, np.ndarray]
    columns: Sequence[str] = ()
    names: Sequence[str] = ()
    numbers: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, sample: int) -> str:
        """Where a sample stands, such as "labels.csv, row 12"."""
        return f"{self.file}, {'sample' if _is_archive(self.file) else 'row'} {self.rows[sample]}"


def read(file: Path, texts: Sequence[str], numbers: Sequence[str] | None = (), but: Sequence[str] = ()) -> Sheet:
    """Read some columns of a table.

    Args:
        file: a .csv, .tsv or .npz file.
        texts: columns that are wanted as they stand.
        numbers: columns of numbers; None for all that are neither in `texts` nor in `but`.
        but: further columns that are no numbers.

    Raises:
        SetupError: there is no such file or column, or a cell is no number.
    """
    try:
        sheet = _of_archive(file, texts, numbers, but) if _is_archive(file) else _of_text(file, texts, numbers, but)
    except UnicodeDecodeError as error:
        raise SetupError(f"{file}: is not UTF-8 ({one_line(error)}); save it as UTF-8") from error
    except OSError as error:
        raise SetupError(f"{file}: {error.strerror or one_line(error)}") from error
    if not len(sheet):
        raise SetupError(f"{file}: there are no samples, only column names")
    return sheet


def _is_archive(file: Path) -> bool:
    return file.suffix.lower() == ".npz"


def _of_text(file: Path, texts: Sequence[str], numbers: Sequence[str] | None, but: Sequence[str]) -> Sheet:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        first = opened.readline()
        opened.seek(0)
        # Spreadsheets of many countries write semicolons.
        delimiter = max(DELIMITERS, key=first.count)
        records = enumerate(csv.reader(opened, delimiter=delimiter), start=1)
        try:
            header = [name.strip() for name in next(records, (1, []))[1]]
            columns = _chosen(file, header, texts, numbers, but)
            if twice := [name for name in (*texts, *columns) if header.count(name) > 1]:
                raise SetupError(f"{file}: two columns have the name {twice[0]!r}; rename one")
            return _body(file, header, records, texts, columns)
        except csv.Error as error:
            raise SetupError(f"{file}: is no table of text: {one_line(error)}") from error


def _body(
    file: Path, header: Sequence[str], records: Iterator[tuple[int, list[str]]], texts: Sequence[str],
    columns: Sequence[str],
) -> Sheet:  # fmt: skip
    rows, found = array("q"), {name: [] for name in texts}
    # Numbers are converted row by row: as text they would take ten times the memory.
    cells, places = array("d"), [header.index(name) for name in columns]
    text_places = [(found[name], header.index(name)) for name in found]
    for row, record in records:
        if not record:  # an empty line
            continue
        if len(record) != len(header):
            raise SetupError(f"{file}, row {row}: {len(record)} cells, and the header has {len(header)}")
        rows.append(row)
        for cells_of_column, place in text_places:
            cells_of_column.append(record[place].strip())
        for place in places:
            cells.append(_number(record[place], f"{file}, row {row}: {header[place]}", needed=True))
    read = {name: np.array(values, dtype=object) for name, values in found.items()}
    return Sheet(file, rows, read, columns, columns, np.array(cells).reshape(len(rows), len(columns)))


def _of_archive(file: Path, texts: Sequence[str], numbers: Sequence[str] | None, but: Sequence[str]) -> Sheet:
    try:
        with np.load(file, allow_pickle=False) as content:
            header = content.files
            columns = _chosen(file, header, texts, numbers, but)
            found = {name: content[name] for name in texts}
            wide = [_matrix(file, name, content[name]) for name in columns]
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise SetupError(
            f"{file}: is damaged, or holds more than numbers and text ({one_line(error)[:100]})"
        ) from error
    sizes = {
        name: len(value) if value.ndim else 0 for name, value in (*found.items(), *zip(columns, wide, strict=True))
    }
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise SetupError(f"{file}: the arrays must have the same number of rows, not {shown}")
    size = next(iter(sizes.values()), 0)
    # A matrix x has the columns x[0], x[1], …
    names = [
        name if matrix.shape[1] == 1 else f"{name}[{i}]"
        for name, matrix in zip(columns, wide, strict=True)
        for i in range(matrix.shape[1])
    ]
    matrix = np.concatenate(wide, axis=1) if wide else np.empty((size, 0))
    if (wrong := np.argwhere(~np.isfinite(matrix))).size:
        sample, column = wrong[0]
        raise SetupError(f"{file}, sample {sample}: {names[column]} is {matrix[sample, column]}; a number is needed")
    return Sheet(file, range(size), found, columns, names, matrix)


def _matrix(file: Path, name: str, values: np.ndarray) -> np.ndarray:
    """(N, F) float64 of an array (N,) or (N, F) of numbers."""
    if values.dtype.kind not in "biuf" or values.ndim not in (1, 2):
        raise SetupError(f"{file}: {name} is {values.dtype} of shape {values.shape}; numbers (N,) or (N, F) are needed")
    return values.reshape(len(values), -1).astype(np.float64)


def _chosen(
    file: Path, header: Sequence[str], texts: Sequence[str], numbers: Sequence[str] | None, but: Sequence[str]
) -> list[str]:
    """The columns of numbers.

    Raises:
        SetupError: a column that is wanted is not there.
    """
    for name in (*texts, *(numbers or ())):
        if name not in header:
            shown = ", ".join(header[:12]) + (", …" if len(header) > 12 else "")
            raise SetupError(f"{file}: there is no column {name!r}, only {shown}{suggest(name, header)}")
    return list(numbers) if numbers is not None else [n for n in header if n not in {*texts, *but}]


def _number(cell: str, place: str, needed: bool) -> float:
    """The number in a cell; NaN for an empty one.

    Raises:
        SetupError: the cell holds something else; or nothing, and a number is needed.
    """
    try:
        value = float(cell) if cell.strip() else math.nan
    except ValueError:
        hint = "; data.features=[COLUMN, …] lists the columns that are numbers" if needed else ""
        hint = "; write it with a decimal point" if cell.count(",") == 1 and "." not in cell else hint
        raise SetupError(f"{place} is {cell.strip()[:40]!r}, which is no number{hint}") from None
    if math.isinf(value) or (needed and math.isnan(value)):
        what = "empty" if not cell.strip() else repr(cell.strip())
        raise SetupError(f"{place} is {what}; a number is needed")
    return value


# -- labels -----------------------------------------------------------------------------------------------------------


def numbers(sheet: Sheet, name: str) -> Tensor:
    """(N,) float32, the labels in a column; NaN where the cell is empty.

    Raises:
        SetupError: a label is no number.
    """
    column = sheet.texts[name]
    if column.dtype.kind in "biuf" and column.ndim == 1:
        found = column.astype(np.float64)
        if (wrong := np.flatnonzero(np.isinf(found))).size:
            raise SetupError(f"{sheet.at(int(wrong[0]))}: {name} is {found[wrong[0]]}; a number is needed")
        return torch.from_numpy(found).float()
    cells = _cells(sheet, name)
    found = [_number(cell, f"{sheet.at(i)}: {name}", needed=False) for i, cell in enumerate(cells)]
    return torch.tensor(found, dtype=torch.float64).float()


def class_names(sheet: Sheet, name: str, samples: Sequence[int]) -> tuple[str, ...]:
    """The classes that the `samples` have in a column: sorted, as numbers if all are whole numbers.

    Raises:
        SetupError: no sample has a label.
    """
    cells = _cells(sheet, name)
    found = {cells[i] for i in samples} - {""}
    if not found:
        raise SetupError(f"{sheet.file}: no training row has a label in the column {name!r}")
    whole = all(cell.removeprefix("-").isdecimal() for cell in found)
    return tuple(sorted(found, key=lambda cell: (int(cell), cell) if whole else (0, cell)))


def classes(sheet: Sheet, name: str, known: Sequence[str]) -> Tensor:
    """(N,) int64, the classes in a column by their position in `known`; −100 where the cell is empty.

    Raises:
        SetupError: a label is none of the `known` classes.
    """
    position = {"": NONE, **{known_name: i for i, known_name in enumerate(known)}}
    found = []
    for i, cell in enumerate(_cells(sheet, name)):
        if (index := position.get(cell)) is None:
            shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
            raise SetupError(
                f"{sheet.at(i)}: {name} is {cell[:40]!r}, which is none of the classes of the training rows: {shown}"
                f"{suggest(cell, known) or f'; data.labels={{{name}: [CLASS, …]}} lists them by hand'}"
            )
        found.append(index)
    return torch.tensor(found, dtype=torch.int64)


def _cells(sheet: Sheet, name: str) -> list[str]:
    """The cells of a column as text; empty where there is no label."""
    column = sheet.texts[name]
    if column.ndim != 1:
        raise SetupError(
            f"{sheet.file}: {name} has the shape {column.shape}; one label for each sample is needed, (N,)"
        )
    if column.dtype.kind == "f":  # classes with NaN for none
        whole = np.isfinite(column) & (column == np.round(column))
        if (wrong := np.flatnonzero(~whole & ~np.isnan(column))).size:
            raise SetupError(f"{sheet.at(int(wrong[0]))}: {name} is {column[wrong[0]]}, which is no class; use number")
        return ["" if math.isnan(value) else f"{value:.0f}" for value in column]
    texts = (np.char.decode(column, "utf-8") if column.dtype.kind == "S" else column).tolist()
    return ["" if cell in (NONE, str(NONE)) else str(cell) for cell in texts]
