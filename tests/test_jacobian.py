"""The methods that need the Jacobian, several batches or a state of its size, and the switches of `mtl.backward`,
against the oracles of `oracles/jacobian.py` and gradients worked out by hand."""

import copy
import io
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import jacobian as oracle
from torch import nn

import mtl
from mtl.engine import checkpoint
from mtl.engine.backward import Switches
from mtl.losses import (
    DBMTL,
    DWA,
    MGDA,
    NTKMTL,
    CAGrad,
    ConFIG,
    ConicGrad,
    Equal,
    ExcessMTL,
    GradDrop,
    JacobianAggregation,
    MoCo,
    MoDo,
    NashMTL,
    SDMGrad,
    Static,
)

SIZES, WIDTH, STEPS = (1, 2, 3, 11, 40), 7, 6
DEGENERATE = ("zero_row", "zeros", "identical", "opposite")


def ntkmtl(T, P, power):
    return lambda J, L: oracle.ntkmtl(J[0], power) @ J[0]


def graddrop(T, P, leak):
    return lambda J, L: oracle.graddrop(J[0], uniform((P,)).numpy(), leak)


def stepper(kind, reads):
    """Oracle classes with a state: step(*batches), or step(batch, losses)."""

    def make(T, P, **options):
        peer = kind(T, **options) if kind in (oracle.ModoOracle, oracle.SdmGradOracle) else None
        peer = peer or (kind(T, eta=options["eta"]) if kind is oracle.ExcessMtlOracle else kind(T, P, **options))
        if kind is oracle.ExcessMtlOracle:
            return lambda J, L: peer.step(J[0]) @ J[0]
        return (lambda J, L: peer.step(J[0], L)) if reads else (lambda J, L: peer.step(*J))

    return make


moco, db_mtl = stepper(oracle.MocoOracle, True), stepper(oracle.DbMtlOracle, True)
modo, sdmgrad = stepper(oracle.ModoOracle, False), stepper(oracle.SdmGradOracle, False)
excess_mtl = stepper(oracle.ExcessMtlOracle, False)
CASES = {  # name: the strategy, its arguments, the oracle and its arguments (the defaults are the papers' in both)
    "moco": (MoCo, {}, moco, dict(beta=0.5, sigma=0.5, gamma=0.1, rho=0.0, normalise=True)),
    "moco-plain": (MoCo, dict(normalise=False), moco, dict(normalise=False)),
    "moco-rho": (MoCo, a := dict(beta=0.2, gamma=0.7, sigma=0.0, rho=0.4, normalise=False), moco, a),
    "modo": (MoDo, {}, modo, dict(gamma=0.1, rho=0.1)),
    "modo-small": (MoDo, dict(lr=1e-3, rho=0.0), modo, dict(gamma=1e-3, rho=0.0)),
    "sdmgrad": (SDMGrad, {}, sdmgrad, dict(lam=0.3, lr=10.0, momentum=0.5, steps=20)),
    "sdmgrad-short": (SDMGrad, dict(regularisation=0.0, lr=0.3, momentum=0.0, steps=1), sdmgrad,
                      dict(lam=0.0, lr=0.3, momentum=0.0, steps=1)),
    "config": (ConFIG, {}, lambda T, P: lambda J, L: oracle.config(J[0]), {}),
    "db_mtl": (DBMTL, {}, db_mtl, dict(beta=0.9, sigma=0.0)),
    "db_mtl-decay": (DBMTL, a := dict(beta=0.4, sigma=0.5), db_mtl, a),
    "excess_mtl": (ExcessMTL, {}, excess_mtl, dict(eta=0.01)),
    "excess_mtl-fast": (ExcessMTL, a := dict(eta=1.0), excess_mtl, a),
    "ntkmtl": (NTKMTL, {}, ntkmtl, dict(power=0.5)),
    "ntkmtl-nyu": (NTKMTL, a := dict(power=0.75), ntkmtl, a),
    "graddrop": (GradDrop, {}, graddrop, dict(leak=0.0)),
    "graddrop-leak": (GradDrop, a := dict(leak=0.3), graddrop, a),
}  # fmt: skip
STATES = {"moco": ("trackers", "mixture"), "modo": ("mixture",), "sdmgrad": ("mixture",), "db_mtl": ("average",),
          "excess_mtl": ("squares", "task_weights", "initial")}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def tensor(array) -> torch.Tensor:
    return torch.as_tensor(np.array(array), dtype=torch.float64)


