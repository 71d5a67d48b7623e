"""Pictures in the page: for each task the same test samples by every strategy, and one sample over the epochs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtl.report.names import visible
from mtl.report.notes import some
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import Run
from mtl.tracking.pictures import PictureGrid, epochs, path_of, read

BUDGET = 8 * 10**6  # characters of all pictures in a page, which some browsers and mail programs must carry
OVER = 6  # epochs of a strip
SMALL = 160  # of width: smaller pictures are enlarged, without a blur


@dataclass
class Sprites:
    """The pictures of a page: each one stands in it once, as the background of a style's class."""

    left: int = BUDGET
    styles: dict[bytes, str] = field(default_factory=dict)

    def add(self, tiles: NDArray) -> str | None:
        """The class that shows tiles (N, height, width, 3), one below the other; None if the page has no room."""
        key = tiles.tobytes()
        if key not in self.styles:
            from PIL import Image

            number, height, width, _ = tiles.shape
            file = io.BytesIO()
            Image.fromarray(tiles.reshape(number * height, width, 3)).save(file, "PNG", optimize=True)
            data = base64.b64encode(file.getvalue()).decode()
            if len(data) > self.left:
                return None
            self.left -= len(data)
            crisp = "image-rendering:pixelated;" if width < SMALL else ""
            self.styles[key] = (
                f"{{{crisp}aspect-ratio:{width}/{height};background-size:100% {100 * number}%;"
                f"background-image:url(data:image/png;base64,{data})}}"
            )
        return f"s{list(self.styles).index(key)}"

    @property
    def css(self) -> str:
        return "\n".join(f".s{i}{style}" for i, style in enumerate(self.styles.values()))


@dataclass(frozen=True)
class _Shown:
    """One run's pictures.

    Attributes:
        label: of its strategy.
        run: the run.
        epoch: the last one with pictures.
        sheet: the pictures of that epoch.
    """

    label: str
    run: Run
    epoch: int
    sheet: PictureGrid


def section(benchmark: Protocol, order: Sequence[str], sprites: Sprites, numbers: Iterator[int]) -> str:
    """The pictures of a benchmark on one architecture, as HTML; empty if no run has any.

    Args:
        benchmark: on one architecture.
        order: the strategies' labels, the best first: they get the page's room in this order.
        sprites: of the page.
        numbers: gives each figure its number.
    """
    wrong: list[str] = []
    groups = [*benchmark.groups, *benchmark.lost, *benchmark.baselines]
    place = {label: i for i, label in enumerate(order)}
    groups.sort(key=lambda g: place.get(g.label, len(place)))  # stable: baselines, which have no place, come last
    shown = [found for g in groups if (found := _of(g, _seed(groups), wrong))]
    if not shown:
        return _notes(wrong)
    tasks = list(dict.fromkeys(task for one in shown for task, _ in one.sheet.columns if task))
    parts = ["<h3>Pictures</h3>"]
    for task in tasks:
        parts.append(_side_by_side(task, shown, sprites, numbers, wrong))
    strips = [_over_epochs(one, sprites) for one in shown]
    if any(strips):
        parts.append(
            f"<details><summary>The first sample over the epochs</summary>{''.join(strips)}"
            '<p class="note">Pictures are made after the epochs 1, 2, 4, 8, … and the last one.</p></details>'
        )
    return "".join(parts) + _notes(wrong)


def _runs(group: Group) -> list[Run]:
    return [run for run in [*group.runs, *group.open] if epochs(run.directory)]


def _seed(groups: Sequence[Group]) -> int | None:
    """The seed with pictures of the most strategies; the smallest of several."""
    seeds = [run.seed for group in groups for run in _runs(group)]
    return min(seeds, key=lambda s: (-seeds.count(s), s), default=None)


def _of(group: Group, seed: int | None, wrong: list[str]) -> _Shown | None:
    """The latest pictures of a strategy that can be read, by the run with this seed if there is one."""
    for run in sorted(_runs(group), key=lambda r: (r.seed != seed, r.seed)):
        for epoch in reversed(epochs(run.directory)):
            if sheet := _read(run.directory, epoch, wrong):
                return _Shown(group.label, run, epoch, sheet)
    return None


