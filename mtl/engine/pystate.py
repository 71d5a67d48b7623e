"""Saves the Python attributes of a user's own modules in the checkpoint, so that any loss or network can be resumed.

A user's loss may count steps in an attribute, keep a list of past losses, use its own random generator, or create a
buffer in the first batch. A `state_dict` contains none of this. It is saved as tensors, which
`torch.load(weights_only=True)` can read. If two attributes are the same object, they still are after loading. If
something cannot be saved, an error names it.

1. `_node` turns each object into a node: a number or text itself, or a list [kind, …].
2. Objects that the constructor creates again (functions, modules, parameters) are saved as their place, such as
   "loss.log", and not as their content.
3. `mtl.engine.pack` packs the nodes into tensors; `mtl.engine.pydecode` turns nodes back into objects.
"""

from __future__ import annotations

import copyreg
import functools
import io
import itertools
import logging
import pickle
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mtl.config.source import is_own
from mtl.engine.names import STANDARD, Names, is_users_class, name_of
from mtl.engine.pack import pack, unpack
from mtl.engine.pydecode import BIT_GENERATORS, CONTAINERS, KEPT, SKIPPED, Decoder, filled

ATOMS = (type(None), bool, int, float, str, bytes)
# Constructors create these again. They have no state of their own, except functions: see `_inside`.
CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, functools.partial, logging.Logger,
        re.Pattern, np.ufunc, torch.dtype, torch.device, torch.layout, torch.memory_format)  # fmt: skip
MOVING = (Iterator, io.IOBase)  # they change with every use, so they cannot be taken for constants


class Unsavable(Exception):
    """An object cannot be saved, although the rest of the run may depend on it. The message names it.

    Args:
        place: where the object is, such as `loss.log`.
        value: the object.
        why: the reason, in a few words.
    """

    def __init__(self, place: str, value: Any, why: str = ""):
        super().__init__(f"{place} is a {type(value).__name__}, which cannot be saved{f' ({why})' if why else ''}")
        self.moving = isinstance(value, MOVING)


