r"""Text from runs, made safe for what a report writes: terminal, file names, Markdown, LaTeX, spreadsheets.

A run's files may hold any text: a task named in Chinese, an error message with terminal escapes, a label "=1+1".
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

LONGEST = 100  # characters of a file name, without its suffix: file systems allow 255 bytes

_LATEX = {
    **{c: rf"\{c}" for c in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "]": "{]}",
    "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$",
    "Σ": r"$\Sigma$", "²": r"$^2$", "…": r"\ldots{}", "→": r"$\rightarrow$", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}", "Ø": r"\O{}", "œ": r"\oe{}", "Œ": r"\OE{}",
    "†": r"$\dagger$", "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}",
}  # fmt: skip
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip


def visible(text: str) -> str:
    r"""Characters that a reader cannot see, as escapes: "\x1b" (terminal), "\u202e" (reading direction), "\n"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def slug(text: str) -> str:
    """A file name for `text`. A digest keeps apart what was shortened, or what had no letter or digit."""
    name = re.sub(r"[^\w.]+", "-", text.replace(",", "")).strip("-.")
    if name and len(name.encode()) <= LONGEST:
        return name
    cut = name.encode()[: LONGEST - 9].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()[:8]}".strip("-")


def minus(text: str) -> str:
    """Negative numbers with a minus sign, names with their hyphens."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def markdown(text: str) -> str:
    """Text without markup, for GitHub's Markdown."""
    return re.sub(r"([|*_`<\[\]\\&~])", r"\\\1", text)


def latex(text: str) -> str:
    """Plain ASCII that every engine typesets. Letters that pdflatex's fonts lack are spelled "U+6F22"."""
    return "".join(map(_latex, minus(text)))


def _latex(character: str) -> str:
    if (known := _LATEX.get(character)) is not None:
        return known
    if character.isascii():
        return character
    letter, *marks = unicodedata.normalize("NFD", character)
    if len(marks) == 1 and marks[0] in _ACCENTS and letter.isascii():
        return rf"\{_ACCENTS[marks[0]]}{{{letter}}}"
    return f"U+{ord(character):04X}"


def spreadsheet(text: str) -> str:
    """A text that Excel and similar programs do not run as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
