"""From finished runs to the tables of a paper: `python -m mtl.report [outputs/...]`. No torch, no network."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from pathlib import Path

from mtl.errors import ConfigError, SetupError, UserError, suggest
from mtl.report import summaries
from mtl.report.attempt import attempt
from mtl.report.files import replace_text
from mtl.report.names import slug, visible
from mtl.report.protocols import Protocol, benchmarks
from mtl.report.runs import Collection, load
from mtl.report.scores import Scores
from mtl.report.tables import Table

FORMATS = ("csv", "md", "tex", "html")
FIGURES = ("png", "pdf", "svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mtl.report", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("path", nargs="*", type=Path, default=[Path("outputs")],
                        help="folders of runs, at any depth; default: outputs")  # fmt: skip
    parser.add_argument(
        "--reference", metavar="NAME", help="strategy that the others are compared with; default: equal"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: PATH/report")
    parser.add_argument("--format", default=",".join(FORMATS), metavar="A,B",
                        help=f"of the files; default: %(default)s; figures: {', '.join(FIGURES)}")  # fmt: skip
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="also make a W&B workspace that compares the runs")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    try:
        formats = options.format.split(",")
        allowed = (*FORMATS, *FIGURES)
        if wrong := [f for f in formats if f not in allowed]:
            raise ConfigError(f"--format {wrong[0]}: one of {', '.join(allowed)}{suggest(wrong[0], allowed)}")
        failed = report(
            options.path, options.reference, options.out or options.path[0] / "report", formats, options.wandb
        )
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    for line in failed:
        print(f"error: not made: {line}", file=sys.stderr)
    return 1 if failed else 0


def report(
    paths: Sequence[Path], reference: str | None, out: Path, formats: Sequence[str], wandb: str | None = None
) -> list[str]:
    """Print the main tables of all runs below `paths`; write tables, figures and the page into `out`.

    Args:
        paths: output trees, or directories of runs.
        reference: strategy that the others are compared with; None is equal, where it was run.
        out: folder.
        formats: of FORMATS and FIGURES.
        wandb: "entity/project", in which a W&B workspace is made.

    Returns:
        a line for each part that could not be made; the others are there.

    Raises:
        ConfigError: a path does not exist, holds no run, or the reference was not run.
        SetupError: `out` cannot be written, or W&B does not take the workspace.
    """
    collection = load(paths)
    left, doubtful = summaries.missing(collection), summaries.doubtful(collection)
    if not collection.runs:
        first = f"; {left.title}, the first: {', '.join(c.text for c in left.rows[0])}" if left else ""
        raise ConfigError(f"{', '.join(map(str, paths))}: no finished run{first}")
    found = benchmarks(collection.runs, collection.stopped)
    if reference is not None:
        summaries.check_reference(reference, found)
    failed: list[str] = []
    tables: dict[str, Table] = {}
    for benchmark in found:
        for arch in benchmark.archs:
            part = f"tables of {benchmark.name} on {arch}"
            made = attempt(part, lambda b=benchmark, a=arch: _tables(b, a, reference or "equal"), failed) or {}
            prefix = _unused(slug(f"{benchmark.name} {arch}"), tables)
            tables |= {f"{prefix}-{kind}": table for kind, table in made.items()}
    for name, table in (("contradictions", doubtful), ("missing", left)):
        if table:
            _say(table.terminal() + "\n")
            tables[name] = table
    try:
        files = _write(tables, found, collection, out, formats, failed)
    except OSError as error:
        raise SetupError(f"cannot write to {error.filename or out}: {error.strerror}; choose another --out") from error
    _say("\n".join(map(str, files)))
    if wandb is not None:
        from mtl.report.wandb_workspace import create

        _say("\n".join(create(found, wandb)))
    return failed


def _tables(benchmark: Protocol, arch: str, reference: str) -> dict[str, Table]:
    """{kind: table} of one benchmark on one architecture; the main ones are printed."""
    scores = Scores(benchmark, arch)
    tables = {"figures": summaries.metrics_table(scores)}
    _show(tables["figures"])
    for at in benchmark.selections if scores.groups else ():
        made = {
            "multi-task": summaries.multi_task(scores, at),
            "differences": summaries.differences(scores, reference, at),
            "optimizers": summaries.optimizers(scores, at),
        }
        made = {kind: table for kind, table in made.items() if table is not None}
        tables |= {f"{kind}-{at}": table for kind, table in made.items()}
        if at == benchmark.main:
            for table in made.values():
                _show(table)
            if "differences" not in made:
                _say(f"no differences from {reference}: no other strategy on {arch} shares its config\n")
    if command := summaries.baseline_command(scores):
        _say(f"Δm needs single-task baselines with the same config: {command}\n")
    return tables


def _unused(prefix: str, names: Container[str]) -> str:
    """`prefix`, numbered where another benchmark has it: "a, b" and "a b" give the same file names."""
    numbered = (prefix if i == 1 else f"{prefix}-{i}" for i in itertools.count(1))
    return next(p for p in numbered if f"{p}-figures" not in names)


def _show(table: Table) -> None:
    _say(f"{table.terminal()}\n{textwrap.fill(table.note, 120)}\n")


def _say(text: str) -> None:
    """Print. Where the reader is gone (`| head`), the files are still to be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(
    tables: dict[str, Table], found: Sequence[Protocol], collection: Collection, out: Path, formats: Sequence[str],
    failed: list[str],
) -> list[Path]:  # fmt: skip
    """Every file, or a line in `failed`. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []

    def save(name: str, make: Callable[[], str]) -> None:
        if (text := attempt(name, make, failed)) is not None:
            files.append(out / name)
            replace_text(files[-1], text)

    if "md" in formats:
        save("report.md", lambda: "# Report\n\n" + "\n".join(t.markdown() for t in tables.values()))
    for name, table in tables.items():
        for suffix, make in (("csv", table.csv), ("tex", table.latex)):
            if suffix in formats:
                save(f"{name}.{suffix}", make)
    if "csv" in formats:
        save("runs.csv", lambda: summaries.per_run(found).csv())
    if "html" in formats:
        from mtl.report.figures import page  # here and below: what only some formats need takes a second to import

        shown = [table for name, table in tables.items() if name != "missing"]  # the page has its own list
        gaps = attempt("report.html", lambda: page.write(collection, found, shown, out / "report.html"), failed)
        if gaps is not None:
            failed += gaps
            files.append(out / "report.html")
    if kinds := [f for f in formats if f in FIGURES]:
        from mtl.report.figures import paper

        for b in found:
            files += attempt(f"figures of {b.name}", lambda b=b: paper.draw(b, out, kinds), failed) or []
    return files


if __name__ == "__main__":
    sys.exit(main())
