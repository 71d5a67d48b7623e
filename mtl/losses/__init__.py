"""The heart: one method per file. Every Strategy class defined in this folder is exported here by its name."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Statistics, Strategy

__all__ = ["GramianWeighting", "JacobianAggregation", "LossWeighting", "Statistics", "Strategy"]

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Strategy]: ...  # what is found below


def _export(module) -> None:
    for name, item in vars(module).items():
        if isinstance(item, type) and issubclass(item, Strategy) and item.__module__ == module.__name__:
            globals()[name] = item
            __all__.append(name)


# Found, not listed: adding a method touches its own file and its YAML, nothing else.
for _file in pkgutil.iter_modules(__path__):
    if _file.name != "base":
        _export(importlib.import_module(f"{__name__}.{_file.name}"))
