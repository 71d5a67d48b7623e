"""The files of a report. An earlier report's files in the folder are brought up to date or removed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mtl.report import summaries
from mtl.report.attempt import Failures, attempt
from mtl.report.files import replace_text
from mtl.report.glossary import used
from mtl.report.names import markdown
from mtl.report.protocols import Protocol
from mtl.report.runs import Collection
from mtl.report.tables import Table

FORMATS = ("csv", "md", "tex", "html")
FIGURES = ("png", "pdf", "svg")
PAPER = "paper"
ERRORS = "report-errors.txt"

# A file is ours by its name and by its beginning. Another file with such a name may be the user's.
_TABLE = r"(.+-(figures|baseline|tuned|cost|(tasks|multi-task|differences|optimizers)-\w+)|contradictions|missing|runs)"
_FIGURE = r".+-(learning-curves|weights|gradients|layers|parallel-coordinates|pareto|cost|learning-rates)"
_OURS = (
    (rf"{_TABLE}\.csv", rb"(strategy|metric|task|optimizer|directory|benchmark),"),
    (rf"{_TABLE}\.tex", rb"% needs \\usepackage\{booktabs"),
    (r"paper\.tex", rb"% By python -m mtl\.report"),
    (r"methods\.bib", rb"% By python -m mtl\.report"),
    (r"report\.md", rb"# Report\n"),
    (r"report\.html", rb'(?s:.*)id="plots"'),
    (rf"{_FIGURE}\.(png|pdf|svg)", rb"(?s:.*)mtl\.report"),
    (re.escape(ERRORS), rb""),
)


def earlier(folder: Path) -> Iterator[Path]:
    """The files that a report wrote into a folder. Raises OSError."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        for name, beginning in _OURS:
            if re.fullmatch(name, file.name) and file.is_file() and re.match(beginning, file.read_bytes()):
                yield file


def formats(files: Iterable[Path]) -> set[str]:
    """The formats of a report's files."""
    return {PAPER if f.name in ("paper.tex", "methods.bib") else f.suffix[1:] for f in files if f.name != ERRORS}


@dataclass
class Content:
    """The content of a report.

    Attributes:
        collection: all runs that were found.
        benchmarks: its runs, sorted.
        tables: by the names of their files, in the order in which they are to be read.
        findings: {(benchmark, arch): what the runs show, in sentences}.
        refresh: seconds after which the page loads itself again.
    """

    collection: Collection
    benchmarks: Sequence[Protocol]
    tables: dict[str, Table] = field(default_factory=dict)
    findings: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    refresh: float | None = None


def write(content: Content, out: Path, asked: Sequence[str], failed: Failures) -> list[Path]:
    """Write every file, or note it in `failed`. Files that an earlier report wrote and this one does not are removed.

    Args:
        asked: formats; all of FORMATS if none of these is among them. Formats of an earlier report in `out` are added.

    Raises:
        OSError: `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = list(earlier(out))
    wanted = {*asked, *(() if any(f in FORMATS for f in asked) else FORMATS), *formats(before)}
    files: list[Path] = []

    def save(name: str, make: Callable[[], str]) -> None:
        if (text := attempt(name, make, failed)) is not None:
            files.append(out / name)
            replace_text(files[-1], text)

    if "md" in wanted:
        save("report.md", lambda: _markdown(content))
    for name, table in content.tables.items():
        for suffix, make in (("csv", table.csv), ("tex", table.latex)):
            if suffix in wanted:
                save(f"{name}.{suffix}", make)
    if "csv" in wanted:
        save("runs.csv", lambda: summaries.per_run(content.benchmarks).csv())
    if PAPER in wanted:
        from mtl.report import paper_table  # late, here and below: only some formats need it

        save("paper.tex", lambda: paper_table.latex(content.benchmarks))
        save("methods.bib", paper_table.bibliography)
    if "html" in wanted:
        from mtl.report.figures import page  # plotly takes a second to import

        shown = [table for name, table in content.tables.items() if name != "missing"]  # the page has its own list
        gaps = attempt(
            "report.html",
            lambda: page.write(content.collection, content.benchmarks, shown, out / "report.html", content.findings,
                               content.refresh, list(failed)),
            failed,
        )  # fmt: skip
        if gaps is not None:
            failed.add(gaps)
            files.append(out / "report.html")
    if kinds := [f for f in FIGURES if f in wanted]:
        from mtl.report.figures import paper

        for b in content.benchmarks:
            files += attempt(f"figures of {b.name}", lambda b=b: paper.draw(b, out, kinds, failed=failed), failed) or []
    if failed:
        replace_text(out / ERRORS, "\n".join(failed.tracebacks))
    for file in before:
        if file not in files and not (failed and file.name == ERRORS):
            file.unlink(missing_ok=True)
    return files


def _markdown(content: Content) -> str:
    parts = ["# Report\n"]
    if content.findings:
        parts.append("## What the runs show, and what they do not\n")
        parts += [f"- **{markdown(f'{name}, {arch}')}**: {markdown(' '.join(sentences))}"
                  for (name, arch), sentences in content.findings.items()]  # fmt: skip
        parts.append("")
    parts += [table.markdown() for table in content.tables.values() if not (table.folded and table.kind == "tasks")]
    if words := used(term for table in content.tables.values() for term in table.terms):
        parts += ["## Words\n", *(f"- **{markdown(term)}**: {markdown(text)}" for term, text in words.items()), ""]
    return "\n".join(parts)
