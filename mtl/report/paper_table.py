r"""The table of a paper: `paper.tex` for `\input`, and `methods.bib` with a reference for every shipped method.

`references.csv` has the papers: all authors as "Last, First and …", and the title, venue and year that the headers in
mtl/losses give. `methods.csv` says which method cites which of them.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from mtl.report.cells import decimals, fixed
from mtl.report.names import latex as tex
from mtl.report.names import slug
from mtl.report.notes import excuses
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import SELECTIONS
from mtl.report.scores import Scores
from mtl.report.statistics import deviation, mean

HEAD = "% By python -m mtl.report --paper, which replaces this file.\n"
WIDE = 5  # columns of numbers: a table with more spans both columns of a page
NONE = "--"
JOURNALS = {"TMLR": "Transactions on Machine Learning Research", "C. R. Math.": "Comptes Rendus Mathematique"}
PROCEEDINGS = {
    "CVPR": "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    "CVPR Workshops": "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR) Workshops",
    "ECCV": "European Conference on Computer Vision (ECCV)",
    "GCPR": "German Conference on Pattern Recognition (GCPR)",
    "ICCV": "IEEE/CVF International Conference on Computer Vision (ICCV)",
    "ICLR": "International Conference on Learning Representations (ICLR)",
    "ICML": "International Conference on Machine Learning (ICML)",
    "NeurIPS": "Advances in Neural Information Processing Systems (NeurIPS)",
}
_DELTA = {
    "main": "over the main metric of each task",
    "flat": "over all metrics",
    "task": "over all metrics, after a mean over each task's metrics",
}


def latex(benchmarks: Sequence[Protocol]) -> str:
    """One table for each benchmark and architecture on which a strategy has finished.

    It has the values of the last epoch, or of the selection that was asked for.
    """
    tables = [
        _table(Scores(benchmark, arch)) for benchmark in benchmarks for arch in benchmark.archs if benchmark.of(arch)
    ]
    return HEAD + "% Needs \\usepackage{booktabs,graphicx} and \\bibliography{methods}.\n" + "\n".join(tables)


def bibliography() -> str:
    """A BibTeX entry for every method that is shipped, and for the measures of the table."""
    return HEAD + "\n" + "\n".join(map(_entry, _read("references.csv")))


def _table(scores: Scores) -> str:
    at = scores.benchmark.select or "last"
    columns = list(scores.compared)
    gains = {g.label: scores.delta_m(g, at) for g in scores.groups}
    ranks = scores.mean_ranks(at)
    delta, rank = any(gains.values()), any(not math.isnan(r) for r in ranks.values())
    fair = [g for g in scores.groups if scores.comparable(g, at)]
    rows = []
    alone = [scores.alone(scores.groups[0], m, at) for m in columns]
    if not all(map(math.isnan, alone)):
        numbers = [
            NONE if math.isnan(x) else _fixed(x, decimals(scores, m)) for x, m in zip(alone, columns, strict=True)
        ]
        rows += [["Single-task", *numbers, *[NONE] * (delta + rank)], []]
    best = {m: _best([mean(scores.by_seed(g, m, at).values()) for g in fair], scores.compared[m]) for m in columns}
    best_gain = _best([mean(gains[g.label].values()) for g in fair], True)
    best_rank = min((r for r in ranks.values() if not math.isnan(r)), default=math.nan)
    for group in scores.groups:
        mine = group in fair
        row = [_name(group)]
        for metric in columns:
            values = list(scores.by_seed(group, metric, at).values())
            row.append(_cell(values, decimals(scores, metric), best[metric] if mine else None))
        if delta:
            row.append(_cell(list(gains[group.label].values()), 2, best_gain if mine else None))
        if rank:
            row.append(_cell([r] if not math.isnan(r := ranks[group.label]) else [], 2, best_rank, spread=False))
        rows.append(row)
    rows += [[_name(g), *[NONE] * (len(columns) + delta + rank)] for g in scores.lost if g.task is None and g.failures]
    return _environment(scores, columns, rows, delta, rank)


def _environment(scores: Scores, columns: Sequence[str], rows: list[list[str]], delta: bool, rank: bool) -> str:
    bench = scores.benchmark
    above, below, rules = _head(scores, columns)
    further = [r"$\Delta_m$ (\%) $\uparrow$"] * delta + [r"MR $\downarrow$"] * rank
    lines = [" & ".join(["", *above, *[""] * len(further)]) + r" \\", rules] if above else []
    lines.append(" & ".join(["Method", *below, *further]) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(row) + r" \\" if row else r"\midrule" for row in rows]
    name = "table*" if len(below) + len(further) > WIDE else "table"
    label = slug(f"{bench.name} {scores.arch}")
    return "\n".join([
        rf"\begin{{{name}}}[t]",
        r"  \centering\footnotesize\setlength{\tabcolsep}{4pt}",
        rf"  \caption{{{_caption(scores, delta, rank)}}}",
        rf"  \label{{tab:{re.sub('[^A-Za-z0-9.-]', '-', label)}}}",
        r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"  \begin{{tabular}}{{l{'r' * (len(below) + len(further))}}}",
        *(f"    {line}" for line in [r"\toprule", *lines, r"\bottomrule"]),
        r"  \end{tabular}}",
        rf"\end{{{name}}}",
        "",
    ])  # fmt: skip


def _head(scores: Scores, columns: Sequence[str]) -> tuple[list[str], list[str], str]:
    """The tasks above their metrics, the metrics with arrows, and the rules between; no tasks for means over many."""
    up = {True: r"$\uparrow$", False: r"$\downarrow$", None: ""}
    if scores.crowded:
        return [], [f"{tex(m)} {up[scores.compared[m]]}" for m in columns], ""
    owners = [scores.owner.get(m, "") for m in columns]
    words = [m.removeprefix(f"{t}_").replace("_", " ") for m, t in zip(columns, owners, strict=True)]
    units = [" (%)" if m.endswith("_accuracy") else "" for m in columns]
    below = [f"{tex(w + u)} {up[scores.compared[m]]}" for w, u, m in zip(words, units, columns, strict=True)]
    above, rules, place = [], [], 2
    for owner, same in groupby(owners):
        count = len(list(same))
        above.append(rf"\multicolumn{{{count}}}{{c}}{{{tex(owner)}}}")
        rules.append(rf"\cmidrule(lr){{{place}-{place + count - 1}}}")
        place += count
    return above, below, "".join(rules)


def _caption(scores: Scores, delta: bool, rank: bool) -> str:
    bench = scores.benchmark
    seeds = sorted({r.seed for g in scores.groups for r in g.runs})
    counts = sorted({len(g.runs) for g in scores.groups})
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    number = f"{many} seed{'' if counts == [1] else 's'} ({', '.join(map(str, seeds))})"
    what = "mean and standard deviation over" if counts[-1] > 1 else "of"
    parts = [
        f"{tex(bench.name)}, {tex(scores.arch)}: test metrics, {SELECTIONS[bench.select or 'last']}, {what} {number}.",
        "Bold: the best multi-task method." if len(scores.groups) > 1 else "",
        rf"$\Delta_m$: mean relative gain over single-task learning \cite{{maninis2019astmt}}, {_DELTA[bench.delta_m]}"
        f"{_against(scores)}."
        if delta
        else "",
        r"MR: mean rank over the metrics \cite{navon2022nash}." if rank else "",
        tex(excuses(scores)),
    ]
    return " ".join(filter(None, parts))


def _against(scores: Scores) -> str:
    """The baseline of Δm, and how its protocol differs."""
    common = scores.benchmark.common.get(scores.arch)
    return tex(f", against {common.words}. {common.warning}".rstrip(" .")) if common else ""


def _name(group: Group) -> str:
    """The method's name with its reference, and what else its label says."""
    known = _methods().get(group.name)
    if known is None:
        return tex(group.label)
    name, keys = known
    return tex(name) + (rf"~\cite{{{','.join(keys)}}}" if keys else "") + tex(group.label.removeprefix(group.name))


