"""Shared fixtures. The command line runs in this process, because a subprocess would import torch for every test."""

import logging
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[1]
REAL_CIFAR100 = ROOT.parent / "shared" / "data"

sys.path.insert(0, str(ROOT))  # train.py is a script beside the package

needs_real_data = pytest.mark.skipif(
    not (REAL_CIFAR100 / "cifar-100-python" / "train").is_file(), reason="the real CIFAR-100 is not at hand"
)


@pytest.fixture(autouse=True)
def any_width(monkeypatch):
    """Output goes to files, which take lines of any width; pytest-xdist tells its workers of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """`cli("loss=dwa", "seed=0")` runs train.py in an empty folder, and returns .code, .out and .err."""
    import train
    from mtl.cli.command import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    log = logging.getLogger("mtl")

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        GlobalHydra.instance().clear()
        log.handlers, log.propagate = [], True  # the old handler writes to the last call's stdout
        capfd.readouterr()
        code = launch(train.main)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def smoke(cli, tmp_path):
    """Like `cli`, but with the smallest run: `smoke("loss=pcgrad")`."""

    def call(*arguments: str):
        return cli("experiment=smoke", "data.train_size=64", "data.test_size=32", "data.batch_size=32",
                   f"output_root={tmp_path / 'out'}", *arguments)  # fmt: skip

    return call


@pytest.fixture
def double(monkeypatch):
    """`double(learner)` makes a learner train in float64, including batches, losses and sums.

    In float32, two trainings cannot be compared closely. On one CPU, rounding moves an activation across ReLU's kink,
    and on another it does not. Then the gradients differ much.
    """
    import torch

    def call(learner):
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        learner.model.double(), learner.strategy.double()
        return learner

    return call
