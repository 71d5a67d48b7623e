"""The classes and functions that a checkpoint may name: the user's own, and a short list of standard ones.

A checkpoint may come from anywhere. With this list, loading it cannot call arbitrary code, as a pickle could.
"""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import fractions
import functools
import itertools
import pathlib
import random
import sys
import types
import uuid
from collections.abc import Iterable
from typing import Any

import torch

from mtl.config.source import is_own

CLASSES = (array.array, bool, bytearray, bytes, collections.Counter, collections.OrderedDict, collections.defaultdict,
           collections.deque, complex, datetime.date, datetime.datetime, datetime.time, datetime.timedelta,
           datetime.timezone, decimal.Decimal, dict, float, fractions.Fraction, frozenset, int, itertools.count, list,
           object, pathlib.PosixPath, pathlib.WindowsPath, random.Random, range, set, slice, str, torch.Size, tuple,
           types.SimpleNamespace, uuid.UUID)  # fmt: skip
STANDARD = {f"{c.__module__}:{c.__qualname__}": c for c in CLASSES}
OF_TORCH = ("torch.nn.modules.", "torch.nn.functional", "torch.optim.")


class Names:
    """Finds classes and functions by the name `module:qualname`. It never imports a module.

    Args:
        classes: the user's classes. Names are searched in the files from which these classes were loaded, even if
            another module has taken the same name since.
    """

    def __init__(self, classes: Iterable[type]):
        self.globals: dict[str, dict[str, Any]] = {}  # the global names of the user's files, by module
        for cls in classes:
            functions = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
            inside = next((f.__globals__ for f in functions if f.__module__ == cls.__module__), None)
            self.globals.setdefault(cls.__module__, inside or vars(sys.modules[cls.__module__]))

    def find(self, name: str) -> Any:
        """The class or function with this name; None if it does not exist, or if a checkpoint may not name it."""
        if name in STANDARD:
            return STANDARD[name]
        module, _, qualname = name.partition(":")
        found: Any = self.globals.get(module)
        if found is None:
            file = getattr(sys.modules.get(module), "__file__", None)
            if not (file and is_own(file)) and not module.startswith(OF_TORCH):
                return None
            found = vars(sys.modules[module]) if module in sys.modules else {}
        first, *others = qualname.split(".")
        found = functools.reduce(lambda owner, part: getattr(owner, part, None), others, found.get(first))
        return found if getattr(found, "__module__", None) == module else None

    def knows(self, thing: Any) -> bool:
        """Whether `find` returns this class or function for its name."""
        return self.find(name_of(thing)) is thing


def name_of(thing: Any) -> str:
    """The name `module:qualname` of a class or function."""
    return f"{getattr(thing, '__module__', None)}:{getattr(thing, '__qualname__', None)}"


def is_users_class(cls: type) -> bool:
    """Whether a class is defined in a user's own file or in a notebook."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return cls.__module__ == "__main__" or bool(file and is_own(file))
