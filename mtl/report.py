"""From finished runs to the tables of a paper: `python -m mtl.report [outputs/...]`. No torch, no network."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from mtl.config.errors import ConfigError, SetupError, UserError, suggest
from mtl.study import results
from mtl.study.compare import Benchmark, benchmarks
from mtl.study.runs import load
from mtl.study.scores import Scores
from mtl.study.tables import Table

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
    try:
        formats = options.format.split(",")
        allowed = (*FORMATS, *FIGURES)
        if wrong := [f for f in formats if f not in allowed]:
            raise ConfigError(f"--format {wrong[0]}: one of {', '.join(allowed)}{suggest(wrong[0], allowed)}")
        report(options.path, options.reference, options.out or options.path[0] / "report", formats, options.wandb)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `python -m mtl.report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report(
    paths: Sequence[Path], reference: str | None, out: Path, formats: Sequence[str], wandb: str | None = None
) -> None:
    """Print the main tables of all runs below `paths`; write tables, figures and the page into `out`.

    Args:
        paths: output trees, or directories of runs.
        reference: strategy that the others are compared with; None is equal, where it was run.
        out: folder.
        formats: of FORMATS and FIGURES.
        wandb: "entity/project", in which a W&B workspace is made.

    Raises:
        ConfigError: a path does not exist, holds no run, or the reference was not run.
        SetupError: `out` cannot be written, or W&B does not take the workspace.
    """
    collection = load(paths)
    left = results.missing(collection)
    if not collection.runs:
        first = f"; {left.title}, the first: {': '.join(c.text for c in left.rows[0])}" if left else ""
        raise ConfigError(f"{', '.join(map(str, paths))}: no finished run{first}")
    found = benchmarks(collection.runs, collection.stopped)
    if reference is not None:
        results.check_reference(reference, found)
    tables: dict[str, Table] = {}
    for benchmark in found:
        tables |= _tables(benchmark, reference or "equal")
    if left:
        print(left.terminal(), end="\n\n")
        tables["missing"] = left
    try:
        files = _write(tables, results.per_run(found), out, formats)
        if "html" in formats:
            from mtl.study import page  # here and below: what only some formats need takes a second to import

            tables.pop("missing", None)  # the page has its own list
            page.write(collection, found, list(tables.values()), out / "report.html")
            files.append(out / "report.html")
        if kinds := [f for f in formats if f in FIGURES]:
            from mtl.study import figures

            files += [file for benchmark in found for file in figures.draw(benchmark, out, kinds)]
    except OSError as error:
        raise SetupError(f"cannot write to {error.filename}: {error.strerror}; choose another --out") from error
    for file in files:
        print(file)
    if wandb is not None:
        from mtl.study.workspace import create

        print("\n".join(create(found, wandb)))


def _tables(benchmark: Benchmark, reference: str) -> dict[str, Table]:
    """{file name: table}; the main ones are printed."""
    tables: dict[str, Table] = {}
    for arch in benchmark.archs:
        scores, prefix = Scores(benchmark, arch), _slug(f"{benchmark.name} {arch}")
        tables[f"{prefix}-figures"] = results.figures(scores)
        _show(tables[f"{prefix}-figures"])
        for at in benchmark.selections if scores.groups else ():
            made = {
                "multi-task": results.multi_task(scores, at),
                "differences": results.differences(scores, reference, at),
                "optimizers": results.optimizers(scores, at),
            }
            made = {kind: table for kind, table in made.items() if table is not None}
            tables |= {f"{prefix}-{kind}-{at}": table for kind, table in made.items()}
            if at == benchmark.main:
                for table in made.values():
                    _show(table)
                if "differences" not in made:
                    print(f"no differences from {reference}: no other strategy on {arch} shares its config\n")
        if command := results.baseline_command(scores):
            print(f"Δm needs single-task baselines with the same config: {command}\n")
    return tables


def _show(table: Table) -> None:
    print(table.terminal())
    print(textwrap.fill(table.note, 120), end="\n\n")


def _write(tables: dict[str, Table], runs: Table, out: Path, formats: Sequence[str]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    files = []
    if "md" in formats:
        files.append(out / "report.md")
        files[-1].write_text("# Report\n\n" + "\n".join(t.markdown() for t in tables.values()))
    for name, table in tables.items():
        for suffix, text in (("csv", table.csv), ("tex", table.latex)):
            if suffix in formats:
                files.append(out / f"{name}.{suffix}")
                files[-1].write_text(text())
    if "csv" in formats:
        files.append(out / "runs.csv")
        files[-1].write_text(runs.csv())
    return files


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text.replace(",", "")).strip("-")


if __name__ == "__main__":
    sys.exit(main())
