"""The report as one HTML file that needs no network: tables to sort, interactive plots, and the origin of the runs."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from mtl.report.attempt import Failures, attempt
from mtl.report.figures import per_run, pictures
from mtl.report.figures.data import Figure
from mtl.report.figures.plot import spec
from mtl.report.figures.style import DARK, Style, colour_note
from mtl.report.files import replace_text
from mtl.report.glossary import used
from mtl.report.names import minus, visible
from mtl.report.protocols import Protocol
from mtl.report.runs import Collection, Run
from mtl.report.tables import Entry, Table

HERE = Path(__file__).parent
# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
NAMED = 3  # benchmarks in the title
FILTER = 12  # strategies: with fewer, nobody needs a filter
# The reading order: each table stands beside the figures that show the same.
ORDER = ("metrics", "learning-curves", "tasks", "baseline", "tuned", "multi-task", "parallel-coordinates", "pareto",
         "optimizers", "differences", "weights", "gradients", "layers", "cost", "learning-rates")  # fmt: skip
FOLDED = {"tasks": "All tasks, one by one", "": "The same tables for the best test epoch"}

Findings = Mapping[tuple[str, str], Sequence[str]]


@dataclass
class _Page:
    """State that the parts of the page share: their numbers, the plots' data, the failures so far."""

    failed: Failures = field(default_factory=Failures)
    drawn: list[str] = field(default_factory=list)
    tables: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    figures: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    sprites: pictures.Sprites = field(default_factory=pictures.Sprites)
    said: int = 0  # of `failed`, the lines that the page shows already

    def part(self, name: str, make: Callable[[], str]) -> str:
        """The HTML of a part. If it cannot be made, a line says so in its place."""
        made = attempt(name, make, self.failed)
        new, self.said = self.failed[self.said :], len(self.failed)
        return (made or "") + _not_made(new)


