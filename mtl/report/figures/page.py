"""The report as one HTML file that needs no network: tables to sort, plots to point at, and where it all comes from."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from mtl.report.attempt import attempt
from mtl.report.figures import per_run
from mtl.report.figures.data import Figure, Panel, Trace
from mtl.report.figures.style import Style, colour_note
from mtl.report.files import replace_text
from mtl.report.names import minus, visible
from mtl.report.protocols import Protocol
from mtl.report.runs import Collection, Run
from mtl.report.tables import Entry, Table

HERE = Path(__file__).parent
# The browser itself refuses whatever is not in the file.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
GRID, GREY, INK = "#e6e3db", "#6b675f", "#1c1b19"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
FILTER = 12  # strategies: with fewer, nobody needs a filter


def write(collection: Collection, benchmarks: Sequence[Protocol], tables: Sequence[Table], file: Path) -> list[str]:
    """Write the page; what could not be made, as lines that the page shows in its place.

    Args:
        collection: all runs that were found, of which those left out are listed.
        benchmarks: what the figures show.
        tables: in the order in which they are to be read.
        file: replaced in one step.
    """
    drawn: list[str] = []
    failed: list[str] = []
    numbers = itertools.count(1)

    def section(name: str, make: Callable[[], str]) -> str:
        before = len(failed)
        return attempt(name, make, failed) or "".join(f'<p class="note">{escape(x)}</p>' for x in failed[before:])

    sections = [
        section(f"Figures of {b.name}", lambda i=i, b=b: _benchmark(b, i, drawn, numbers))
        for i, b in enumerate(benchmarks)
    ]
    title = "Multi-task learning: " + ", ".join(dict.fromkeys(b.name for b in benchmarks)) if benchmarks else "No runs"
    strategies = max((len({g.label for g in b.groups}) for b in benchmarks), default=0)
    parts = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="lede">{escape(_lede(collection, benchmarks))}</p>',
        f'<nav class="contents">{_contents(benchmarks, tables, collection)}</nav></header>',
        '<p class="filter"><label for="filter">Strategies</label>'
        '<input id="filter" type="search" placeholder="filter, e.g. grad" autocomplete="off"></p>'
        if strategies > FILTER
        else "",
        '<main><noscript><p class="note">The plots and the sorting need JavaScript; the tables do not.</p></noscript>',
        f'<section id="tables"><h2>Tables</h2>{"".join(map(_table, tables, range(1, len(tables) + 1)))}</section>'
        if tables
        else "",
        *sections,
        section("Runs left out", lambda: _left_out(collection)),
        section("Where it comes from", lambda: _origin(collection.runs)),
        "</main>",
    ]
    content = _PAGE.format(
        policy=escape(POLICY, quote=True).replace("&#x27;", "'"),
        title=escape(title),
        css=(HERE / "page.css").read_text(),
        body="\n".join(parts),
        plots=f"[{','.join(drawn)}]",
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        js=(HERE / "page.js").read_text(),
    )
    replace_text(file, content)
    return failed


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
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


def _lede(collection: Collection, benchmarks: Sequence[Protocol]) -> str:
    """What this page is about, in two sentences."""
    runs = collection.runs
    if not runs:
        return "There are no finished runs."
    strategies = len({g.label for b in benchmarks for g in b.groups})
    archs = list(dict.fromkeys(r.info["arch"] for r in runs))
    days = sorted({str(r.info.get("finished"))[:10] for r in runs if r.info.get("finished")})
    when = f", finished {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") if days else ""
    text = (
        f"{_count(len(runs), 'finished run')} of {_count(strategies, 'strategy', 'strategies')} on {', '.join(archs)}"
    )
    baselines = sum(len(b.baselines) for b in benchmarks)
    text += f", {_count(baselines, 'single-task baseline')} among them" if baselines else ""
    text += f"{when}."
    left = len(collection.unfinished) + len(collection.damaged)
    return text + (f" {_count(left, 'run')} left out, listed below." if left else "")


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _contents(benchmarks: Sequence[Protocol], tables: Sequence[Table], collection: Collection) -> str:
    entries = [("tables", "Tables")] if tables else []
    entries += [(f"benchmark-{i}", b.name) for i, b in enumerate(benchmarks)]
    if collection.unfinished or collection.damaged:
        entries.append(("left-out", "Runs left out"))
    entries.append(("origin", "Where it comes from"))
    return " ".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in entries)


def _table(table: Table, number: int) -> str:
    numeric = [any(row[i].value is not None for row in table.rows) for i in range(len(table.header))]
    heads = "".join(
        f'<th scope="col" aria-sort="none"{"" if n else " class=word"}><button type="button">{escape(h)}</button></th>'
        for h, n in zip(table.header, numeric, strict=True)
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row, numeric))}</tr>" for row in table.rows)
    return (
        f"<figure><figcaption><b>Table {number}. {escape(table.title)}</b></figcaption>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{escape(table.note)}</p></figure>'
    )


def _cell(cell: Entry, numeric: bool) -> str:
    classes = " ".join(["best"] * cell.best + ["word"] * (not numeric))
    known = cell.value is not None and math.isfinite(cell.value)
    value = f' data-value="{float(cell.value)!r}"' if known else ""
    named = f' class="{classes}"' if classes else ""
    return f"<td{named}{value}>{escape(minus(cell.text))}</td>"


def _benchmark(benchmark: Protocol, number: int, drawn: list[str], numbers: Iterator[int]) -> str:
    """The figures of one benchmark, and their legend."""
    looks = per_run.styles(benchmark)
    figures = per_run.figures(benchmark)
    if not any(figures.values()):
        return ""
    parts = [
        f'<section id="benchmark-{number}"><h2>{escape(benchmark.name)}</h2>',
        _legend(looks),
    ]
    for arch, members in figures.items():
        if len(figures) > 1:
            parts.append(f"<h3>{escape(arch)}</h3>")
        for figure in members:
            parts.append(_figure(figure, next(numbers), looks, drawn))
    return "".join(parts) + "</section>"


def _legend(looks: Mapping[str, Style]) -> str:
    chips = []
    for label, look in looks.items():
        dashes = {"solid": "", "dash": "7 3", "dashdot": "7 2 2 2", "dot": "2 2"}[look.dash]
        swatch = (
            '<svg width="26" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" stroke-width="2.5" '
            f'stroke="{look.colour}" stroke-dasharray="{dashes}"/></svg>'
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
        f"show it; in a plot, drag to enlarge, double-click to return. {escape(colours)} Show "
        f'{buttons}</p><div class="chips">{"".join(chips)}</div></div>'
    )


def _figure(figure: Figure, number: int, looks: Mapping[str, Style], drawn: list[str]) -> str:
    boxes = []
    for panel in figure.panels:
        name = f"{figure.title}: {panel.title}" if panel.title else figure.title
        boxes.append(f'<div class="plot" data-plot="{len(drawn)}" role="img" aria-label="{escape(name)}"></div>')
        drawn.append(_json(spec(panel, looks)))
    count = len(boxes)
    size = " one" if count == 1 else " many" if count > 6 else ""
    return (
        f'<figure><div class="panels{size}">{"".join(boxes)}</div>'
        f"<figcaption><b>Figure {number}. {escape(figure.title)}.</b> {escape(figure.caption)}</figcaption></figure>"
    )


def spec(panel: Panel, looks: Mapping[str, Style]) -> dict[str, Any]:
    """A panel for Plotly: {"data": …, "layout": …}. `meta` of a trace is its strategy's label, or None."""
    traces = sorted(panel.traces, key=lambda t: looks[t.label].prominent)
    data = [d for t in traces for d in _traces(t, looks[t.label], panel)]
    if len(panel.front) > 1:
        x, y = zip(*panel.front, strict=True)
        line = {"color": GREY, "width": 1}
        data.insert(0, {"type": "scatter", "mode": "lines", "x": _short(x), "y": _short(y), "line": line,
                        "hoverinfo": "skip", "meta": None})  # fmt: skip
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "ticks": "outside", "ticklen": 4,
            "tickcolor": GREY, "automargin": True}  # fmt: skip
    layout: dict[str, Any] = {
        "font": {"family": FONT, "size": 12, "color": INK},
        "title": {"text": _safe(panel.title), "font": {"size": 13}, "x": 0.5, "y": 0.97} if panel.title else {},
        "margin": {"l": 56, "r": 14, "t": 34 if panel.title else 14, "b": 44},
        "xaxis": {**axis, "title": {"text": _safe(panel.x)}, **_scale(panel, "x")},
        "yaxis": {**axis, "title": {"text": _safe(panel.y)}, **_scale(panel, "y")},
        "paper_bgcolor": "#fff", "plot_bgcolor": "#fff", "showlegend": False, "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#fff", "bordercolor": GREY, "font": {"color": INK}, "align": "left"},
        "shapes": [], "annotations": [],
    }  # fmt: skip
    if panel.x == "epoch" and max(t.x[-1] for t in panel.traces) <= 12:
        layout["xaxis"]["dtick"] = 1
    for rule in panel.rules:
        _rule(layout, rule.value, rule.name, rule.vertical)
    if panel.ticks:
        _scales(layout, panel)
    return {"data": data, "layout": layout}


