"""From finished runs to the tables of a paper: `python -m mtl.report [outputs/...]`. No torch, no network."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import sys
import textwrap
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mtl.errors import ConfigError, SetupError, UserError, suggest
from mtl.report import baselines, output, summaries, tuning
from mtl.report import select as selection
from mtl.report.attempt import Failures, attempt
from mtl.report.findings import findings
from mtl.report.glossary import used
from mtl.report.names import slug, visible
from mtl.report.output import FIGURES, FORMATS, PAPER, Content
from mtl.report.protocols import DELTA_M, Protocol, benchmarks
from mtl.report.runs import SELECTIONS, fingerprint, load
from mtl.report.scores import Scores
from mtl.report.tables import Table
from mtl.tracking.console import WIDE, columns

SECONDS = 10.0  # between two looks of --watch


class NoRuns(ConfigError):
    """There is nothing to report yet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows its code
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    out = options.out or options.path[0] / "report"
    try:
        formats = options.format.split(",") if options.format else []
        allowed = (*FORMATS, *FIGURES)
        if wrong := [f for f in formats if f not in allowed]:
            raise ConfigError(f"--format {wrong[0]}: one of {', '.join(allowed)}{suggest(wrong[0], allowed)}")
        if options.delta_m not in DELTA_M:
            close = suggest(options.delta_m, DELTA_M)
            raise ConfigError(f"--delta-m {options.delta_m}: one of {', '.join(DELTA_M)}{close}")
        formats += [PAPER] if options.paper else []
        settings = (
            options.path,
            options.reference,
            out,
            formats,
            options.wandb,
            options.delta_m,
            options.select,
            options.baseline,
        )
        if options.watch is not None:
            return _watch(*settings, every=options.watch)
        failed = report(*settings)
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return _complain(failed, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtl.report", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("path", nargs="*", type=Path, default=[Path("outputs")],
        help="folders of runs, at any depth; default: outputs")  # fmt: skip
    add("--reference", metavar="NAME", help="strategy that the others are compared with; default: equal")
    add("--out", type=Path, metavar="DIR", help="where to write; default: PATH/report")
    add("--format", metavar="A,B", help=f"of the tables: {', '.join(FORMATS)} (default: all); figures in addition: "
        f"{', '.join(FIGURES)}; formats that are in DIR already are brought up to date")  # fmt: skip
    add("--paper", action="store_true", help="also write the table of a paper, paper.tex, and methods.bib")
    add("--delta-m", default="main", metavar="main|flat|task",
        help="metrics in Δm: the main one of each task (default), all alike, or all averaged by task")  # fmt: skip
    add(
        "--select",
        metavar="|".join(SELECTIONS),
        help="epoch that conclusions rest on; default: selected where there is validation data, else last",
    )
    add("--baseline", default=baselines.OWN, metavar="own|best|best-overall|NAME|FILE",
        help="what Δm is taken against: own single-task runs with the same config (default); the best own ones on "
        "validation data, of the same or of any architecture; published constants; or a CSV file with the columns "
        f"metric and value. NAME: {', '.join(baselines.published())}")  # fmt: skip
    add("--watch", nargs="?", type=seconds, const=SECONDS, metavar="SECONDS",
        help=f"look for new epochs again and again, and rebuild the report; default: every {SECONDS:g} s")  # fmt: skip
    add("--wandb", metavar="ENTITY/PROJECT", help="also make a W&B workspace that compares the runs")
    return parser


