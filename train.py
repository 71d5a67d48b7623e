"""One run: `python train.py arch=resnet56 loss=uncertainty`; a grid: `python train.py -m loss=dwa,pcgrad seed=0,1`."""

from mtl.config.environment import require

require()  # before Hydra: a Python without it gets one line instead of a traceback

from mtl.train import command, main  # noqa: E402, F401  bash completes a file in which it finds the word @hydra.main

if __name__ == "__main__":
    command()
