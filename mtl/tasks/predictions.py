"""Predictions: one may be one tensor, or several in tuples, lists and dicts; those of alike tasks are one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def each(function: Callable[..., Tensor], *predictions: Any) -> Any:
    """Apply a function to every tensor of a prediction. The result has the same form.

    Example: ``each(Tensor.float, {"class": logits, "box": offsets})`` is a dict of two float tensors.

    Args:
        function: takes as many tensors as there are predictions.
        predictions: of one form. Whatever is no tensor, tuple, list or dict is taken from the first one.
    """
    first = predictions[0]
    if isinstance(first, Tensor):
        return function(*predictions)
    if isinstance(first, Mapping):
        return {key: each(function, *(p[key] for p in predictions)) for key in first}
    if isinstance(first, tuple | list):
        found = [each(function, *parts) for parts in zip(*predictions, strict=True)]
        return type(first)(*found) if hasattr(first, "_fields") else type(first)(found)
    return first


def tensors(prediction: Any) -> list[Tensor]:
    """All tensors of a prediction."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each(note, prediction)
    return found


class Predictions(list[Any]):
    """The predictions of T tasks: a list in the order of the tasks.

    For alike tasks it remembers the tensor (K, N, …) from which their predictions were taken. So nobody has to stack
    them again. A prediction that was replaced in the list does count: the tensor is then not used.
    """

    def __init__(self, predictions: Iterable[Any] = ()):
        super().__init__(predictions)
        self._stacks: dict[tuple[int, ...], tuple[Tensor, Sequence[Tensor]]] = {}

    def put(self, places: Sequence[int], stack: Tensor) -> None:
        """Set the predictions of alike tasks.

        Args:
            places: positions of the K tasks.
            stack: (K, N, …).
        """
        rows = stack.unbind()
        for place, row in zip(places, rows, strict=True):
            self[place] = row
        self._stacks[tuple(places)] = stack, rows

    def stack(self, places: Sequence[int]) -> Tensor:
        """(K, N, …) the predictions of alike tasks at these positions."""
        if self._whole(tuple(places)):
            return self._stacks[tuple(places)][0]
        return torch.stack([self[place] for place in places])

    def groups(self) -> list[Sequence[int]]:
        """All positions: those of rows of one tensor in one list, each other one in a list of its own."""
        several = [places for places in self._stacks if self._whole(places)]
        done = {place for places in several for place in places}
        return [*several, *([place] for place in range(len(self)) if place not in done)]

    def _whole(self, places: tuple[int, ...]) -> bool:
        """Whether the predictions at these positions are the rows of a tensor, and none was replaced."""
        rows = self._stacks[places][1] if places in self._stacks else ()
        return bool(rows) and all(self[place] is row for place, row in zip(places, rows, strict=True))

    def each(self, function: Callable[[Tensor], Tensor]) -> Predictions:
        """Apply a function to every tensor, and to the tensor of alike tasks once. It must work on each element."""
        stacks = {places: self.stack(places) for places in self._stacks}
        done = {place for places in stacks for place in places}
        found = Predictions(None if i in done else each(function, one) for i, one in enumerate(self))
        for places, stack in stacks.items():
            found.put(places, function(stack))
        return found