def seconds(text: str) -> float:
    """A positive number; argparse names this function in its error."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _complain(failed: Failures, out: Path) -> int:
    """Say what could not be made; the exit code."""
    for line in failed:
        print(f"error: not made: {line}", file=sys.stderr)
    if failed:
        print(f"the tracebacks are in {out / output.ERRORS}", file=sys.stderr)
    return 1 if failed else 0


def _watch(*settings, every: float) -> int:
    """Rebuild the report whenever a run has written something, until Ctrl-C. Raises UserError as `report` does."""
    paths, out, before = settings[0], settings[2], None
    _say(f"watching {', '.join(map(str, paths))}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        while True:
            now = fingerprint(paths)
            if now != before:
                before = now
                try:
                    if absent := [p for p in paths if not p.is_dir()]:
                        raise NoRuns(f"{absent[0]}: no such folder yet")
                    with contextlib.redirect_stdout(io.StringIO()):
                        failed = report(*settings, refresh=every)
                    found = load(paths)
                    going = sum(r.status == "running" for r in found.stopped)
                    text = f"{len(found.runs)} finished, {going} running: {out / 'report.html'}"
                    _complain(failed, out)
                except NoRuns as error:
                    text = str(error)
                _say(f"{time.strftime('%H:%M:%S')}  {text}")
            time.sleep(every)
    return 0


def report(
    paths: Sequence[Path], reference: str | None, out: Path, formats: Sequence[str], wandb: str | None = None,
    delta_m: str = "main", select: str | None = None, baseline: str = baselines.OWN, refresh: float | None = None,
) -> Failures:  # fmt: skip
    """Print the main tables of all runs below `paths`; write tables, figures and the page into `out`.

    Args:
        paths: output trees, or directories of runs.
        reference: strategy that the others are compared with; None is equal, where it was run.
        out: folder; what an earlier report wrote there is brought up to date or removed.
        formats: of FORMATS (none stands for all), and of FIGURES or PAPER in addition.
        wandb: "entity/project", in which a W&B workspace is made.
        delta_m, select: as in `Protocol`.
        baseline: as for `baselines.choose`.
        refresh: seconds after which the page loads itself again.

    Returns:
        a line for each part that could not be made; the others are there.

    Raises:
        ConfigError: a path does not exist, holds no run, or the reference, the baseline or the selection cannot be.
        SetupError: `out` cannot be written, or W&B does not take the workspace.
    """
    collection = load(paths)
    left, doubtful = summaries.missing(collection), summaries.doubtful(collection)
    if not collection.runs and not any(r.open for r in collection.stopped):
        first = f"; {left.title}, the first: {', '.join(c.text for c in left.rows[0])}" if left else ""
        raise NoRuns(f"{', '.join(map(str, paths))}: no finished run{first}")
    found = [replace(b, delta_m=delta_m) for b in benchmarks(collection.runs, collection.stopped)]
    if reference is not None:
        summaries.check_reference(reference, found)
    for line in _chosen(found, baseline, select):
        _say(textwrap.fill(line, _width()) + "\n")
    failed = Failures()
    content = Content(collection, found, refresh=refresh)
    for benchmark in found:
        for arch in benchmark.archs:
            name = f"{benchmark.name} on {arch}"
            scores = attempt(f"tables of {name}", lambda b=benchmark, a=arch: Scores(b, a), failed)
            if scores is None:
                continue
            prefix = _unused(slug(f"{benchmark.name} {arch}"), content.tables)
            for kind, table in _tables(scores, reference or "equal", failed).items():
                content.tables[f"{prefix}-{kind}"] = table
            said = attempt(f"findings of {name}", lambda s=scores: findings(s, reference or "equal"), failed)
            content.findings[benchmark.name, arch] = said or []
    _glossary(content.tables.values())
    for name, table in (("contradictions", doubtful), ("missing", left)):
        if table:
            _say(_shown(table) + "\n")
            content.tables[name] = table
    for (name, arch), sentences in content.findings.items():
        _say(textwrap.fill(f"{name}, {arch}: {' '.join(sentences)}", _width()) + "\n")
    try:
        files = output.write(content, out, formats, failed)
    except OSError as error:
        raise SetupError(f"cannot write to {error.filename or out}: {error.strerror}; choose another --out") from error
    _say("\n".join(map(str, files)))
    if wandb is not None:
        from mtl.report.wandb_workspace import create

        _say("\n".join(create(found, wandb)))
    return failed


def _chosen(found: Sequence[Protocol], baseline: str, select: str | None) -> list[str]:
    """Give the benchmarks their baseline and their selection; what the reader must know. Raises ConfigError."""
    if select:
        selection.check(select)
    lines = baselines.choose(baseline, found, select)
    return lines + (selection.select(select, found) if select else [])


def _tables(scores: Scores, reference: str, failed: Failures) -> dict[str, Table]:
    """{kind: table} of one benchmark on one architecture; the main ones are printed."""
    name, tables = f"of {scores.benchmark.name} on {scores.arch}", {}

    def add(kind: str, make, shown: bool) -> bool:
        table = attempt(f"{kind} {name}", make, failed)
        if table is not None:
            tables[kind] = table
            if shown:
                _say(f"{_shown(table)}\n{textwrap.fill(table.note, _width())}\n")
        return table is not None

    add("figures", lambda: summaries.metrics_table(scores), True)
    add("baseline", lambda: tuning.baseline(scores), True)
    add("tuned", lambda: tuning.tuned(scores), True)
    for at in scores.benchmark.selections if scores.groups else ():
        main = at == scores.benchmark.main
        add(f"tasks-{at}", lambda at=at: summaries.tasks_table(scores, at), False)
        add(f"multi-task-{at}", lambda at=at: summaries.multi_task(scores, at), main)
        compared = add(f"differences-{at}", lambda at=at: summaries.differences(scores, reference, at), main)
        add(f"optimizers-{at}", lambda at=at: summaries.optimizers(scores, at), main)
        if main and not compared:
            text = f"no differences from {reference}: no other strategy on {scores.arch} shares its config"
            _say(textwrap.fill(text, _width()) + "\n")
    add("cost", lambda: summaries.cost(scores), False)
    if command := attempt(f"baselines {name}", lambda: summaries.baseline_command(scores), failed):
        which = "" if scores.benchmark.common else " with the same config"
        _say(f"Δm needs single-task baselines{which}: {command}\n")
    return tables


def _shown(table: Table) -> str:
    """The table in lines that fit the terminal."""
    title, _, rest = table.fitted(columns() or WIDE).partition("\n")
    return f"{textwrap.fill(title, _width())}\n{rest}"


def _width() -> int:
    """Columns of running text."""
    return min(WIDE, columns() or WIDE)


def _unused(prefix: str, names: Container[str]) -> str:
    """`prefix`, numbered where another benchmark has it: "a, b" and "a b" give the same file names."""
    numbered = (prefix if i == 1 else f"{prefix}-{i}" for i in itertools.count(1))
    return next(p for p in numbered if f"{p}-figures" not in names)


def _glossary(tables) -> None:
    words = used(term for table in tables if not table.folded for term in table.terms)
    lines = [textwrap.fill(f"{t}: {text}", _width(), subsequent_indent="    ") for t, text in words.items()]
    if lines:
        _say("\n".join(lines) + "\n")


def _say(text: str) -> None:
    """Print. Where the reader is gone (`| head`), the files are still to be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
