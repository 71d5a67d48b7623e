"""Figures of a study on paper: PNG, PDF and SVG, readable in grey."""

from __future__ import annotations

import textwrap
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: a figure must not need a screen
import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from mtl.report.attempt import Failures, attempt
from mtl.report.figures import per_run
from mtl.report.figures.data import Figure, Panel, Trace
from mtl.report.figures.style import REST, Style, colour_note
from mtl.report.names import minus, slug
from mtl.report.protocols import Protocol

FORMATS = ("png", "pdf", "svg")
MAKER = "mtl.report"  # by which a later report knows its files
LOOK = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # fonts embedded as TrueType, which publishers ask for
    "svg.fonttype": "path",
    "svg.hashsalt": "mtl",  # the same data give the same file
}
LINES = {"solid": "-", "dash": (0, (5, 2)), "dashdot": (0, (5, 1.5, 1, 1.5)), "dot": (0, (1, 1.3))}
GREY = "#555555"
DIRECT = 6  # panels: with more, names at the ends of lines leave no room for the lines


def draw(
    benchmark: Protocol, folder: Path, formats: Sequence[str] = ("png",), only: Container[str] | None = None,
    failed: Failures | None = None,
) -> list[Path]:  # fmt: skip
    """Every figure for which there are data, one file per figure, architecture and format.

    Args:
        benchmark: what to show.
        folder: made if it does not exist.
        formats: of FORMATS.
        only: names of the figures to draw; None draws all.
        failed: gets a line for each figure that cannot be made; None raises its error.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    looks, files = per_run.styles(benchmark), []
    for arch, figures in per_run.figures(benchmark, failed).items():
        for figure in figures:
            if only is not None and figure.name not in only:
                continue
            title = f"{benchmark.name}, {arch}: {figure.title[0].lower()}{figure.title[1:]}"
            stem = f"{slug(f'{benchmark.name} {arch}')}-{figure.name}"
            figure = replace(figure, caption=f"{figure.caption} {colour_note(looks)}".strip())
            targets = [folder / f"{stem}.{f}" for f in formats]
            drawing = partial(save, figure, looks, title, targets)
            files += drawing() if failed is None else attempt(title, drawing, failed) or []
    return files


def save(figure: Figure, looks: Mapping[str, Style], title: str, files: Sequence[Path]) -> list[Path]:
    """Write one figure to every one of `files`, whose suffixes say how."""
    with plt.rc_context(LOOK):
        canvas = render(figure, looks, title)
        for file in files:
            undated = {"png": {"Software": MAKER}, "pdf": {"CreationDate": None, "Creator": MAKER},
                       "svg": {"Date": None, "Creator": MAKER}}[file.suffix[1:]]  # fmt: skip
            canvas.savefig(file, dpi=200, metadata=undated)
        plt.close(canvas)
    return list(files)


def render(figure: Figure, looks: Mapping[str, Style], title: str) -> plt.Figure:
    """The figure in matplotlib: names at the ends of curves, a legend beside points."""
    count = len(figure.panels)
    direct = figure.curves and count <= DIRECT
    columns = min(count, 2 if direct else 3 if count <= 12 else 5)
    rows = -(-count // columns)
    width = 5.0 if count == 1 else 7.2
    height = (3.2 if count == 1 else 2.5 if columns < 5 else 1.6) * rows + 0.6
    canvas, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    canvas.suptitle(_legible(title, 120), x=0.01, ha="left", fontsize=9, fontweight="bold")
    note = textwrap.fill(_legible(figure.caption, 2000), int(width * 20))
    canvas.supxlabel(note, x=0.01, ha="left", fontsize=6.5, color=GREY, linespacing=1.35)
    axes = list(grid.flat)
    for axis, panel in zip(axes, figure.panels, strict=False):
        _panel(axis, panel, looks)
    for axis in axes[count:]:
        axis.remove()
    if direct:
        canvas.draw_without_rendering()  # the layout decides how far apart the names can be
        for axis, panel in zip(axes, figure.panels, strict=False):
            _names(axis, panel, looks)
    else:
        _legend(canvas, figure, looks)
    return canvas


def _panel(axis: plt.Axes, panel: Panel, looks: Mapping[str, Style]) -> None:
    for trace in panel.traces:
        look = looks[trace.label]
        above = 3 if look.prominent else 1
        if trace.line:
            weight = 1.4 if look.prominent and not trace.unfinished else 0.6
            dots = (trace.marked and look.prominent) or len(trace.x) == 1
            if trace.unfinished:
                axis.plot(trace.x[-1:], trace.y[-1:], "o", markerfacecolor="none", color=look.colour, markersize=4)
            axis.plot(trace.x, trace.y, color=look.colour, linestyle=LINES[look.dash], linewidth=weight, zorder=above,
                      marker=look.marker if dots else "", markersize=3.5,
                      label=None if trace.unfinished else trace.label)  # fmt: skip
            if len(trace.low) and look.prominent:
                axis.fill_between(trace.x, trace.low, trace.high, color=look.colour, alpha=0.13, linewidth=0)
        else:
            size = 28 if trace.marked == "large" else 13
            axis.scatter(trace.x, trace.y, color=look.colour, marker=look.marker, s=size, zorder=above, linewidth=0,
                         alpha=1 if trace.marked == "large" else 0.55, label=trace.label)  # fmt: skip
    for rule in panel.rules:
        (axis.axvline if rule.vertical else axis.axhline)(
            rule.value, color=GREY, linewidth=0.8, linestyle=LINES["dot"], zorder=2
        )
        # At opposite ends, so that the names of two rules that cross do not meet.
        place = {"xy": (rule.value, 0.98), "xycoords": axis.get_xaxis_transform(), "xytext": (-2, 0), "rotation": 90,
                 "va": "top"}  # fmt: skip
        if not rule.vertical:
            place = {"xy": (0.98, rule.value), "xycoords": axis.get_yaxis_transform(), "xytext": (0, 2), "va": "bottom"}
        axis.annotate(_legible(rule.name), **place, fontsize=6, color=GREY, textcoords="offset points", ha="right",
                      path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip
    if len(panel.front) > 1:
        axis.plot(*zip(*panel.front, strict=True), color=GREY, linewidth=0.7, zorder=1.5)
    axis.set(title=_legible(panel.title), xlabel=_legible(panel.x), ylabel=_legible(panel.y))
    if "x" in panel.log:
        axis.set_xscale("log")
    if "y" in panel.log:
        axis.set_yscale("log")
    if panel.limits:
        axis.set_ylim(*panel.limits)
    if panel.ticks:
        _scales(axis, panel)
    elif panel.x == "epoch":
        axis.xaxis.get_major_locator().set_params(integer=True)  # pyrefly: ignore[unexpected-keyword]


def _scales(axis: plt.Axes, panel: Panel) -> None:
    """Parallel coordinates: a scale of its own at every tick."""
    axis.set_xticks(range(len(panel.ticks)), [_legible(tick) for tick in panel.ticks])
    axis.tick_params(axis="x", length=0, pad=12)
    axis.set_yticks([])
    axis.grid(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.set(ylim=(-0.03, 1.03), ylabel="")
    for x, (low, high) in enumerate(panel.ends):
        axis.axvline(x, color=GREY, linewidth=0.6, zorder=0)
        for y, value, side in ((0, low, -1), (1, high, 1)):
            text = minus(f"{value:.4g}")
            axis.annotate(text, (x, y), xytext=(0, 5 * side), textcoords="offset points", ha="center",
                          va="bottom" if side > 0 else "top", fontsize=7, color=GREY)  # fmt: skip


def _names(axis: plt.Axes, panel: Panel, looks: Mapping[str, Style]) -> None:
    """The prominent strategies' names at the ends of their lines, moved apart where they would overlap."""
    named = list({t.label: t for t in sorted(panel.traces, key=lambda t: not t.unfinished)
                  if looks[t.label].prominent}.values())  # fmt: skip
    if not named:
        return
    box = axis.get_window_extent()
    ends = [(axis.transData.transform((t.x[-1], t.y[-1])) - (box.x0, box.y0)) / (box.width, box.height) for t in named]
    ends = [(x, min(max(y, 0.0), 1.0)) for x, y in ends]  # a value beyond the scale would take the line off the page
    heights = spread([y for _, y in ends], 8.5 * axis.figure.dpi / 72 / box.height)
    for trace, (x, y), height in zip(named, ends, heights, strict=True):
        colour, where = looks[trace.label].colour, axis.transAxes
        name = _legible(trace.label)
        axis.text(1.06, height, name, color=colour, fontsize=7, va="center", ha="left", transform=where)
        axis.add_line(Line2D([x, 1.05], [y, height], color=colour, linewidth=0.4, clip_on=False, transform=where))


