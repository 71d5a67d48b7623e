"""Resumes a run from its checkpoint and its rows, after a check that both belong to this run and to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mtl.engine import checkpoint
from mtl.engine.directory import RunDirectory
from mtl.engine.files import START, digest, writing
from mtl.engine.learner import Learner
from mtl.engine.summary import Row, Selection, best
from mtl.errors import SetupError, one_line


def state(epoch: int, name: str, rows: bytes, learner: Learner) -> dict[str, Any]:
    """The content of a checkpoint.

    Args:
        epoch: number of finished epochs.
        name: the run's name.
        rows: digest of its rows (`mtl.engine.files.digest`).
        learner: model, optimizer and method.
    """
    # Name and digest are stored as tensors, because tests and tools compare checkpoints tensor by tensor.
    return {"epoch": epoch, "run": _tensor(name.encode()), "rows": _tensor(rows), **learner.state()}


def resume(directory: RunDirectory, name: str, learner: Learner) -> tuple[list[dict[str, float]], bytes]:
    """Load the last checkpoint into `learner`, if there is one. No file is written.

    Args:
        directory: the run's directory.
        name: the run's name.
        learner: a new learner of the run's config.

    Returns:
        the rows up to the checkpoint, and their digest; no rows if there is no checkpoint.

    Raises:
        SetupError: a file is damaged, belongs to another run, or does not agree with the others.
    """
    last, rows = directory.last, directory.rows()
    if not os.path.lexists(last):
        return [], START
    afresh = "delete it to start the run afresh"
    saved = opened(last, name, afresh)
    epoch = saved["epoch"]
    if len(rows) < epoch:
        raise SetupError(
            f"{directory.metrics} lacks rows that last.pt (after epoch {epoch}) has seen; "
            "restore it, or delete last.pt to start the run afresh"
        )
    rows = rows[: max(0, epoch)]  # a later row was written just before a kill, and its checkpoint was not
    # Checkpoints of older versions have neither name nor digest. They are accepted unchecked.
    if epoch < 1 or _bytes(saved, "rows") not in (None, digest(rows)):
        raise SetupError(
            f"{directory.metrics} does not hold the {epoch} rows that last.pt has seen: one of the two was edited, "
            "or is of another run; restore it, or delete last.pt to start the run afresh"
        )
    try:
        learner.load_state(saved)
    except Exception as error:  # torch, an optimizer and a method raise different errors for a wrong state
        text = one_line(error)
        text = text if len(text) <= 160 else f"{text[:160]}…"
        raise SetupError(f"{last} does not fit this run ({text}); {afresh}") from error
    return rows, digest(rows)


def opened(path: Path, name: str, cure: str) -> dict[str, Any]:
    """A run's checkpoint, after a look at whether it is one, and this run's.

    Args:
        path: of the file.
        name: of the run.
        cure: what to do about a wrong file, for the message.

    Raises:
        SetupError: it is not.
    """
    saved = checkpoint.load(path)
    for key, kind in {"epoch": int, "model": dict, "optimizer": dict, "strategy": dict}.items():
        if not isinstance(saved.get(key), kind):
            raise SetupError(f"{path} is no checkpoint of this project: no {key} in it; {cure}")
    if (owner := _bytes(saved, "run")) not in (None, name.encode()):
        raise SetupError(f"{path} is the checkpoint of another run, {owner.decode(errors='replace')}; {cure}")
    return saved


def mend_best(directory: RunDirectory, name: str, rows: Sequence[Row], chosen: Selection) -> str:
    """Repair best.pt if it is not the checkpoint of the best epoch.

    If last.pt is the best epoch's checkpoint, best.pt becomes a link to it. Otherwise the best weights are lost, and
    the wrong file is renamed to best.damaged.

    Args:
        directory: the run's directory, locked by this process.
        name: the run's name.
        rows: all rows.
        chosen: what chooses the best epoch.

    Returns:
        what is wrong with best.pt, for a warning; an empty string if it is right now.
    """
    epoch = best(rows, chosen)["epoch"]
    if not (problem := problem_of(directory.best, name, epoch)):
        return ""
    if _epoch(directory.last, name) == epoch:
        checkpoint.link(directory.last, directory.best)
        return ""
    if os.path.lexists(directory.best):
        with writing(directory.best):
            os.replace(directory.best, directory.best.with_suffix(".damaged"))
        problem += " (now best.damaged)"
    return f"{problem}; the weights of epoch {epoch}, the best, are lost"


def problem_of(path: Path, name: str, epoch: int) -> str:
    """What is wrong with a file that should be the run's checkpoint of `epoch`; an empty string if nothing is."""
    if not os.path.lexists(path):
        return f"{path.name} is missing"
    found = _epoch(path, name)
    if found is None:
        return f"{path.name} is damaged or of another run"
    return "" if found == epoch else f"{path.name} holds epoch {found}"


def _epoch(path: Path, name: str) -> int | None:
    """The epoch of a checkpoint; None if it cannot be read or belongs to another run."""
    try:
        saved = checkpoint.load(path)
    except SetupError:
        return None
    return saved.get("epoch") if _bytes(saved, "run") in (None, name.encode()) else None


def _tensor(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def _bytes(saved: dict[str, Any], key: str) -> bytes | None:
    value = saved.get(key)
    return bytes(value.tolist()) if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 else None
