"""The heart: one method per file. Every Strategy class defined in this folder is exported here by its name."""

import importlib
import pkgutil

from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Statistics, Strategy

__all__ = ["GramianWeighting", "JacobianAggregation", "LossWeighting", "Statistics", "Strategy"]

# Found, not listed: adding a method touches its own file and its YAML, nothing else.
for _module in pkgutil.iter_modules(__path__):
    for _name, _object in vars(importlib.import_module(f"{__name__}.{_module.name}")).items():
        if isinstance(_object, type) and issubclass(_object, Strategy) and _object.__module__.endswith(f".{_module.name}"):
            globals()[_name] = _object
            if _name not in __all__:
                __all__.append(_name)
