"""The command `mtl-train`, and `python -m mtl.train`; in a checkout `python train.py` is the same.

From Python the module itself is called: `mtl.train("loss=pcgrad", seed=0)`, see `mtl.api.train`.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from omegaconf import DictConfig

from mtl.cli.command import say_start, script
from mtl.config.identity import CONF

if TYPE_CHECKING:
    from mtl.api import RunResult


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> float | None:
    """Run one composed config; see `mtl.cli.cell.run_from_hydra`."""
    say_start(config)  # before torch, which takes seconds
    from mtl.cli.cell import run_from_hydra  # late: help and shell completion must not import torch

    return run_from_hydra(config)


def command() -> NoReturn:
    """The command line, which ends this process."""
    if os.getcwd() not in sys.path:  # loss._target_=my_package.Mine; last, so that no file here hides an installed one
        sys.path.append(os.getcwd())
    script(main)


class _Called(ModuleType):
    """`import mtl.train` would put the module into the place of a function `mtl.train`; so the module can be called."""

    def __call__(self, *words: str, **options: Any) -> RunResult:
        from mtl.api import train  # late: it needs torch

        return train(*words, **options)


sys.modules[__name__].__class__ = _Called

if __name__ == "__main__":
    command()