def _scale(panel: Panel, which: str) -> dict[str, Any]:
    if which not in panel.log:
        return {"type": "linear"}
    values = [v for t in panel.traces for v in getattr(t, which)]
    return {"type": "log", "tickformat": "~g", "dtick": 1 if max(values) > 100 * min(values) else "D2"}


def _traces(trace: Trace, look: Style, panel: Panel) -> Iterable[dict[str, Any]]:
    if len(trace.low) and look.prominent:
        x, y = [*trace.x, *reversed(trace.x)], [*trace.high, *reversed(trace.low)]
        red, green, blue = (int(look.colour[i : i + 2], 16) for i in (1, 3, 5))
        fill = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.13)", "line": {"width": 0}}
        yield {"type": "scatter", "mode": "lines", "x": _short(x), "y": _short(y), **fill, "hoverinfo": "skip",
               "meta": trace.label}  # fmt: skip
    symbols = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross",
               "X": "x", "p": "pentagon", "*": "star"}  # fmt: skip
    dots = (trace.marked and look.prominent) or len(trace.x) == 1
    mode = "markers" if not trace.line else "lines+markers" if dots else "lines"
    text = f"<b>{_safe(trace.label)}</b>"
    if not panel.ticks:
        text += f"<br>{_safe(panel.x)}: %{{x:.4g}}<br>{_safe(panel.y)}: %{{y:.4g}}"
    # Every seed at every epoch of fifty strategies would be most of the file, and nobody looks for it in the grey ones.
    behind = look.prominent or panel.x != "epoch"
    for i, name in enumerate(trace.names if behind else ()):
        form = "" if isinstance(trace.values[0][i], str) else ":.4g"
        text += f"<br>{_safe(name)} %{{customdata[{i}]{form}}}"
    yield {
        "type": "scatter", "mode": mode, "x": _short(trace.x), "y": _short(trace.y), "meta": trace.label,
        "line": {"color": look.colour, "width": 2 if look.prominent else 1, "dash": look.dash},
        "marker": {"color": look.colour, "symbol": symbols[look.marker], "size": 5 if trace.line or
                   trace.marked == "small" else 10, "opacity": 0.6 if trace.marked == "small" else 1},
        "customdata": [_short(v) for v in trace.values] if behind else [], "hovertemplate": text + "<extra></extra>",
    }  # fmt: skip