def uniform(shape, **_):
    return torch.linspace(0.03, 0.96, int(np.prod(shape)), dtype=torch.float64).reshape(shape)


@pytest.fixture(autouse=True)
def draws(monkeypatch):
    """GradDrop's uniform draw, for strategy and oracle alike."""
    torch.set_num_threads(1)
    rand = torch.rand
    patched = lambda *size, **k: uniform(*size) if k.get("generator") is not None else rand(*size, **k)  # noqa: E731
    monkeypatch.setattr("mtl.losses.graddrop.torch.rand", patched)


def assert_close(actual, expected, tol: float = 1e-9, scale: float | None = None) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol * scale)


def data(T: int, samples: int, seed: int = 0, steps: int = STEPS):
    """Steps of (the batches' Jacobians, losses); correlated batches, as those of one network are."""
    rng = np.random.default_rng([T, seed])
    centre, length = rng.normal(size=(T, WIDTH)), 10.0 ** rng.uniform(-1, 0.5, (T, 1))
    for _ in range(steps):
        yield [length * (centre + 0.5 * rng.normal(size=(T, WIDTH))) for _ in range(samples)], rng.uniform(0.1, 3, T)


def degenerate(kind: str, T: int, samples: int):
    for J, losses in data(T, samples):
        for part in J:
            part[:] = {
                "zero_row": part * (np.arange(T) != T // 2)[:, None],
                "zeros": 0 * part,
                "identical": part[:1] + 0 * part,
                "opposite": part[:1] * (-1.0) ** np.arange(T)[:, None],
            }[kind]
        yield J, losses


def direction(strategy, J, losses, present=None):
    """(d, weights) of a step as `mtl.backward` puts it together (see `test_samples` for that)."""
    J, losses = [tensor(part) for part in J], tensor(losses)
    if isinstance(strategy, JacobianAggregation):
        result = strategy.aggregate(J[0], present, losses)
        return result if isinstance(result, tuple) else (result, None)
    weights = strategy.weights(J[0] @ J[min(1, len(J) - 1)].T, present, losses)
    return (J[-1] if len(J) != 2 else (J[0] + J[1]) / 2).T @ weights, weights


def build(case: str, T: int):
    kind, options, _, _ = CASES[case]
    return kind(T, **options)


# ------------------------------------------------------------------------------------------------ oracle agreement


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize("T", SIZES)
@every_case
def test_directions_follow_the_paper(case, T, scale):
    """Step by step, state included; the weights returned are those of the direction."""
    strategy, (_, _, make, options) = build(case, T), CASES[case]
    step = make(T, WIDTH, **options)
    for J, losses in data(T, strategy.samples):
        J = [scale * part for part in J]
        d, weights = direction(strategy, J, losses)
        assert_close(d, step(J, losses), 1e-9)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("T", [2, 3, 11])
@every_case
def test_degenerate_gradients(case, T, kind):
    """Finite directions, weights and states; those of the oracle where the answer is not a matter of rounding."""
    strategy, (_, _, make, options) = build(case, T), CASES[case]
    step = make(T, WIDTH, **options)
    for J, losses in degenerate(kind, T, strategy.samples):
        d, weights = direction(strategy, J, losses)
        assert d.isfinite().all() and (weights is None or weights.isfinite().all())
        if (case, kind) == ("config", "opposite"):  # no direction serves all
            assert d.norm() <= np.linalg.norm(J[0].sum(axis=0)) * (1 + 1e-9)
        elif not (kind in ("zero_row", "zeros") and case.startswith(("ntkmtl", "excess_mtl"))):
            assert_close(d, step(J, losses), 1e-7, scale=max(np.abs(J).max(), 1e-300))
    assert all(b.isfinite().all() for name, b in strategy.named_buffers() if name != "initial")


@pytest.mark.parametrize("T", [2, 3, 11, 40])
@every_case
def test_permuted_tasks(case, T):
    ours, theirs, order = build(case, T), build(case, T), np.random.default_rng(T).permutation(T)
    for J, losses in data(T, ours.samples):
        d, weights = direction(ours, J, losses)
        e, permuted = direction(theirs, [part[order] for part in J], losses[order])
        assert_close(d, e, 1e-7)
        if weights is not None:
            assert_close(weights[order], permuted, 1e-7)