def write(
    collection: Collection, benchmarks: Sequence[Protocol], tables: Sequence[Table], file: Path,
    findings: Findings | None = None, refresh: float | None = None, gone: Sequence[str] = (),
) -> Failures:  # fmt: skip
    """Write the page. Returns the parts that could not be made, as lines that the page shows in their place.

    Args:
        collection: all runs that were found. The page lists the runs that were left out.
        benchmarks: what the figures show.
        tables: in the order in which they are to be read. Those on a benchmark stand beside its figures.
        file: replaced in one step.
        findings: {(benchmark, arch): sentences}, for the box on top.
        refresh: seconds after which the page loads itself again.
        gone: lines about parts that could not be made before.
    """
    page = _Page()
    names = {b.name for b in benchmarks}
    general = [t for t in tables if t.about[0] not in names]
    title = _title(list(dict.fromkeys(b.name for b in benchmarks)))
    strategies = max((len({g.label for g in b.groups}) for b in benchmarks), default=0)
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        page.part("Summary", lambda: f'<p class="lede">{escape(_lede(collection, benchmarks))}</p>'),
        page.part("Findings", lambda: _findings(findings or {})),
        _not_made(gone),
        f'<nav class="contents">{_contents(benchmarks, general, collection)}</nav></header>',
        '<p class="filter"><label for="filter">Strategies</label>'
        '<input id="filter" type="search" placeholder="filter, e.g. grad" autocomplete="off"></p>'
        if strategies > FILTER
        else "",
        '<main><noscript><p class="note">The plots and the sorting need JavaScript; the tables do not.</p></noscript>',
        f'<section id="tables"><h2>Tables</h2>{"".join(_table(t, page) for t in general)}</section>' if general else "",
        *(page.part(b.name, partial(_benchmark, b, i, tables, page)) for i, b in enumerate(benchmarks)),
        page.part("Words", lambda: _words(tables)),
        page.part("Runs left out", lambda: _left_out(collection)),
        page.part("Where it comes from", lambda: _origin(collection.runs)),
        "</main>",
    ]
    parts.append(f"<style>{page.sprites.css}</style>")
    content = _PAGE.format(
        policy=escape(POLICY, quote=True).replace("&#x27;", "'"),
        refresh=f'<meta http-equiv="refresh" content="{math.ceil(refresh)}">\n' if refresh else "",
        title=escape(title),
        css=(HERE / "page.css").read_text(),
        body="\n".join(parts),
        plots=f"[{','.join(page.drawn)}]",
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        js=(HERE / "page.js").read_text().replace("/* DARK */ {}", _json(DARK)),
    )
    replace_text(file, content)
    return page.failed


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{refresh}<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
{body}
<script type="application/json" id="plots">{plots}</script>
<script>{plotly}</script>
<script>
{js}</script>
</body>
</html>
"""


def _title(names: Sequence[str]) -> str:
    """The benchmarks; their number where the names would fill the screen."""
    if not names:
        return "No runs"
    return f"Multi-task learning: {', '.join(names) if len(names) <= NAMED else f'{len(names)} benchmarks'}"


def _lede(collection: Collection, benchmarks: Sequence[Protocol]) -> str:
    """The subject of the page in two sentences."""
    runs = collection.runs
    left = len(collection.unfinished) + len(collection.damaged)
    rest = f" {_count(left, 'run')} left out of the tables, listed below." if left else ""
    if not runs:
        return f"There are no finished runs.{rest}"
    strategies = len({g.label for b in benchmarks for g in b.groups})
    archs = list(dict.fromkeys(r.info["arch"] for r in runs))
    days = sorted({str(r.info.get("finished"))[:10] for r in runs if r.info.get("finished")})
    when = f", finished {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") if days else ""
    text = f"{_count(len(runs), 'finished run')} of {_count(strategies, 'strategy', 'strategies')}"
    alone = sum(len(g.runs) for b in benchmarks for g in b.baselines)
    text += f" and of single-task learning ({_count(alone, 'run')})" if alone else ""
    return f"{text} on {', '.join(archs)}{when}.{rest}"


def _findings(findings: Findings) -> str:
    """The box on top."""
    boxes = []
    for (name, arch), sentences in findings.items():
        head = f"<h3>{escape(name)}, {escape(arch)}</h3>" if len(findings) > 1 else ""
        boxes.append(f"{head}<p>{escape(' '.join(sentences))}</p>")
    if not boxes:
        return ""
    return f'<section id="findings"><h2>What the runs show, and what they do not</h2>{"".join(boxes)}</section>'


def _not_made(lines: Sequence[str]) -> str:
    return "".join(f'<p class="note">Not made: {escape(line)}</p>' for line in lines)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _contents(benchmarks: Sequence[Protocol], tables: Sequence[Table], collection: Collection) -> str:
    entries = [("tables", "Tables")] if tables else []
    entries += [(f"benchmark-{i}", b.name) for i, b in enumerate(benchmarks)]
    entries.append(("words", "Words"))
    if collection.unfinished or collection.damaged:
        entries.append(("left-out", "Runs left out"))
    entries.append(("origin", "Where it comes from"))
    return " ".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in entries)


def _table(table: Table, page: _Page) -> str:
    numeric = [any(row[i].value is not None for row in table.rows) for i in range(len(table.header))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{"" if n else " class=word"}><button type="button">{escape(h)}</button></th>'
        for h, n in zip(table.header, numeric, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in table.rows)
    return (
        f"<figure><figcaption><b>Table {next(page.tables)}. {escape(table.title)}</b></figcaption>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{escape(table.note)}</p></figure>'
    )


def _cell(cell: Entry, numeric: bool) -> str:
    classes = " ".join(["best"] * cell.best + ["word"] * (not numeric))
    known = cell.value is not None and math.isfinite(cell.value)
    value = f' data-value="{float(cell.value)!r}"' if known else ""
    named = f' class="{classes}"' if classes else ""
    return f"<td{named}{value}>{escape(minus(cell.text))}{'<sup>†</sup>' * cell.beats}</td>"


def _benchmark(benchmark: Protocol, number: int, tables: Sequence[Table], page: _Page) -> str:
    """The legend of a benchmark, and on each architecture the tables with the figures that show the same."""
    looks = attempt(f"looks of {benchmark.name}", lambda: per_run.styles(benchmark), page.failed) or {}
    figures = per_run.figures(benchmark, page.failed) if looks else {}
    own = [t for t in tables if t.about[0] == benchmark.name]
    archs = list(dict.fromkeys([*figures, *(t.about[1] for t in own)]))
    if not own and not any(figures.values()):
        return ""
    parts = [f'<section id="benchmark-{number}"><h2>{escape(benchmark.name)}</h2>', _legend(looks) if looks else ""]
    for arch in archs:
        if len(archs) > 1:
            parts.append(f"<h3>{escape(arch)}</h3>")
        here = per_run.on(benchmark, arch)
        parts += _on(here, arch, [t for t in own if t.about[1] == arch], figures.get(arch, []), looks, page)
    return "".join(parts) + "</section>"


def _on(
    benchmark: Protocol, arch: str, tables: Sequence[Table], figures: Sequence[Figure], looks: Mapping[str, Style],
    page: _Page,
) -> list[str]:  # fmt: skip
    """Tables, figures and pictures of one architecture in reading order. Folded parts come last, or stand in their own
    place."""
    parts = []
    for kind in ORDER:
        for table in tables:
            if table.kind == kind and not table.folded:
                parts.append(page.part(table.title, partial(_table, table, page)))
        for figure in figures:
            if figure.name == kind:
                parts.append(page.part(f"{figure.title}, {arch}", partial(_figure, figure, looks, page)))
        parts.append(_fold("tasks", [t for t in tables if t.kind == kind == "tasks"], page))
    drawn = partial(pictures.section, benchmark, list(looks), page.sprites, page.figures)
    parts.append(page.part(f"Pictures, {arch}", drawn))
    parts.append(_fold("", [t for t in tables if t.folded and t.kind != "tasks"], page))
    return parts


def _fold(kind: str, tables: Sequence[Table], page: _Page) -> str:
    """Tables that open with a click."""
    inside = "".join(page.part(t.title, partial(_table, t, page)) for t in tables)
    return f"<details><summary>{FOLDED[kind]}</summary>{inside}</details>" if tables else ""


def _words(tables: Sequence[Table]) -> str:
    """The glossary: each term of the tables, explained once."""
    words = used(term for table in tables for term in table.terms)
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in words.items())
    hint = "<p>A click on the head of a column sorts a table; a third click restores its order.</p>"
    return f'<section id="words"><h2>Words</h2>{hint}<dl>{entries}</dl></section>'


def _legend(looks: Mapping[str, Style]) -> str:
    chips = []
    for label, look in looks.items():
        dashes = {"solid": "", "dash": "7 3", "dashdot": "7 2 2 2", "dot": "2 2"}[look.dash]
        swatch = (
            f'<svg width="26" height="8" aria-hidden="true" style="--light:{look.colour};'
            f'--dark:{DARK.get(look.colour, look.colour)}"><line x1="0" y1="4" x2="22" y2="4" '
            f'stroke-width="2.5" stroke-dasharray="{dashes}"/></svg>'
        )
        chips.append(
            f'<button type="button" aria-pressed="true" data-label="{escape(label)}" '
            f'data-prominent="{int(look.prominent)}">{swatch}{escape(label)}</button>'
        )
    colours = colour_note(looks)
    if colours:
        colours += " Point at a curve in colour for every seed's value; one in grey shows their mean."
    sets = ["all", "none", *(["coloured"] if any(not k.prominent for k in looks.values()) else [])]
    buttons = "".join(f'<button type="button" data-set="{s}">{s}</button>' for s in sets)
    buttons += '<button type="button" data-set="matching" hidden>only those that match the filter</button>'
    return (
        '<div class="legend"><p class="sets">Best first. Point at a strategy to see it in all plots, click to hide or '
        f"show it; in a plot, drag to enlarge, double-click to return or to see all of it. {escape(colours)} Show "
        f'{buttons}</p><div class="chips">{"".join(chips)}</div></div>'
    )


def _figure(figure: Figure, looks: Mapping[str, Style], page: _Page) -> str:
    boxes, data = [], [_json(spec(panel, looks)) for panel in figure.panels]
    for panel, number in zip(figure.panels, itertools.count(len(page.drawn)), strict=False):
        name = f"{figure.title}: {panel.title}" if panel.title else figure.title
        boxes.append(f'<div class="plot" data-plot="{number}" role="img" aria-label="{escape(name)}"></div>')
    page.drawn += data
    count = len(boxes)
    size = " one" if count == 1 else " many" if count > 6 else ""
    return (
        f'<figure><div class="panels{size}">{"".join(boxes)}</div><figcaption><b>Figure {next(page.figures)}. '
        f"{escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>"
    )


def _left_out(collection: Collection) -> str:
    if not collection.unfinished and not collection.damaged:
        return ""
    rows = [(visible(str(d)), "unfinished", why) for d, why in collection.unfinished]
    rows += [(visible(str(d)), "damaged", why) for d, why in collection.damaged]
    cells = "".join(
        f"<tr><td><code>{escape(d)}</code></td><td>{kind}</td><td>{escape(why)}</td></tr>" for d, kind, why in rows
    )
    return (
        '<section id="left-out"><h2>Runs left out</h2><p>They are in no table. Runs that have not finished have '
        "curves, thin and with a ring at their end.</p>"
        f'<div class="scroll"><table class="facts"><tbody>{cells}</tbody></table></div></section>'
    )


def _origin(runs: Sequence[Run]) -> str:
    """Commits, machines, versions and the commands."""
    if not runs:
        return ""
    rows = []
    for name, describe in (("commit", _commit), ("hardware", _hardware), ("versions", _versions)):
        for text, count in Counter(map(describe, runs)).most_common():
            rows.append(f"<tr><td>{name}</td><td>{escape(text)}</td><td>{_count(count, 'run')}</td></tr>")
    commands = list(dict.fromkeys(str(r.info.get("command", "unknown")) for r in runs))
    return (
        '<section id="origin"><h2>Where it comes from</h2>'
        f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'
        f"<details><summary>{_count(len(commands), 'command')} that made these runs</summary>"
        f"<pre>{escape(chr(10).join(commands))}</pre></details></section>"
    )


def _commit(run: Run) -> str:
    return str(run.info.get("commit") or "unknown") + (" with uncommitted changes" if run.info.get("dirty") else "")


def _hardware(run: Run) -> str:
    of = run.info.get("hardware", {})
    return ", ".join(map(str, filter(None, (of.get("gpu"), of.get("cpu"), _count(of.get("threads", 0), "thread")))))


def _versions(run: Run) -> str:
    return ", ".join(f"{k} {v}" for k, v in run.info.get("versions", {}).items())


def _json(content: Any) -> str:
    """JSON inside a script element."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return re.sub("[<\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
