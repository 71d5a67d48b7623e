"""Where the files of a data set lie: in data.root itself, or in a usual folder below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl.errors import SetupError


def candidates(root: str, subfolders: Sequence[str]) -> list[Path]:
    """The folders in which to look, `root` first."""
    given = Path(root).expanduser()
    return [given, *(given / name for name in subfolders)]


def not_found(name: str, root: str, wanted: str, folders: Sequence[Path], source: str = "") -> SetupError:
    """The error if no folder holds the data set.

    Args:
        name: of the data set.
        root: the option data.root.
        wanted: description of the folders or files that were looked for.
        folders: where they were looked for.
        source: where the field gets the data.
    """
    looked = ", ".join(str(folder.resolve()) for folder in folders)
    return SetupError(
        f"{name} is not in data.root={root}: looked for {wanted} in {looked}{source and f'; {source}'}. "
        "Set data.root (or the environment variable MTL_DATA) to the folder that holds it"
    )
