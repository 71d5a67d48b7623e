"""The trace of a golden run: numbers that are the same on every CPU. And the differences of two traces."""

from __future__ import annotations

import json
import math
from itertools import zip_longest
from pathlib import Path

import torch

# Relative tolerance of runs in float64 and in float32. For the projection of a tensor, it is relative to its norm.
RTOL, RTOL_SINGLE, ATOL = 1e-6, 1e-5, 1e-8

Trace = dict[str, dict[str, list[float]]]  # {"epochs": {column: [each epoch]}, "weights": {tensor: [norm, projection]}}


def read(directory: Path) -> Trace:
    """The trace of a finished run: all columns of metrics.jsonl except times, and a digest of each tensor of the model.

    Args:
        directory: the run's directory.
    """
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    columns = [key for key in rows[0] if key != "epoch" and not key.startswith("time/")]
    model = torch.load(directory / "last.pt", weights_only=True)["model"]
    return {
        "epochs": {key: [_short(row[key]) for row in rows] for key in columns},
        "weights": {name: _digest(tensor) for name, tensor in model.items()},
    }


def differences(old: Trace, new: Trace, rtol: float = RTOL) -> list[str]:
    """One line for each number that differs: the quantity, the epoch or tensor, the old and the new value."""
    columns, others = old["epochs"], new["epochs"]
    found = [
        f"{key}: only in the {'golden' if key in columns else 'new'} run" for key in columns.keys() ^ others.keys()
    ]
    pairs = {key: list(zip_longest(columns[key], others[key])) for key in columns if key in others}
    for i in range(max(map(len, pairs.values()), default=0)):  # the first epoch that differs comes first
        unequal = {key: values[i] for key, values in pairs.items() if not _close(*values[i], rtol)}
        found += [f"{key}, epoch {i + 1}: {a} -> {b}" for key, (a, b) in unequal.items()]
    # New names of tensors alone are no difference. Then the tensors are compared in the order of their digests.
    renamed = old["weights"].keys() != new["weights"].keys()
    tensors = (_ordered(trace["weights"], renamed) for trace in (old, new))
    for (name, (norm, product)), (_, digest) in zip_longest(*tensors, fillvalue=("a tensor more", (None, None))):
        if not (_close(norm, digest[0], rtol) and _close(product, digest[1], rtol, norm)):
            found.append(f"final {name}, norm and projection: {norm}, {product} -> {digest[0]}, {digest[1]}")
    return found


def dump(traces: dict[str, Trace]) -> str:
    """The traces as JSON, with one line for each column. So a diff shows which column has changed."""
    parts = []
    for case, trace in traces.items():
        lines = [
            f"  {json.dumps(kind)}: {{\n"
            + ",\n".join(f"   {json.dumps(key)}: {json.dumps(numbers)}" for key, numbers in trace[kind].items())
            + "\n  }"
            for kind in ("epochs", "weights")
        ]
        parts.append(f" {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _digest(tensor: torch.Tensor) -> list[float]:
    """The norm, and the product with a fixed vector. The product also changes if elements are exchanged or negated."""
    flat = tensor.double().contiguous().flatten()
    return [_short(flat.norm().item()), _short(flat.dot(torch.arange(len(flat), dtype=torch.double).cos()).item())]


def _short(number: float) -> float:
    return float(f"{number:.9g}")  # 9 digits: far below the tolerance, and short in the file


def _ordered(weights: dict[str, list[float]], renamed: bool) -> list[tuple[str, list[float]]]:
    return sorted(weights.items(), key=lambda item: item[1] if renamed else item[0])


def _close(old: float | None, new: float | None, rtol: float, scale: float = 0.0) -> bool:
    if old is None or new is None:
        return False
    return abs(old - new) <= ATOL + rtol * max(abs(old), scale) or (math.isnan(old) and math.isnan(new))
