"""What a trained run says about files: `python -m mtl.predict RUN FILES… [--out FILE.csv|FILE.npz]`."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtl.data.columns import Column, Ragged
from mtl.engine.files import check_regular, write_text, writing
from mtl.engine.loaded import EPOCHS, LoadedRun, load
from mtl.errors import ConfigError, SetupError, UserError, one_line
from mtl.tasks import Task
from mtl.tracking.console import legible

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".npz")
Columns = dict[str, Column]
Answers = dict[str, np.ndarray]  # by column of the table, such as "digit_class"
TABLES = (".csv", ".tsv")


def predict(run: LoadedRun, files: Sequence[Path], changed: Counter[str]) -> tuple[list[str], Answers]:
    """What the model says about every sample in the files.

    Args:
        run: as loaded.
        files: image files, also as .npy arrays of one image each, and folders of them. Or .npy and .npz files with
            the columns that the data set stores; tables, if the data set was one.
        changed: counts what had to be done to images, such as "resized to 32x32".

    Returns:
        for each sample the name of its file, with its number where a file has several; and {column: (N, …)}.

    Raises:
        UserError: a file is missing, damaged or not what the model reads.
    """
    names: list[str] = []
    parts: dict[str, list[np.ndarray]] = {}
    for place, labels, columns in _batches(run, files, changed):
        try:
            found = run.predict(columns)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        for key, value in _flat(run.tasks, found).items():
            parts.setdefault(key, []).append(value)
        names += labels
    return names, {key: np.concatenate(values) for key, values in parts.items()}


def _batches(
    run: LoadedRun, files: Sequence[Path], changed: Counter[str]
) -> Iterator[tuple[Path, list[str], Columns | Tensor]]:
    """The (last) file, names and raw inputs of samples: files of one sample together, a file of several by itself."""
    names: list[str] = []
    rows: list[Tensor] = []
    for file in _listed(files):
        found = _opened(run, file, changed)
        if isinstance(found, Tensor):
            names.append(_named(file))
            rows.append(found)
            if len(rows) < run.benchmark.eval_batch_size:
                continue
        if rows:
            yield file, names, torch.stack(rows)
            names, rows = [], []
        if not isinstance(found, Tensor):
            yield file, *found
    if rows:
        yield file, names, torch.stack(rows)


def _opened(run: LoadedRun, file: Path, changed: Counter[str]) -> Tensor | tuple[list[str], Columns | Tensor]:
    """The row of a file of one sample; of a file of several samples, their names and raw inputs."""
    kind = file.suffix.lower()
    if kind in TABLES:
        return _table(run, file)
    if kind not in ARRAYS:
        row, what = _picture(run, file)
        changed.update([what] if what else [])
        return row
    columns, inputs = _columns(file), list(run.benchmark.inputs.values())
    if isinstance(columns, Tensor) and not columns.ndim:
        raise ConfigError(f"{file}: holds a single number, and no sample")
    if isinstance(columns, Tensor) and len(inputs) == 1:
        try:
            row = inputs[0].row(columns)
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
        if row is not None:
            return row
    size = len(columns) if isinstance(columns, Tensor) else max(map(len, columns.values()), default=0)
    return [f"{_named(file)}[{i}]" for i in range(size)], columns


def _named(file: Path) -> str:
    """The file's name, which need not be UTF-8 on every disk."""
    return os.fsencode(file).decode(errors="replace")


def _listed(files: Sequence[Path]) -> Iterator[Path]:
    """The files, and of each folder the images in it, at any depth, in the order of their names.

    Arrays count only in a folder without any other image: beside images, they may hold anything.
    """
    for path in files:
        if not path.exists():
            raise SetupError(f"{path}: no such file or folder")
        if not path.is_dir():
            check_regular(path)
            yield path
            continue
        inside = [f for f in sorted(path.rglob("*")) if not f.name.startswith(".") and f.is_file()]  # ._a.png of macOS
        found = [[f for f in inside if f.suffix.lower() in kinds] for kinds in (PICTURES, (".npy",))]
        if not any(found):
            raise ConfigError(f"{path}: no image in this folder ({', '.join(PICTURES)}, .npy)")
        yield from found[0] or found[1]


def _picture(run: LoadedRun, file: Path) -> tuple[Tensor, str]:
    inputs = list(run.benchmark.inputs.values())
    if len(inputs) > 1:
        raise ConfigError(f"{file}: the model reads {', '.join(run.benchmark.inputs)}; give an .npz file with these")
    try:
        return inputs[0].open(file)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error


