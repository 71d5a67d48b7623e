"""The words that start a run: `python train.py` in a checkout, `mtl-train` if mtl was installed by pip."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mtl.config import torchrun
from mtl.config.identity import CONF

COMMAND, MODULE, SCRIPT = "mtl-train", "mtl.train", "train.py"


def checkout() -> Path | None:
    """The root folder of the repository that holds this code; None for an installed wheel."""
    return CONF.parent if (CONF.parent / "pyproject.toml").is_file() else None


def program() -> list[str]:
    """The words before the options in a command that starts a run like this one, from the current folder.

    Usually they are the words that started this process. But this process may be no run: a report, or a Slurm job. Then
    the words name train.py if it is in the current folder, otherwise `mtl-train`.
    """
    words, started = torchrun.command(), Path(sys.argv[0])
    if started.resolve() == Path(__file__).parents[1] / SCRIPT:
        return [*words, "-m", MODULE]
    if started.name == SCRIPT:
        return [*words, sys.argv[0]]  # as typed: train.py, or ../mtl/train.py
    if started.name != COMMAND and _here():
        return [*words, SCRIPT]
    return [*words, "-m", MODULE] if torchrun.size() > 1 else [COMMAND]


def child() -> list[str]:
    """The words that start a run as a child process, with the Python of this process."""
    root = checkout()
    script = ["-m", MODULE] if root is None else [SCRIPT if _here() else str(root / SCRIPT)]
    return [sys.executable, *script]


def _here() -> bool:
    return Path.cwd() == checkout()


def divide(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command from `program` into the words that start one process, and the options.

    Example: `torchrun --nproc-per-node=2 train.py loss=dwa` gives `python train.py` and `loss=dwa`.
    """
    for i, word in enumerate(command):
        if Path(word).name in (COMMAND, MODULE, SCRIPT):
            start = ["-m", word] if word == MODULE else [word]
            return ([word] if word == COMMAND else ["python", *start]), list(command[i + 1 :])
    return ["python", SCRIPT], list(command)
