"""A prediction may be one tensor, or several in tuples, lists and dicts. Here they are treated alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
