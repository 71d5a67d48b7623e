"""Numbers of a certificate that compare a method's steps with what they should be: oracles and optimality conditions.

The oracles are the independent NumPy implementations in tests/oracles. They are no part of the installed package:
outside a checkout a certificate has none, and says so. tests/oracles/steps.py plays each of them step by step.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from functools import cache
from types import ModuleType

import numpy as np
import torch

from mtl.certify.optimality import CONDITIONS
from mtl.certify.problem import (
    ANCHOR,
    EPOCHS,
    RATE,
    TASKS,
    arguments,
    end_epoch,
    experienced,
    make,
    problem,
    scores,
    step,
)
from mtl.certify.properties import MEASURED, copies
from mtl.config.program import checkout
from mtl.losses import Strategy

STEPS, PER_EPOCH = 10, 2


@cache
def oracles() -> ModuleType | None:
    """tests/oracles/steps.py of the checkout, under a name of its own; None where there is no checkout."""
    root = checkout()
    package = root and root / "tests" / "oracles" / "__init__.py"
    if not package or not package.exists():
        return None
    spec = importlib.util.spec_from_file_location("mtl_oracles", package)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    return importlib.import_module("mtl_oracles.steps")


def oracle_error(name: str) -> float | None:
    """Largest relative error of the step over a history of several epochs, and no less than the oracle's own; None
    without an oracle."""
    steps = oracles()
    if steps is None or name not in steps.STEPS:
        return None
    strategy, peer = _unclipped(make(name)), steps.Peer(name, TASKS, arguments(name), ANCHOR.numpy(), RATE)
    peer.begin(0, EPOCHS, seed=0)
    errors = []
    for k in range(STEPS):
        tasks = problem(MEASURED + k, dimensions=4 if k % 3 == 2 else ANCHOR.numel())
        expected = peer.step({key: field.numpy() for key, field in vars(tasks).items()})
        update = step(strategy, tasks)
        for found, right in zip((update.shared, update.heads), expected, strict=False):
            right = torch.as_tensor(right)
            errors.append(float((found - right).norm() / right.norm()))
        if k % PER_EPOCH == PER_EPOCH - 1:
            epoch = k // PER_EPOCH
            end_epoch(strategy, tasks, epoch)
            peer.end(tasks.values.numpy(), scores(epoch).numpy())
            peer.begin(epoch + 1, EPOCHS, seed=0)
    return float(np.max([*errors, steps.PRECISION.get(name, 0.0)]))


def optimality(name: str) -> float | None:
    """Largest residual of the method's own optimality conditions over 40 problems; None if it solves none."""
    if name not in CONDITIONS:
        return None
    new, residuals = copies(name, experienced(name)), []
    for seed in range(40):
        strategy, kind = _unclipped(new()), ("", "short")[seed % 2]
        tasks = problem(MEASURED + seed, dimensions=4, kind=kind)
        weights = step(strategy, tasks).weights
        residuals.append(CONDITIONS[name](tasks.slopes.numpy(), weights.numpy(), strategy))
    return float(np.max(residuals))


def _unclipped(strategy: Strategy) -> Strategy:
    """The same without the clip of the gradient's norm, which is no part of the equations."""
    strategy.max_norm = None
    return strategy


def bound(error: float | None) -> str:
    """Up to the next power of ten, and no finer than 1e-9: what is printed must not depend on a machine's rounding."""
    if error is None:
        return "–"
    return f"below 1e{math.ceil(math.log10(max(error, 1e-9)))}" if error < np.inf else "no number"
