"""One look per strategy, the same in all figures, and readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Okabe and Ito's colours without yellow, which is invisible on paper, and two of Paul Tol's. Any colour vision can
# distinguish them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
REFERENCE, REST = "#000000", "#C4C4C4"
DASHES = ("solid", "dash", "dashdot", "dot")
# The same on a dark screen, where the darkest would be lost; also the plots' ink, rules and paper.
DARK = {
    "#000000": "#f4f2ec", "#0072B2": "#4aa3df", "#882255": "#c94f8a", "#999933": "#b9b950", "#D55E00": "#e8731a",
    "#009E73": "#1bb388", "#C4C4C4": "#5d5952", "#1c1b19": "#e9e6df", "#6b675f": "#a39e93", "#e6e3db": "#35332f",
    "#ffffff": "#1b1a18",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")


@dataclass(frozen=True)
class Style:
    """How a strategy looks in every figure.

    Attributes:
        colour: "#rrggbb".
        dash: one of DASHES.
        marker: matplotlib's letter.
        prominent: drawn in colour and named; the others are grey context.
    """

    colour: str
    dash: str
    marker: str
    prominent: bool


def palette(labels: Sequence[str], reference: str | None = "equal") -> dict[str, Style]:
    """Looks in the order of importance: the reference is black, eight others have colours, the rest is grey."""
    found, free = {}, iter(range(len(COLOURS)))
    for label in labels:
        if label == reference:
            found[label] = Style(REFERENCE, "solid", "*", True)
        elif (i := next(free, None)) is not None:
            found[label] = Style(COLOURS[i], DASHES[i % len(DASHES)], MARKERS[i], True)
        else:
            found[label] = Style(REST, "solid", "o", False)
    return found


def colour_note(looks: Mapping[str, Style]) -> str:
    """Which strategies are in colour, where not all are; empty otherwise."""
    if all(look.prominent for look in looks.values()):
        return ""
    equal = any(look.colour == REFERENCE for look in looks.values())
    best = f"{len(COLOURS)} best{' others' if equal else ''} by mean rank over the metrics"
    return f"In colour: {'equal weighting (black) and ' if equal else ''}the {best}."
