"""A panel as Plotly wants it, on light paper; page.js swaps the colours where the reader's screen is dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from mtl.report.figures.data import Panel, Trace
from mtl.report.figures.style import Style
from mtl.report.names import minus

GRID, GREY, INK, PAPER, CLEAR = "#e6e3db", "#6b675f", "#1c1b19", "#ffffff", "rgba(0,0,0,0)"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


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
        "yaxis": {**axis, "title": {"text": _safe(panel.y), "standoff": 10}, **_scale(panel, "y")},
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "showlegend": False, "hovermode": "closest",
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": GREY, "font": {"color": INK}, "align": "left"},
        "shapes": [], "annotations": [],
    }  # fmt: skip
    if panel.limits:
        layout["yaxis"]["range"] = list(panel.limits)
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
        # A line of no width still gets one when the pointer lights it up.
        unseen = {"width": 0, "color": "rgba(0,0,0,0)"}
        fill = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.13)", "line": unseen}
        yield {"type": "scatter", "mode": "lines", "x": _short(x), "y": _short(y), **fill, "hoverinfo": "skip",
               "meta": trace.label}  # fmt: skip
    symbols = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross",
               "X": "x", "p": "pentagon", "*": "star"}  # fmt: skip
    dots = (trace.marked and look.prominent) or len(trace.x) == 1 or trace.unfinished
    mode = "markers" if not trace.line else "lines+markers" if dots else "lines"
    text = f"<b>{_safe(trace.label)}</b>"
    if not panel.ticks:
        text += f"<br>{_safe(panel.x)}: %{{x:.4~g}}<br>{_safe(panel.y)}: %{{y:.4~g}}"
    # Every seed at every epoch of fifty strategies would be most of the file, and nobody looks for it in the grey ones.
    behind = look.prominent or panel.x != "epoch"
    for i, name in enumerate(trace.names if behind else ()):
        form = "" if isinstance(trace.values[0][i], str) else ":.4~g"
        text += f"<br>{_safe(name)} %{{customdata[{i}]{form}}}"
    symbol, size = symbols[look.marker], 5 if trace.line or trace.marked == "small" else 10
    if trace.unfinished:  # a ring at the end
        symbol, size = "circle-open", [*[0] * (len(trace.x) - 1), 8]
    yield {
        "type": "scatter", "mode": mode, "x": _short(trace.x), "y": _short(trace.y), "meta": trace.label,
        "line": {"color": look.colour, "width": 2 if look.prominent and not trace.unfinished else 1,
                 "dash": look.dash},
        "marker": {"color": look.colour, "symbol": symbol, "size": size,
                   "opacity": 0.6 if trace.marked == "small" else 1},
        "hoverlabel": {"bordercolor": look.colour},
        "customdata": [_short(v) for v in trace.values] if behind else [], "hovertemplate": text + "<extra></extra>",
    }  # fmt: skip


def _rule(layout: dict[str, Any], value: float, name: str, vertical: bool) -> None:
    along, across = ("x", "y") if vertical else ("y", "x")
    layout["shapes"].append({
        "type": "line", f"{along}0": value, f"{along}1": value, f"{across}0": 0, f"{across}1": 1,
        f"{across}ref": "paper", "line": {"color": GREY, "width": 1, "dash": "dot"}, "layer": "below",
    })  # fmt: skip
    # At opposite ends, so that the names of two rules that cross do not meet.
    place = {"x": 0.005, "xref": "paper", "y": value, "xanchor": "left", "yanchor": "bottom"}
    if vertical:
        place = {"x": value, "y": 1, "yref": "paper", "xanchor": "right", "yanchor": "top", "textangle": -90}
    layout["annotations"].append(
        {"text": _safe(name), "showarrow": False, "font": {"size": 10.5, "color": GREY}, **place}
    )


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


def _safe(text: str) -> str:
    """For Plotly, which reads some HTML and has templates."""
    return escape(text).replace("%{", "%&#123;")


def _short(values: Iterable[Any]) -> list[Any]:
    """Five digits are more than a screen shows; JSON has no number that is not finite."""
    return [(float(f"{v:.5g}") if math.isfinite(v) else None) if isinstance(v, float) else v for v in values]
