"""The two errors on a certificate: the difference from the oracle, and the residual of the optimality conditions.

The oracles are independent NumPy implementations in tests/oracles. The installed package does not contain them. Outside
a checkout the certificate says that this error was not measured. tests/oracles/steps.py runs each oracle step by step.
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
    Source,
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
LARGEST = 1e-5  # an error or residual below this is rounding; above it the certificate fails


@cache
def oracles() -> ModuleType | None:
    """The module tests/oracles/steps.py of the checkout; None if there is no checkout."""
    root = checkout()
    package = root and root / "tests" / "oracles" / "__init__.py"
    if not package or not package.exists():
        return None
    # Loaded under a name of its own: the package must not depend on a folder "tests" that is on sys.path.
    spec = importlib.util.spec_from_file_location("mtl_oracles", package)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    return importlib.import_module("mtl_oracles.steps")


def oracle_error(name: str) -> float | None:
    """Largest relative error of the step over several epochs; None if the method has no oracle.

    Some oracles are themselves inexact, such as an iterative one. The result is then at least the oracle's own error.
    """
    steps = oracles()
    if steps is None or name not in steps.STEPS:
        return None
    # Both start from the same arguments, seed and features, and then see the same problems.
    strategy, peer = _unclipped(make(name)), steps.Peer(name, TASKS, arguments(name), ANCHOR.numpy(), RATE)
    peer.begin(0, EPOCHS, seed=0)
    errors = []
    for k in range(STEPS):
        # In every third step the gradients span four dimensions only, so that conflicts are frequent.
        tasks = problem(MEASURED + k, dimensions=4 if k % 3 == 2 else ANCHOR.numel())
        expected = peer.step({key: field.numpy() for key, field in vars(tasks).items()})
        update = step(strategy, tasks)
        # Some oracles give the shared gradient only; `strict=False` then skips the heads.
        for found, right in zip((update.shared, update.heads), expected, strict=False):
            right = torch.as_tensor(right)
            errors.append(float((found - right).norm() / right.norm()))
        if k % PER_EPOCH == PER_EPOCH - 1:
            epoch = k // PER_EPOCH
            end_epoch(strategy, tasks, epoch)
            peer.end(tasks.values.numpy(), scores(epoch).numpy())
            peer.begin(epoch + 1, EPOCHS, seed=0)
    return float(np.max([*errors, steps.PRECISION.get(name, 0.0)]))


def optimality(name: str, source: Source = problem) -> float | None:
    """Largest residual of the method's optimality conditions over 40 problems; None if it solves no problem."""
    if name not in CONDITIONS:
        return None
    new, residuals = copies(name, experienced(name, source=source)), []
    for seed in range(40):
        strategy, kind = _unclipped(new()), ("", "short")[seed % 2]
        tasks = source(MEASURED + seed, dimensions=4, kind=kind)
        weights = step(strategy, tasks).weights
        residuals.append(CONDITIONS[name](tasks.slopes.numpy(), weights.numpy(), strategy))
    return float(np.max(residuals))


def _unclipped(strategy: Strategy) -> Strategy:
    """The strategy without its clip of the gradient's norm, because the equations do not contain the clip."""
    strategy.max_norm = None
    return strategy


def bound(error: float | None) -> str:
    """`error` rounded up to a power of ten, such as "below 1e-9"; never finer than that.

    A page must not depend on the rounding of the machine that wrote it.
    """
    if error is None:
        return "–"
    return f"below 1e{math.ceil(math.log10(max(error, 1e-9)))}" if error < np.inf else "no number"