def _read(directory: Path, epoch: int, wrong: list[str]) -> PictureGrid | None:
    try:
        return read(path_of(directory, epoch))
    except (OSError, ValueError) as error:
        reason = (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)
        _note(wrong, f"{visible(str(path_of(directory, epoch)))}: {reason}")
        return None


def _note(lines: list[str], line: str) -> None:
    if line not in lines:
        lines.append(line)


def _side_by_side(
    task: str, shown: Sequence[_Shown], sprites: Sprites, numbers: Iterator[int], wrong: list[str]
) -> str:
    """Rows: samples. Columns: image, truth, and each strategy's prediction."""
    having = [one for one in shown if one.sheet.column(task, "prediction") is not None]
    first = having[0].sheet
    columns, left = [], []
    for kind, owner, head in (("image", "", "image"), ("truth", task, "truth")):
        if (tiles := first.column(owner, kind)) is not None and (name := sprites.add(tiles)):
            columns.append((head, "", name))
    for one in having:
        if not _same(first, one.sheet, task):
            _note(wrong, f"{visible(str(one.run.directory))}: other samples than {having[0].label}'s")
        elif name := sprites.add(one.sheet.column(task, "prediction")):
            columns.append((one.label, f"seed {one.run.seed}, epoch {one.epoch}", name))
        else:
            left.append(one.label)
    samples = first.tiles.shape[1]
    heads = "".join(
        f'<th scope="col">{escape(head)}{f"<small>{below}</small>" if below else ""}</th>' for head, below, _ in columns
    )
    rows = [
        "".join(_tile(name, i, samples, f"{task}, {head}, sample {i + 1}") for head, _, name in columns)
        for i in range(samples)
    ]
    note = "Truth and predictions have the same colours; black has no label."
    if left:
        note += f" Left out, as pictures would make this page too large: {some(left)}."
    return _figure(f"Figure {next(numbers)}. {task}: the same test samples by each strategy.", note, heads, rows)


def _same(first: PictureGrid, other: PictureGrid, task: str) -> bool:
    """Whether two sheets show the same samples, by their image and truth."""
    pairs = ((first.column(*key), other.column(*key)) for key in (("", "image"), (task, "truth")))
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)


def _over_epochs(one: _Shown, sprites: Sprites) -> str:
    """Rows: tasks. Columns: the truth, and the prediction after some epochs, of the first sample."""
    known = [e for e in epochs(one.run.directory) if e <= one.epoch]
    if len(known) < 2:
        return ""
    chosen = [known[i] for i in sorted({round(x) for x in np.linspace(0, len(known) - 1, min(OVER, len(known)))})]
    found = [(e, sheet) for e in chosen if (sheet := _read(one.run.directory, e, []))]
    rows = []
    for task in dict.fromkeys(task for task, _ in one.sheet.columns if task):
        same = [(e, s) for e, s in found if s.tiles.shape == one.sheet.tiles.shape and _same(one.sheet, s, task)]
        tiles = np.stack(
            [s.column(task, k)[0] for k, s in [("truth", one.sheet), *(("prediction", s) for _, s in same)]]
        )
        if (name := sprites.add(tiles)) is None:
            return ""
        heads = ["truth", *(f"epoch {e}" for e, _ in same)]
        cells = "".join(_tile(name, i, len(tiles), f"{task}, {head}") for i, head in enumerate(heads))
        rows.append(f'<th scope="row">{escape(task)}</th>{cells}')
    heads = '<td></td><th scope="col">truth</th>' + "".join(f'<th scope="col">epoch {e}</th>' for e, _ in found)
    return _figure(f"{one.label}, seed {one.run.seed}.", "", heads, rows)


def _tile(name: str, index: int, count: int, label: str) -> str:
    position = 100 * index / max(1, count - 1)
    style = f' style="background-position:0 {position:.4g}%"' if index else ""
    return f'<td><div class="{name}" role="img" aria-label="{escape(label)}"{style}></div></td>'


def _figure(title: str, note: str, heads: str, rows: Sequence[str]) -> str:
    count = heads.count("<th") + heads.count("<td")
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f'<table class="pictures" style="--n:{count}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        f"</div><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption></figure>"
    )


def _notes(wrong: Sequence[str]) -> str:
    return f'<p class="note">Pictures left out: {escape(some(wrong))}.</p>' if wrong else ""
