"""The Python state of a user's own modules, for the checkpoint: what is in no parameter and no persistent buffer.

A loss of one's own may count in an attribute, keep a list of past losses, draw from a generator of its own or make a
buffer at the first batch. All that is saved as tensors, which `torch.load(weights_only=True)` reads. Two names of one
object stay two names of one object. What cannot be saved is named, never left out in silence.

What the constructor makes again by itself (functions, modules, parameters) is saved as its place, not as its content.
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
# A constructor makes these again. They hold no state of their own, except functions, which are looked into.
CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, functools.partial, logging.Logger,
        re.Pattern, np.ufunc, torch.dtype, torch.device, torch.layout, torch.memory_format)  # fmt: skip
MOVING = (Iterator, io.IOBase)  # they change whenever they are used


class Unsavable(Exception):
    """Something on which the rest of the run may depend cannot be saved; the message names it.

    Args:
        place: of the object, such as `loss.log`.
        value: the object.
        why: in a few words.
    """

    def __init__(self, place: str, value: Any, why: str = ""):
        super().__init__(f"{place} is a {type(value).__name__}, which cannot be saved{f' ({why})' if why else ''}")
        self.moving = isinstance(value, MOVING)


class PythonState:
    """What there is to save in modules beside parameters and buffers, now and later.

    Args:
        loss, model: as their constructors have left them, on their device. Only the user's own classes in them, and
            what was added later, have such state.
        device: for the tensors that were on a GPU when they were saved.
    """

    def __init__(self, loss: nn.Module, model: nn.Module, device: torch.device):
        self.device = device
        roots = {"loss": loss, "arch": model}
        self._roots = {n: r for n, r in roots.items() if any(is_users_class(type(m)) for m in r.modules())}
        modules = [m for root in self._roots.values() for m in root.modules()]
        self._classes = list(dict.fromkeys(c for m in modules for c in type(m).__mro__ if is_users_class(c)))
        self._names = Names(self._classes)
        self._objects: dict[str, Any] = {}  # what the constructors made, by its place
        self._places: dict[int, str] = {}
        self._fresh: dict[str, bytes] = {}  # the user's globals before training
        self._recording = True
        self._encode()
        self._recording = False

    def save(self) -> dict[str, Any]:
        """The state as tensors; empty if there is no class of the user's.

        Raises:
            Unsavable: something in it cannot be saved.
        """
        try:
            tree = self._encode()
            return pack(tree) if tree else {}
        except RecursionError as error:
            raise Unsavable("loss", self._roots.get("loss"), "nested too deeply") from error

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Bring modules that were just built into a saved state, all but the values of parameters.

        Raises:
            ValueError: it was saved by other classes.
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
            # Networks hold many odd constants. What cannot be saved in one is taken for a constant, too.
            self._strict = name == "loss" and not self._recording
            nodes[name] = self._node(root, name)
        self._strict = False
        result = {"roots": nodes, "globals": self._globals()} if nodes else {}
        self._memo = {}
        return result

    def _node(self, value: Any, place: str) -> Any:
        """`value` itself if it is a number or the like, else a list [kind, …] that stands for it."""
        if type(value) in ATOMS:
            return value
        if (known := self._memo.get(id(value))) is not None:
            return known[0]
        if self._recording and _is_made_again(value) and id(value) not in self._places:
            self._objects[place], self._places[id(value)] = value, place
        node: list = []
        self._memo[id(value)] = (node, value)  # before its content, which may lead back to it
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
        if kind in (set, frozenset):  # equal sets may have other orders
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
        """An object by the protocol of pickle, if its class is one that may be restored."""
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
        """What may change in an object that the constructor makes again."""
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
        if name in CONTAINERS[:-1]:  # names in them are attributes, too
            pairs = [(key, self._attribute(v, f"{place}.{key}")) for key, v in value.items()]
            return ["dict", *itertools.chain.from_iterable(pairs)]
        return self._attribute(value, f"{place}.{name}")

    def _attribute(self, value: Any, place: str) -> Any:
        """As `_node`. Where not strict, what cannot be saved counts as a constant, unless it moves by itself."""
        before = len(self._memo)
        try:
            return self._node(value, place)
        except Unsavable as error:
            if self._strict or (error.moving and not self._recording):
                raise
            for key in list(self._memo)[before:]:  # nodes that were left half-way
                del self._memo[key]
            return KEPT

    # -- class attributes and globals of the user's files -------------------------------------------------------------

    def _globals(self) -> dict[str, Any]:
        """Those that have changed since the constructors ran: a large table that nobody changes costs no space."""
        result = {}
        for place, value in sorted(self._outside(), key=lambda pair: pair[0]):
            shared = id(value) in self._memo  # an attribute holds it, too
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
