"""Turns the nodes of `mtl.engine.pystate` back into objects. It calls only constructors that `Names` allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl.engine.names import Names, is_users_class
from mtl.losses import Equal

BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
CONTAINERS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")  # of every nn.Module
# The attributes of nn.Module and of every Strategy. A checkpoint has them elsewhere, or a run sets them by itself.
# Equal has no others. So an attribute that is added to Strategy is never taken for a user's own.
SKIPPED = frozenset(vars(Equal(1)))
KEPT = ["kept"]  # the node of a value that stays as the constructor has made it


class Decoder:
    """Decodes nodes. A node that occurs several times becomes one object.

    Args:
        originals: the objects that the constructors have made, by place, such as "loss.log".
        names: the classes that may be restored.
        device: receives the tensors that were on a GPU.
    """

    def __init__(self, originals: Mapping[str, Any], names: Names, device: torch.device):
        self.originals, self.names, self.device = originals, names, device
        self._done: dict[int, Any] = {}

    def value(self, node: Any) -> Any:
        """The object of a node.

        Raises:
            ValueError: the classes have changed since it was saved.
        """
        if not isinstance(node, list):
            return node
        if id(node) not in self._done:
            kind, *rest = node
            if kind in ("list", "set", "dict"):
                return self._container(node, kind, rest)
            if kind in ("object", "original"):  # they may contain themselves, and note their result early
                return getattr(self, f"_{kind}")(node, *rest)
            self._done[id(node)] = getattr(self, f"_{kind.replace(' ', '_')}")(*rest)
        return self._done[id(node)]

    def _container(self, node: list, kind: str, rest: list) -> Any:
        result: Any = {"list": list, "set": set, "dict": dict}[kind]()
        self._done[id(node)] = result  # noted before its content, which may contain it
        if kind == "list":
            result.extend(map(self.value, rest))
        elif kind == "set":
            result.update(map(self.value, rest))
        else:
            result.update(zip(map(self.value, rest[::2]), map(self.value, rest[1::2]), strict=True))
        return result

    def _tuple(self, *items) -> tuple:
        return tuple(map(self.value, items))

    def _frozenset(self, *items) -> frozenset:
        return frozenset(map(self.value, items))

    def _tensor(self, tensor, device, leaf, parameter, grad) -> Tensor:
        tensor = tensor if device == "cpu" else tensor.to(self.device)
        result = nn.Parameter(tensor, requires_grad=leaf) if parameter else tensor.requires_grad_(leaf)
        if grad is not None:
            result.grad = self.value(grad)
        return result

    def _array(self, dtype, shape, content) -> np.ndarray | np.generic:
        flat = np.frombuffer(bytearray(content), dtype=np.dtype(dtype))
        return flat[0] if shape is None else flat.reshape(shape)

    def _generator(self, device, state) -> torch.Generator:
        generator = torch.Generator("cpu" if device == "cpu" else self.device)
        generator.set_state(state)
        return generator

    def _default_generator(self) -> torch.Generator:
        return torch.default_generator

    def _random_state(self, state) -> np.random.RandomState:
        result = np.random.RandomState()
        result.set_state(self.value(state))
        return result

    def _numpy_generator(self, name, state) -> np.random.Generator:
        bits = getattr(np.random, BIT_GENERATORS[BIT_GENERATORS.index(name)])()
        bits.state = self.value(state)
        return np.random.Generator(bits)

    def _method(self, owner, name) -> Any:
        return getattr(self.value(owner), name)

    def _dtype(self, name) -> torch.dtype:
        return getattr(torch, name)

    def _device(self, name) -> torch.device:
        return torch.device(name)

    def _global(self, name) -> Any:
        if (found := self.names.find(name)) is None:
            raise ValueError(f"{name.replace(':', '.')} is not there any more")
        return found

    def _object(self, node, new, name, arguments, state, items, pairs) -> Any:
        cls, arguments = self._global(name), self.value(arguments)
        result = cls.__new__(cls, *arguments) if new else cls(*arguments)
        self._done[id(node)] = result
        for item in self.value(items):
            result.append(item)
        for key, value in self.value(pairs).items():
            result[key] = value
        state = self.value(state)
        if state is not None and hasattr(result, "__setstate__"):
            result.__setstate__(state)
        elif state is not None:
            plain, slots = state if isinstance(state, tuple) else (state, None)
            if plain:
                vars(result).update(plain)
            for name, value in (slots or {}).items():
                object.__setattr__(result, name, value)
        return result

    def _original(self, node, place, inside) -> Any:
        if place not in self.originals:
            raise ValueError(f"{place} is not there any more")
        result = self._done[id(node)] = self.originals[place]
        if isinstance(result, nn.Module):
            self._attributes(result, dict(zip(inside[::2], inside[1::2], strict=True)))
        elif inside:
            self._function(result, *inside)
        return result

    def _attributes(self, module: nn.Module, saved: Mapping[str, Any]) -> None:
        if is_users_class(type(module)):
            for name in [n for n in vars(module) if n not in SKIPPED and n not in saved]:
                del vars(module)[name]
        for name, node in saved.items():
            if node == KEPT:
                continue
            if name in CONTAINERS[:-1]:
                there = vars(module)[name]
                pairs = dict(zip(node[1::2], node[2::2], strict=True))
                values = {key: there[key] if n == KEPT else self.value(n) for key, n in pairs.items()}
                there.clear()
                there.update(values)
            else:
                vars(module)[name] = self.value(node)

    def _function(self, function, *contents) -> None:
        *cells, defaults, named = contents
        for cell, node in zip(filter(filled, function.__closure__ or ()), cells, strict=True):
            if node != KEPT:
                cell.cell_contents = self.value(node)
        for name, node in (("__defaults__", defaults), ("__kwdefaults__", named)):
            if node not in (None, KEPT):
                setattr(function, name, self.value(node))


def filled(cell) -> bool:
    """Whether a variable of a closure has a value."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
