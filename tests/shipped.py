"""What this repository ships. A user's own files beside it, which git does not track, are theirs and not tested."""

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def tracked(root: Path = ROOT) -> frozenset[Path] | None:
    """The files that git tracks or that are staged; None where there is no git, or the folder is not in it."""
    command = ["git", "-C", str(root), "ls-files", "-z", "conf", "docs", "mtl", "sweeps"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return None
    return frozenset(root / name for name in listed.split("\0") if name) or None


def files(pattern: str, root: Path = ROOT) -> list[Path]:
    """The shipped files that match, sorted; `files("conf/*/*.yaml")`. All that match where git cannot tell."""
    known = tracked(root)
    return sorted(file for file in root.glob(pattern) if known is None or file in known)


def options(group: str) -> list[str]:
    """The names of a config group's shipped options, sorted: `options("loss")`."""
    return [file.stem for file in files(f"conf/{group}/*.yaml")]