def _rule(layout: dict[str, Any], value: float, name: str, vertical: bool) -> None:
    along, across = ("x", "y") if vertical else ("y", "x")
    layout["shapes"].append({
        "type": "line", f"{along}0": value, f"{along}1": value, f"{across}0": 0, f"{across}1": 1,
        f"{across}ref": "paper", "line": {"color": GREY, "width": 1, "dash": "dot"}, "layer": "below",
    })  # fmt: skip
    place = {"xanchor": "right", "yanchor": "bottom", "textangle": -90} if vertical else {}
    layout["annotations"].append({
        along: value, across: 0 if vertical else 1, f"{across}ref": "paper", "text": _safe(name), "showarrow": False,
        "font": {"size": 10.5, "color": GREY}, "xanchor": "right", "yanchor": "bottom", **place,
    })  # fmt: skip


def _scales(layout: dict[str, Any], panel: Panel) -> None:
    """Parallel coordinates: a scale of its own at every tick."""
    places = list(range(len(panel.ticks)))
    names = [_safe(t).replace(" ", "<br>", 1) for t in panel.ticks]
    layout["xaxis"].update(tickvals=places, ticktext=names, showgrid=False, showline=False, ticks="",
                           range=[-0.3, len(places) - 0.7], ticklabelstandoff=14)  # fmt: skip
    layout["yaxis"].update(visible=False, range=[-0.03, 1.03])
    layout["margin"].update(l=20, r=20, t=30)
    for x, (low, high) in zip(places, panel.ends, strict=True):
        layout["shapes"].append({"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1,
                                 "line": {"color": GREY, "width": 1}, "layer": "below"})  # fmt: skip
        for y, value, anchor in ((-0.03, low, "top"), (1.03, high, "bottom")):
            text = minus(f"{value:.4g}")
            layout["annotations"].append({"x": x, "y": y, "text": text, "showarrow": False, "yanchor": anchor,
                                          "font": {"size": 11, "color": GREY}})  # fmt: skip


def _left_out(collection: Collection) -> str:
    if not collection.unfinished and not collection.damaged:
        return ""
    rows = [(visible(str(d)), "unfinished", why) for d, why in collection.unfinished]
    rows += [(visible(str(d)), "damaged", why) for d, why in collection.damaged]
    cells = "".join(
        f"<tr><td><code>{escape(d)}</code></td><td>{kind}</td><td>{escape(why)}</td></tr>" for d, kind, why in rows
    )
    return (
        '<section id="left-out"><h2>Runs left out</h2><p>They are in no table and no figure, unless a note says so.</p>'
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


def _safe(text: str) -> str:
    """For Plotly, which reads some HTML and has templates."""
    return escape(text).replace("%{", "%&#123;")


def _short(values: Iterable[Any]) -> list[Any]:
    """Five digits are more than a screen shows; JSON has no number that is not finite."""
    return [(float(f"{v:.5g}") if math.isfinite(v) else None) if isinstance(v, float) else v for v in values]


def _json(content: Any) -> str:
    """JSON inside a script element."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return re.sub("[<\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
