"""One run: `python train.py arch=resnet56 loss=uncertainty`; a grid: `python train.py -m loss=dwa,pcgrad seed=0,1`."""

import hydra

from mtl.config.cli import CONF, script


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config) -> float | None:
    from mtl.study.cell import run_from_hydra  # late: help and shell completion must not import torch

    return run_from_hydra(config)


if __name__ == "__main__":
    script(main)