def _table(run: LoadedRun, file: Path) -> tuple[list[str], Columns]:
    try:
        return run.benchmark.open_table(file)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error


def _columns(file: Path) -> Columns | Tensor:
    """The columns of an .npz file, or the only array of an .npy file; nothing in it is run."""
    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return torch.from_numpy(content)
        with content:
            arrays = {name: content[name] for name in content.files}
            columns = _ragged({name: torch.from_numpy(a) for name, a in arrays.items() if a.ndim})  # not a lone number
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file}: is damaged, or holds more than numbers ({one_line(error)[:100]})") from error
    if len(columns) == 1:  # numpy.savez(file, array) calls it arr_0
        (only,) = columns.values()
        return columns if "arr_0" not in columns else only
    return columns


def _ragged(arrays: dict[str, Tensor]) -> Columns:
    """The columns in arrays: `atoms` (M, …) and `atoms_lengths` (N,) together are the ragged column `atoms`."""
    columns: Columns = {}
    for name, values in arrays.items():
        if name.removesuffix("_lengths") in arrays and name.endswith("_lengths"):
            continue
        lengths = arrays.get(f"{name}_lengths")
        columns[name] = values if lengths is None else Ragged(values, lengths.long())
    return columns


def _flat(tasks: Sequence[Task], found: dict[str, dict[str, Tensor]]) -> Answers:
    """{task: {answer: …}} as {"task_answer": …}, with class names in the place of numbers."""
    flat: Answers = {}
    for task in tasks:
        for answer, value in found[task.name].items():
            if (key := f"{task.name}_{answer}") in flat:
                raise ConfigError(f"task {task.name!r}: its answer {answer!r} has the name of another column, {key}")
            names = task.named(answer)
            flat[key] = np.array(names)[value.numpy()] if len(names) else value.numpy()
    return flat


# -- output -----------------------------------------------------------------------------------------------------------


def check_out(out: Path | None) -> None:
    """Raises:
    ConfigError: the output has an unknown kind, or its folder does not exist.
    """
    if out is None:
        return
    if out.suffix.lower() not in (".csv", ".npz"):
        raise ConfigError(f"--out {out}: must end in .csv (a row for each file) or .npz (arrays)")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")


def table(names: Sequence[str], answers: Answers) -> str:
    """The text of a CSV file: a row for each sample, a column for each answer of one number, or several for a vector.

    Raises:
        ConfigError: an answer is a map.
    """
    columns: dict[str, list] = {"file": list(names)}
    for key, value in answers.items():
        if value.ndim > 2:
            shape = "x".join(map(str, value.shape[1:]))
            raise ConfigError(f"{key} is a map of {shape} for each file, which no CSV holds; use --out FILE.npz")
        if value.ndim == 1:
            columns[key] = value.tolist()
        else:
            columns |= {f"{key}_{i}": value[:, i].tolist() for i in range(value.shape[1])}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in zip(*columns.values(), strict=True))
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return f"{value:.6g}" if value == value else ""


def write(out: Path, names: Sequence[str], answers: Answers) -> None:
    """Write a CSV or an .npz file, whole or not at all.

    Raises:
        UserError: it cannot be written, or a CSV cannot hold the answers.
    """
    if out.suffix.lower() == ".csv":
        return write_text(out, table(names, answers))
    partial = out.with_name(out.name + ".tmp")
    with writing(out):
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, files=np.array(names), **answers)
            os.replace(partial, out)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mtl.predict", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as outputs/digits/resnet20/dwa/…/seed0")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE",
                        help="images, folders of images, .npy or .npz files; tables, if the data was one")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="FILE.csv or FILE.npz; default: a CSV is printed")
    parser.add_argument("--epoch", choices=EPOCHS, default="best", help="which checkpoint; default: %(default)s")
    parser.add_argument("--device", default="auto", help="as trainer.device; default: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    legible()
    changed: Counter[str] = Counter()
    try:
        check_out(options.out)
        run = load(options.run, options.epoch, options.device)
        names, answers = predict(run, options.files, changed)
        for what, number in changed.items():
            print(f"{number} of {len(names)} images {what}", file=sys.stderr)
        if options.out is None:
            sys.stdout.write(table(names, answers))
        else:
            write(options.out, names, answers)
            print(f"{len(names)} samples, {run.name} after epoch {run.epoch}: {options.out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
