"""A table that can be printed, pasted and typeset: terminal, CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from mtl.tracking.console import table

_LATEX = {
    **{c: rf"\{c}" for c in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$",
    "Σ": r"$\Sigma$", "²": r"$^2$", "…": r"\ldots{}", "→": r"$\rightarrow$", "<": r"$<$", ">": r"$>$", "|": r"$|$",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: as printed.
        value: in full precision, None for a word.
        best: of its column.
        spread: standard deviation that belongs to the value; CSV gives it a column of its own.
    """

    text: str
    value: float | None = None
    best: bool = False
    spread: float | None = None


@dataclass
class Table:
    """Rows of cells under a header.

    Attributes:
        title: what it shows.
        note: how to read it: definitions, sources, what was left out.
        header: of each column; a line break may part it in two.
        rows: as long as the header each.
    """

    title: str
    note: str
    header: list[str]
    rows: list[list[Cell]]

    def terminal(self) -> str:
        """Plain text; the best of a column is starred."""
        starred = any(c.best for row in self.rows for c in row)
        rows = [
            [c.text + ("*" if c.best else " " if starred and i else "") for i, c in enumerate(r)] for r in self.rows
        ]
        above, below = self._lines()
        if not any(above):
            return f"{self.title}\n{table(below, rows)}"
        first, rule, second, *rest = table(above, [below, *rows]).split("\n")
        return "\n".join([self.title, first, second, rule, *rest])

    def csv(self) -> str:
        """Numbers in full precision, the standard deviation in a column of its own."""
        spread = [any(r[i].spread is not None for r in self.rows) for i in range(len(self.header))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header = self._header()
        writer.writerow(self._widen(header, [f"{h}, std" for h in header], spread))
        for row in self.rows:
            values = [c.text if c.value is None else str(c.value) for c in row]
            spreads = ["" if c.spread is None else str(c.spread) for c in row]
            writer.writerow(self._widen(values, spreads, spread))
        return out.getvalue()

    def _header(self) -> list[str]:
        return [h.replace("\n", ", ") for h in self.header]

    @staticmethod
    def _widen(values: Sequence[str], extra: Sequence[str], where: Sequence[bool]) -> list[str]:
        return [x for v, e, w in zip(values, extra, where, strict=True) for x in ((v, e) if w else (v,))]

    def markdown(self) -> str:
        """GitHub's tables; the best of a column in bold."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rows = [[f"**{_md(c.text)}**" if c.best else _md(c.text) for c in row] for row in self.rows]
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = [line([_md(h) for h in self._header()]), line(rule), *map(line, rows)]
        return f"### {self.title}\n\n" + "\n".join(lines) + f"\n\n{self.note}\n"

    def latex(self) -> str:
        r"""A booktabs table for `\input`; the best of a column in bold."""
        rows = [[rf"\textbf{{{_tex(c.text)}}}" if c.best else _tex(c.text) for c in row] for row in self.rows]
        kinds = ["r" if any(r[i].value is not None for r in self.rows) else "l" for i in range(len(self.header))]
        above, below = self._lines()
        spans = [(top, len(list(same))) for top, same in groupby(above)]
        tops = [_tex(t) if n == 1 else rf"\multicolumn{{{n}}}{{c}}{{{_tex(t)}}}" for t, n in spans]
        head = [" & ".join(tops)] if any(above) else []
        lines = [f"{line} \\\\" for line in [*head, " & ".join(map(_tex, below))]]
        body = [" & ".join(row) + r" \\" for row in rows]
        return "\n".join([
            r"% needs \usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"  \centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"  \caption{{{_tex(self.title)}}}",
            r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"  \begin{{tabular}}{{{''.join(kinds)}}}",
            *(f"    {line}" for line in [r"\toprule", *lines, r"\midrule", *body, r"\bottomrule"]),
            r"  \end{tabular}}",
            "",  # a paragraph of its own
            rf"  \medskip\parbox{{\linewidth}}{{{_tex(self.note)}}}",
            r"\end{table}",
            "",
        ])  # fmt: skip

    def _lines(self) -> tuple[list[str], list[str]]:
        """The header's upper and lower line."""
        return tuple(map(list, zip(*(h.split("\n") if "\n" in h else ("", h) for h in self.header), strict=True)))


def _md(text: str) -> str:
    return re.sub(r"([|*_`<\[\]\\])", r"\\\1", text)


def _tex(text: str) -> str:
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)  # a minus sign, not a hyphen
    return "".join(_LATEX.get(c, c) for c in text)
