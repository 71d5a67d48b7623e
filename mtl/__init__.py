"""Multi-task learning: loss and gradient balancing that can be trusted, compared and reproduced.

Two lines put any strategy into a foreign training loop::

    strategy = mtl.losses.PCGrad(tasks=3)
    mtl.backward(losses, strategy, shared=backbone.parameters(), heads=[h.parameters() for h in heads])

`mtl.Step` makes a whole update, and serves the methods that need more than these lines.
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
    if name == "losses":
        return importlib.import_module("mtl.losses")
    raise AttributeError(f"module 'mtl' has no attribute {name!r}")
