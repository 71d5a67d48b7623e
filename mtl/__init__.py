"""Multi-task learning: loss and gradient balancing that can be trusted, compared and reproduced.

Two lines put any strategy into a foreign training loop::

    strategy = mtl.losses.PCGrad(tasks=3)
    mtl.backward(losses, strategy, shared=backbone.parameters(), heads=[h.parameters() for h in heads])

`mtl.Step` makes a whole update, and serves the methods that need more than these lines. `mtl.train` and `mtl.grid`
start runs as the command line does, and `mtl.load` brings a trained one back.
"""

import importlib
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m mtl.report` and the like: what Python says while it looks for the module
    from mtl.config.environment import require

    require()


def __getattr__(name: str):
    # Lazy, so that `python train.py --help` and shell completion never import torch.
    if name in ("backward", "Switches"):
        return getattr(importlib.import_module("mtl.engine.backward"), name)
    if name in ("Step", "Losses"):
        return getattr(importlib.import_module("mtl.engine.step"), name)
    if name == "load":
        return importlib.import_module("mtl.engine.loaded").load
    if name == "grid":
        return importlib.import_module("mtl.api").grid
    if name in ("losses", "train"):  # the module mtl.train can be called
        return importlib.import_module(f"mtl.{name}")
    raise AttributeError(f"module 'mtl' has no attribute {name!r}")
