"""Shared helpers: the command line in-process (a subprocess would import torch anew for every test)."""

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


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """`cli("loss=dwa", "seed=0")` runs train.py in an empty folder; returns .code, .out, .err."""
    import train
    from mtl.cli.command import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started ignoring it
    log = logging.getLogger("mtl")

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        GlobalHydra.instance().clear()
        log.handlers, log.propagate = [], True  # the console's handler holds the stdout of the call before
        capfd.readouterr()
        code = launch(train.main)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def smoke(cli, tmp_path):
    """Like `cli`, with the smallest run there is: `smoke("loss=pcgrad")`."""

    def call(*arguments: str):
        return cli("experiment=smoke", "data.train_size=64", "data.test_size=32", "data.batch_size=32",
                   f"output_root={tmp_path / 'out'}", *arguments)  # fmt: skip

    return call


@pytest.fixture
def double(monkeypatch):
    """`double(learner)`: it trains in float64, its batches, losses and sums as well.

    Two trainings in float32 cannot be compared closely: rounding moves an activation over ReLU's kink on one CPU and
    not on another, and the gradient jumps.
    """
    import torch

    def call(learner):
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        learner.model.double(), learner.strategy.double()
        return learner

    return call
