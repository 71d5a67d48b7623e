"""The heart: one method per file. Every Strategy class defined in this folder is exported here by its name."""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from mtl.losses.base import GramianWeighting, JacobianAggregation, LossWeighting, Statistics, Strategy

__all__ = ["GramianWeighting", "JacobianAggregation", "LossWeighting", "Statistics", "Strategy"]

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Strategy]: ...  # for type checkers: the classes exported below


def _export(module) -> None:
    """Export the strategies that `module` defines itself; those that it imports belong to another file."""
    for name, item in vars(module).items():
        if isinstance(item, type) and issubclass(item, Strategy) and item.__module__ == module.__name__:
            globals()[name] = item
            __all__.append(name)


# The files are found, not listed, so that a new method touches nothing but its own file and its YAML.
for _file in pkgutil.iter_modules(__path__):
    if _file.name != "base":
        _export(importlib.import_module(f"{__name__}.{_file.name}"))