def spread(heights: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """New heights at least `gap` apart, in the same order and with the least squared movement, within [low, high].

    Subtracting 0, gap, 2 gap, … turns the distances into an order, so this is an isotonic regression, solved by
    pooling adjacent violators. Where there is no room for all, the gap shrinks.
    """
    count = len(heights)
    gap = min(gap, (high - low) / max(count - 1, 1))
    order = sorted(range(count), key=lambda i: heights[i])
    blocks: list[list[float]] = []
    for place, i in enumerate(order):
        blocks.append([heights[i] - place * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    flat = [float(np.mean(b)) for b in blocks for _ in b]
    result = [0.0] * count
    for place, i in enumerate(order):
        result[i] = min(max(flat[place], low), high - (count - 1) * gap) + place * gap
    return result


def _legend(canvas: plt.Figure, figure: Figure, looks: Mapping[str, Style]) -> None:
    shown = {t.label for p in figure.panels for t in p.traces}
    entries = [(k, v) for k, v in looks.items() if k in shown and v.prominent]
    handles = [_handle(k, v, figure.panels[0].traces) for k, v in entries]
    if len(entries) < len(shown):
        rest = Style(REST, "solid", "o", False)
        handles.append(_handle(f"{len(shown) - len(entries)} others", rest, figure.panels[0].traces))
    canvas.legend(handles=handles, loc="outside right upper", fontsize=7)


def _handle(name: str, look: Style, traces: Sequence[Trace]) -> Line2D:
    line = any(t.line for t in traces)
    return Line2D([], [], color=look.colour, linestyle=LINES[look.dash] if line else "", label=_legible(name),
                  marker="" if line else look.marker, markersize=4.5, linewidth=1.4)  # fmt: skip


def _legible(text: str, longest: int = 40) -> str:
    """Text that matplotlib draws as it is: no formulas between dollars, and "U+6F22" for a letter the font lacks."""
    text = text if len(text) <= longest else f"{text[:longest]}…"
    return "".join(c if c in "\n " or _drawn(c) else f"U+{ord(c):04X}" for c in text).replace("$", r"\$")


@cache
def _drawn(character: str) -> bool:
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return font.get_char_index(ord(character)) != 0
