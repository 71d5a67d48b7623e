"""The command lines of runs, and other commands made from them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence

from mtl.config.program import divide

_WITH_VALUE = (
    "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--experimental-rerun",
)  # fmt: skip
_REPLACED = r"(loss|step|study|seed)[=.@]"  # the step's switches say how a loss combines gradients


def single_task_command(command: str, tasks: Sequence[str], seeds: Sequence[int]) -> str:
    """`command` with each task alone instead of its loss; its flags and all other overrides stay as they are.

    Args:
        command: of a run, such as "python train.py --config-dir mine loss=custom loss.file=x.py seed=0".
        tasks: names.
        seeds: of the new runs.
    """
    start, words = divide(shlex.split(command))
    flags, overrides, rest = [], [], iter(words)
    for word in rest:
        if word in ("-m", "--multirun"):
            continue
        if word.startswith("-"):  # Hydra loses overrides that stand before a flag, so flags go first
            flags += [word, *(itertools.islice(rest, 1) if word in _WITH_VALUE else ())]
        elif not re.match(_REPLACED, f"{word.lstrip('+~')}="):
            overrides.append(word)
    alone = ["-m", "loss=single", f"loss.task={','.join(map(_quoted, tasks))}"]
    return shlex.join([*start, *flags, *alone, *overrides, f"seed={','.join(map(str, seeds))}"])


def _quoted(name: str) -> str:
    """For Hydra, to which a comma separates values and a space ends one."""
    return name if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else "'" + name.replace("'", r"\'") + "'"