class PythonState:
    """Saves and restores the Python attributes of a loss and a model.

    Args:
        loss, model: in the state in which their constructors have left them, on their device. Only attributes of the
            user's own classes are saved, and objects that were added later.
        device: receives the tensors that were on a GPU when they were saved.
    """

    def __init__(self, loss: nn.Module, model: nn.Module, device: torch.device):
        self.device = device
        roots = {"loss": loss, "arch": model}
        self._roots = {n: r for n, r in roots.items() if any(is_users_class(type(m)) for m in r.modules())}
        modules = [m for root in self._roots.values() for m in root.modules()]
        self._classes = list(dict.fromkeys(c for m in modules for c in type(m).__mro__ if is_users_class(c)))
        self._names = Names(self._classes)
        self._objects: dict[str, Any] = {}  # the objects that the constructors made, by place
        self._places: dict[int, str] = {}  # their places, by id
        self._fresh: dict[str, bytes] = {}  # the user's global variables before training
        # The first encoding is thrown away. It only records which objects the constructors have made.
        self._recording = True
        self._encode()
        self._recording = False

    def save(self) -> dict[str, Any]:
        """The state as tensors; an empty dict if no class is the user's own.

        Raises:
            Unsavable: an object cannot be saved.
        """
        try:
            tree = self._encode()
            return pack(tree) if tree else {}
        except RecursionError as error:
            raise Unsavable("loss", self._roots.get("loss"), "nested too deeply") from error

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Set newly built modules to a saved state. The values of parameters are not included.

        Raises:
            ValueError: the classes have changed since the state was saved.
        """
        decoder, saved = Decoder(self._objects, self._names, self.device), unpack(saved)
        for node in saved["roots"].values():
            decoder.value(node)
        for place, node in saved["globals"].items():
            owner, _, name = place.rpartition(".")
            module, _, qualname = owner.partition(":")
            if qualname:
                setattr(self._names.find(owner), name, decoder.value(node))
            else:
                self._names.globals[module][name] = decoder.value(node)

    # -- from objects to nodes ----------------------------------------------------------------------------------------

    def _encode(self) -> dict[str, Any]:
        self._memo: dict[int, tuple[list, Any]] = {}
        nodes = {}
        for name, root in self._roots.items():
            # Strict for the loss only. Networks contain many constants of unusual types. An object in a network that
            # cannot be saved is taken for such a constant.
            self._strict = name == "loss" and not self._recording
            nodes[name] = self._node(root, name)
        self._strict = False
        result = {"roots": nodes, "globals": self._globals()} if nodes else {}
        self._memo = {}
        return result

    def _node(self, value: Any, place: str) -> Any:
        """The node of an object: a number or text itself; otherwise a list [kind, …]."""
        if type(value) in ATOMS:
            return value
        if (known := self._memo.get(id(value))) is not None:
            return known[0]
        if self._recording and _is_made_again(value) and id(value) not in self._places:
            self._objects[place], self._places[id(value)] = value, place
        node: list = []
        # Noted before its content, which may contain it. `value` is kept alive, so that its id is not used again.
        self._memo[id(value)] = (node, value)
        node.extend(self._content(value, place))
        return node

    def _content(self, value: Any, place: str) -> list:
        kind = type(value)
        if (origin := self._places.get(id(value))) is not None:
            return ["original", origin, self._inside(value, origin)]
        if value is torch.default_generator:
            return ["default generator"]
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if kind in (set, frozenset):  # equal sets may be in different orders
            value = sorted(value, key=repr)
        if kind in (list, tuple, set, frozenset):
            return [kind.__name__, *(self._node(v, f"{place}[{i}]") for i, v in enumerate(value))]
        if kind is dict:
            return ["dict", *itertools.chain.from_iterable(
                (self._node(k, f"{place} key {i}"), self._node(v, f"{place}[{k!r:.40}]"))
                for i, (k, v) in enumerate(value.items()))]  # fmt: skip
        if isinstance(value, np.generic | np.ndarray):
            return self._array(value, place)
        if kind is torch.Generator:
            return ["generator", value.device.type, value.get_state()]
        if kind is np.random.RandomState:
            return ["random state", self._node(value.get_state(), place)]
        if kind is np.random.Generator and (name := type(value.bit_generator).__name__) in BIT_GENERATORS:
            return ["numpy generator", name, self._node(value.bit_generator.state, place)]
        if kind is types.MethodType:
            return ["method", self._node(value.__self__, place), value.__name__]
        if kind in (torch.dtype, torch.device):
            return [kind.__name__, str(value).removeprefix("torch.")]
        if isinstance(value, type | types.FunctionType) and self._names.knows(value):
            return ["global", name_of(value)]
        return self._object(value, place)

    def _tensor(self, value: Tensor, place: str) -> list:
        if type(value) not in (Tensor, nn.Parameter):
            raise Unsavable(place, value)
        leaf = value.is_leaf and value.requires_grad
        grad = self._node(value.grad, f"{place}.grad") if leaf else None
        return ["tensor", value.detach(), value.device.type, leaf, type(value) is nn.Parameter, grad]

    def _array(self, value: np.ndarray | np.generic, place: str) -> list:
        if type(value) is not np.ndarray and not isinstance(value, np.generic):
            raise Unsavable(place, value)
        if value.dtype.hasobject or value.dtype.fields:
            raise Unsavable(place, value, f"of dtype {value.dtype}")
        shape = list(value.shape) if isinstance(value, np.ndarray) else None
        return ["array", value.dtype.str, shape, value.tobytes()]

    def _object(self, value: Any, place: str) -> list:
        """The node of an object, by pickle's protocol, if its class may be restored.

        `__reduce_ex__` gives a constructor with its arguments, and a state to set afterwards. Nothing is pickled.
        """
        if isinstance(value, CODE):
            raise Unsavable(place, value, "made during training")
        try:
            function, arguments, *rest = value.__reduce_ex__(2)
        except Exception as error:
            raise Unsavable(place, value) from error
        state, items, pairs, *_ = (*rest, None, None, None)
        new = function is copyreg.__newobj__
        cls, arguments = (arguments[0], arguments[1:]) if new else (function, arguments)
        if not isinstance(cls, type) or not self._names.knows(cls):
            raise Unsavable(place, value)
        if not new and name_of(cls) not in STANDARD and not is_users_class(cls):
            raise Unsavable(place, value)
        return ["object", new, name_of(cls), self._node(tuple(arguments), place), self._node(state, place),
                self._node(list(items or ()), place), self._node(dict(pairs or ()), place)]  # fmt: skip

    def _inside(self, value: Any, place: str) -> list | None:
        """The changeable content of an object that the constructor creates again; None if there is none.

        For a module, its attributes. For a user's function, its closure and its default arguments.
        """
        if isinstance(value, nn.Module):
            names = CONTAINERS
            if is_users_class(type(value)):
                names = sorted(n for n in vars(value) if n in CONTAINERS or n not in SKIPPED)
            return list(itertools.chain.from_iterable((n, self._entry(vars(value)[n], n, place)) for n in names))
        if isinstance(value, types.FunctionType) and is_own(value.__code__.co_filename):
            cells = [cell.cell_contents for cell in filter(filled, value.__closure__ or ())]
            contents = (*cells, value.__defaults__, value.__kwdefaults__)
            return [self._attribute(v, f"{place} (kept by the function {value.__name__})") for v in contents]
        return None

    def _entry(self, value: Any, name: str, place: str) -> Any:
        if name in CONTAINERS[:-1]:  # parameters, buffers and modules are stored in dicts, by name
            pairs = [(key, self._attribute(v, f"{place}.{key}")) for key, v in value.items()]
            return ["dict", *itertools.chain.from_iterable(pairs)]
        return self._attribute(value, f"{place}.{name}")

    def _attribute(self, value: Any, place: str) -> Any:
        """Like `_node`. If not strict, an unsavable object counts as a constant, except iterators and files."""
        before = len(self._memo)
        try:
            return self._node(value, place)
        except Unsavable as error:
            if self._strict or (error.moving and not self._recording):
                raise
            for key in list(self._memo)[before:]:  # incomplete nodes
                del self._memo[key]
            return KEPT

    # -- class attributes and globals of the user's files -------------------------------------------------------------

    def _globals(self) -> dict[str, Any]:
        """The user's global variables and class attributes that have changed since the constructors ran.

        A large table that never changes takes no space in the checkpoint.
        """
        result = {}
        for place, value in sorted(self._outside(), key=lambda pair: pair[0]):
            shared = id(value) in self._memo  # an attribute refers to the same object
            node = self._attribute(value, place)
            digest = pickle.dumps(node)
            if self._recording:
                self._fresh[place] = digest
            elif node != KEPT and (shared or self._fresh.get(place) != digest):
                result[place] = node
        return result

    def _outside(self) -> Iterator[tuple[str, Any]]:
        for cls in self._classes:
            yield from ((f"{name_of(cls)}.{n}", v) for n, v in list(vars(cls).items()) if _is_data(n, v))
        for module, values in self._names.globals.items():
            yield from ((f"{module}:.{n}", v) for n, v in list(values.items()) if _is_data(n, v))


def _is_made_again(value: Any) -> bool:
    if isinstance(value, (*CODE, nn.Module, nn.Parameter)) or type(value) is object:
        return True
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return any(value is s for s in streams) or (isinstance(value, Tensor) and is_lazy(value))


def _is_data(name: str, value: Any) -> bool:
    if name.startswith("__"):
        return False
    if isinstance(value, types.FunctionType):
        return bool(value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    return not isinstance(value, (*CODE, property, staticmethod, classmethod))
