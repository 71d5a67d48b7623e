"""A table that can be printed, pasted and typeset: terminal, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from mtl.report import names
from mtl.report.glossary import define
from mtl.tracking.console import fold, table


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        text: as printed.
        value: in full precision; None for a text.
        best: of its column.
        beats: it is better than single-task learning.
        spread: standard deviation that belongs to the value; CSV gives it a column of its own.
        count: number of values behind this entry, if it differs from the row's number; a column of its own in CSV.
    """

    text: str
    value: float | None = None
    best: bool = False
    spread: float | None = None
    count: int | None = None
    beats: bool = False

    @property
    def mark(self) -> str:
        """The mark behind the text: * for the best, † for better than single-task learning."""
        return "*" * self.best + "†" * self.beats


NONE = Entry("–")


@dataclass
class Table:
    """Rows of cells under a header.

    Attributes:
        title: the subject.
        note: sources, and what was left out.
        header: of each column; a line break may part it in two.
        rows: as long as the header each.
        terms: words of `glossary.TERMS` that it uses.
        about: benchmark and architecture; empty for a table on all runs.
        kind: "metrics", "multi-task", …: it decides the table's place in the page.
        folded: too long, or too seldom needed, to be seen at once.
    """

    title: str
    note: str
    header: list[str]
    rows: list[list[Entry]]
    terms: tuple[str, ...] = ()
    about: tuple[str, str] = ("", "")
    kind: str = ""
    folded: bool = False

    def terminal(self) -> str:
        """Plain text; the best of a column is starred."""
        width = max((len(c.mark) for row in self.rows for c in row), default=0)
        rows = [[c.text + (c.mark.ljust(width) if i else "") for i, c in enumerate(row)] for row in self.rows]
        above, below = self._lines()
        if not any(above):
            return f"{self.title}\n{table(below, rows)}"
        first, rule, second, *rest = table(above, [below, *rows]).split("\n")
        return "\n".join([self.title, first, second, rule, *rest])

    def fitted(self, width: int) -> str:
        """As `terminal`, in at most `width` columns. Of many metrics each gets a row, and each strategy a column."""
        text = self.terminal()
        fits = max(len(line) for line in text.split("\n")[1:]) <= width
        turned = not fits and self.keys == 1 and len(self.header) > len(self.rows)
        return fold(self._turned() if turned else text, width, 2 if turned else self.keys)

    def _turned(self) -> str:
        """Plain text with a row for each column of this table. A name is not repeated below itself."""
        columns = _together(self.rows)
        marks = [max(len(c.mark) for c in row) for row in columns]
        rows, before = [], ""
        for i, (above, below) in enumerate(zip(*self._lines(), strict=True)):
            if i:
                first, second = (above, below) if above else (below, "")
                cells = [row[i].text + row[i].mark.ljust(n) for row, n in zip(columns, marks, strict=True)]
                rows.append(["" if first == before else first, second, *cells])
                before = first
        wide = max(len(row[1]) for row in rows)
        rows = [[row[0], row[1].ljust(wide), *row[2:]] for row in rows]
        return f"{self.title}\n{table(['metric', '', *(row[0].text for row in columns)], rows)}"

    @property
    def keys(self) -> int:
        """The number of columns, from the left, that tell the rows apart."""
        wide = range(1, len(self.header))
        return next(
            (n for n in wide if len({tuple(c.text for c in row[:n]) for row in self.rows}) == len(self.rows)), 1
        )

    def csv(self) -> str:
        """The standard deviation in a column of its own. A column with a number holds numbers, or nothing."""
        columns: list[list[str]] = []
        words = names.spreadsheet
        for i, header in enumerate(self._header()):
            cells = [row[i] for row in self.rows]
            numeric = any(c.value is not None for c in cells) or all(c.text in ("", "–") for c in cells)
            columns.append([words(header), *(_number(c.value) if numeric else words(c.text) for c in cells)])
            for name, further in (("std", [c.spread for c in cells]), ("n", [c.count for c in cells])):
                if any(x is not None for x in further):
                    columns.append([words(f"{header}, {name}"), *map(_number, further)])
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows(zip(*columns, strict=True))
        return out.getvalue()

    def _header(self) -> list[str]:
        return [h.replace("\n", ", ") for h in self.header]

    def markdown(self) -> str:
        """GitHub's tables; the best of a column in bold."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        md = names.markdown
        rows = [[(f"**{md(c.text)}**" if c.best else md(c.text)) + "†" * c.beats for c in r] for r in self.rows]
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [line([md(h) for h in self._header()]), line(rule), *map(line, rows)]
        return f"### {md(self.title)}\n\n" + "\n".join(lines) + f"\n\n{md(self.note)}\n"

    def latex(self) -> str:
        r"""A booktabs table for `\input`; the best of a column in bold."""
        tex = names.latex
        rows = [
            [(rf"\textbf{{{tex(c.text)}}}" if c.best else tex(c.text)) + tex("†" * c.beats) for c in r]
            for r in self.rows
        ]
        kinds = ["r" if any(r[i].value is not None for r in self.rows) else "l" for i in range(len(self.header))]
        above, below = self._lines()
        spans = [(top, len(list(same))) for top, same in groupby(above)]
        tops = [tex(t) if n == 1 else rf"\multicolumn{{{n}}}{{c}}{{{tex(t)}}}" for t, n in spans]
        head = [" & ".join(tops)] if any(above) else []
        lines = [f"{line} \\\\" for line in [*head, " & ".join(map(tex, below))]]
        body = [" & ".join(row) + r" \\" for row in rows]
        note = f"{self.note} {define(self.terms)}".strip()
        return "\n".join([
            r"% needs \usepackage{booktabs,graphicx}; letters that pdflatex's fonts lack are spelled U+...",
            r"\begin{table}",
            r"  \centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"  \caption{{{tex(self.title)}}}",
            r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"  \begin{{tabular}}{{{''.join(kinds)}}}",
            *(f"    {line}" for line in [r"\toprule", *lines, r"\midrule", *body, r"\bottomrule"]),
            r"  \end{tabular}}",
            "",  # a paragraph of its own
            rf"  \medskip\parbox{{\linewidth}}{{{tex(note)}}}",
            r"\end{table}",
            "",
        ])  # fmt: skip

    def _lines(self) -> tuple[list[str], list[str]]:
        """The header's upper and lower line."""
        return tuple(map(list, zip(*(h.split("\n") if "\n" in h else ("", h) for h in self.header), strict=True)))


def _together(rows: list[list[Entry]]) -> list[list[Entry]]:
    """One row "single tasks" for "single, fine", "single, coarse", …, if no two of them share a column."""
    single = [row for row in rows if row[0].text.startswith("single, ")]
    if len(single) < 2:
        return rows
    joined = [Entry("single tasks")]
    for cells in zip(*(row[1:] for row in single), strict=True):
        known = {cell.text: cell for cell in cells if cell.text != NONE.text}
        if len(known) > 1:
            return rows
        joined.append(next(iter(known.values()), NONE))
    return [*(row for row in rows if row not in single), joined]


def _number(value: float | None) -> str:
    """In twelve digits, so that 99.7 is not 99.69999999999999; empty where there is no finite number."""
    if value is None or not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else repr(float(f"{value:.12g}"))
