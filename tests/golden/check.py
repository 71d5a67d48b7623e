"""Compares golden runs with their committed traces.

With GOLDEN=write in the environment, traces are written anew; with GOLDEN=missing, only the missing ones are.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from golden.cases import FAMILIES, FOLDER, SINGLE
from golden.trace import RTOL, RTOL_SINGLE, Trace, differences, dump, read

SHOWN = 20  # differences in a message


def check(family: str, case: str, cli, tmp_path, monkeypatch) -> None:
    """Train a case through the command line, and compare it with its trace.

    Training is in float64. Rounding differs between CPUs, but in float64 it stays far below the tolerance.

    Args:
        family, case: keys of `FAMILIES`.
        cli, tmp_path, monkeypatch: the test's fixtures.
    """
    known = load(family)
    if os.environ.get("GOLDEN") == "missing" and case in known:
        pytest.skip("has a trace; GOLDEN=write makes it anew")
    monkeypatch.setattr(os, "fsync", lambda file: None)  # once per epoch, it would wait for a busy disk
    single, before = (family, case) in SINGLE, torch.get_default_dtype()
    if not single:
        # The learner converts predictions with `.float()`, which would otherwise round to float32 in every step.
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
    try:
        result = cli(*FAMILIES[family][case], f"output_root={tmp_path / 'out'}")
    finally:
        torch.set_default_dtype(before)
    assert result.code == 0, result.err
    (file,) = (tmp_path / "out").rglob("metrics.jsonl")
    new = read(file.parent)
    if os.environ.get("GOLDEN"):
        _write(family, {**known, case: new})
        return
    again = f"if that is meant: GOLDEN=write python -m pytest tests/test_golden*.py -k '{family} and {case}'"
    assert case in known, f"no trace of {family}/{case}; run: make lists"
    found = differences(known[case], new, RTOL_SINGLE if single else RTOL)
    more = f"\n… and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    assert not found, (
        f"{family}/{case} trains differently (golden -> new):\n" + "\n".join(found[:SHOWN]) + more + (f"\n{again}")
    )


def load(family: str) -> dict[str, Trace]:
    """The committed traces of a family."""
    path = FOLDER / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def tidy(family: str) -> None:
    """Remove the traces of cases that no longer exist."""
    _write(family, load(family))


def _write(family: str, traces: dict[str, Trace]) -> None:
    text = dump({name: traces[name] for name in sorted(FAMILIES[family]) if name in traces})
    (FOLDER / f"{family}.json").write_text(text)