def _cell(values: Sequence[float], digits: int, best: float | None, spread: bool = True) -> str:
    """Mean and deviation, the best in bold."""
    if not values:
        return NONE
    average, deviated = mean(values), deviation(values)
    text = _fixed(average, digits)
    text = rf"\textbf{{{text}}}" if average == best else text
    return text + (rf" {{\scriptsize$\pm${_fixed(deviated, digits)}}}" if spread and deviated is not None else "")


def _fixed(value: float, digits: int) -> str:
    return tex(fixed(value, digits))


def _best(means: Sequence[float], higher: bool | None) -> float | None:
    known = [m for m in means if math.isfinite(m)]
    return (max if higher else min)(known) if len(known) > 1 else None


def _entry(reference: dict[str, str]) -> str:
    venue = reference["venue"]
    kind = "misc" if not venue else "article" if venue in JOURNALS else "inproceedings"
    fields = {
        # BibTeX takes an accent and its letter as one letter if both stand in braces.
        "author": re.sub(r"(\\\W)\{(\w)\}", r"{\1{\2}}", tex(reference["authors"])),
        "title": f"{{{tex(reference['title'])}}}",
        "journal": JOURNALS.get(venue, ""),
        "booktitle": PROCEEDINGS.get(venue, ""),
        "year": reference["year"],
        "eprint": reference["arxiv"],
        "archiveprefix": "arXiv" if reference["arxiv"] else "",
    }
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{reference['key']},", *lines, "}\n"])


@cache
def _methods() -> dict[str, tuple[str, list[str]]]:
    """{option: (name in print, keys of its references)}."""
    return {row["option"]: (row["name"], row["keys"].split()) for row in _read("methods.csv")}


def _read(name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
