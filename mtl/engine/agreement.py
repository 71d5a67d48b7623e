"""Compares the processes of a group before their gradients are averaged: same model, same strategy, same calls?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.losses.base import Strategy
from mtl.losses.extra import unpack

ALONE = "set strategy.group = None if each process trains its own model"
# Relative tolerance of sums in float64. Replicas have the same bits, but different GPUs may add in another order.
TOLERANCE = 1e-9


@dataclass
class Call:
    """A call that all processes must make at the same time.

    Args:
        name: name of the function.
        facts: properties of the arguments that must be equal in all processes; the keys are for messages.
        graph: whether a loss has a graph. DistributedDataParallel waits for the backward pass of every process.
    """

    name: str
    facts: dict[str, Any]
    graph: bool = True


def facts_of(strategy: Strategy, call: Call) -> dict[str, Any]:
    """The facts that must be equal in all processes at each call. The first difference is reported."""
    return {"call": call.name, "method": type(strategy).__name__, "tasks": ", ".join(strategy.names), **call.facts}


def progress(strategy: Strategy) -> dict[str, Any]:
    """The part of a strategy's state that the host knows, to be compared in the same way."""
    return {"steps": strategy.calls.steps, "epoch": strategy.epoch, "seed of the random stream": strategy._seed}


def first_difference(facts: Sequence[dict[str, Any]]) -> str | None:
    """The first fact in which two processes differ, as text: "steps: 3 in process 0, 4 in process 1".

    Args:
        facts: the facts of each process.
    """
    for rank, other in enumerate(facts):
        for key in facts[0] | other:
            if (a := facts[0].get(key)) != (b := other.get(key)):
                return f"{key}: {a} in process 0, {b} in process {rank}"
    return None


def describe_model(shared: Sequence[Parameter], heads: Sequence[Sequence[Parameter]]) -> dict[str, Any]:
    """Shapes of all parameters, with sum and norm of each as a fingerprint of its values. Waits for the device."""
    everything = [*shared, *(p for head in heads for p in head)]
    numbers: list[Tensor] = []
    for p in everything:
        values = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
        numbers += [values.sum(dtype=torch.float64), torch.linalg.vector_norm(values, dtype=torch.float64)]
    shapes = [[tuple(p.shape) for p in part] for part in (shared, *heads)]
    return {"shapes": shapes, "values": [number.item() for number in numbers], "sizes": [p.numel() for p in everything]}


def check_models(models: Sequence[dict[str, Any]]) -> None:
    """Check that the processes hold replicas of one model.

    Args:
        models: the description from `describe_model` of each process.

    Raises:
        ValueError: they do not.
    """
    if all(_same(models[0], other) for other in models):
        return
    raise ValueError(
        f"group: the processes hold different models; {ALONE}, or wrap the model in DistributedDataParallel "
        "(after a resume, load model, optimizer and strategy in every process)"
    )


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["shapes"] != b["shapes"]:
        return False
    sums = zip(a["values"][::2], b["values"][::2], strict=True)
    norms = list(zip(a["values"][1::2], b["values"][1::2], strict=True))
    # x != x is True only for NaN: replicas that have both become NaN still are equal.
    near = lambda x, y, scale: x == y or (x != x and y != y) or abs(x - y) <= TOLERANCE * scale  # noqa: E731
    # Two sums of the same n terms may differ if they were added in another order. The scale of this difference is
    # norm · √n, which is the largest possible |sum|.
    scales = [norm * size**0.5 for (norm, _), size in zip(norms, a["sizes"], strict=True)]
    return all(near(x, y, s) for (x, y), s in zip(sums, scales, strict=True)) and all(near(x, y, x) for x, y in norms)


def describe_strategy(strategy: Strategy) -> dict[str, Any]:
    """The strategy's state without the values of tensors: names, shapes, dtypes, number of steps, extra state."""
    strategy.stream_seed()  # fixes the seed now, if it is still open, so that the state contains it
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in _tensors(strategy).items()}
    lasting = {name for name in tensors if name not in strategy.lazy}
    extra = unpack(strategy.get_extra_state())
    return {"tensors": tensors, "lasting": lasting, "steps": strategy.calls.steps, "extra": extra}


def check_strategies(strategies: Sequence[dict[str, Any]]) -> None:
    """Check that all processes can take over the first process's strategy.

    Args:
        strategies: the description from `describe_strategy` of each process.

    Raises:
        ValueError: another process has made more steps, or a tensor has another shape.
    """
    first = strategies[0]
    for rank, other in enumerate(strategies):
        if other["steps"] > first["steps"]:
            raise ValueError(
                f"group: the strategy has made {other['steps']} steps in process {rank}, and {first['steps']} in "
                "process 0; load its checkpoint in every process, or in process 0"
            )
        for name in sorted(first["lasting"] | other["lasting"]):
            shapes = [_shape(one["tensors"].get(name)) for one in (first, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"group: the strategy's {name} has shape {shapes[0]} in process 0, {shapes[1]} in process {rank}; "
                    f"{ALONE}, or make the same strategy in all"
                )


def _shape(entry: tuple[tuple[int, ...], torch.dtype] | None) -> tuple[int, ...] | None:
    return None if entry is None else entry[0]


def prepare_tensors(strategy: Strategy, first: dict[str, Any]) -> list[Tensor]:
    """The strategy's tensors, with names, order and shapes as in the first process. Missing buffers are created.

    A method creates some buffers in its first step. So the first process may have loaded buffers that others lack.
    """
    ours = _tensors(strategy)
    for name in ours.keys() - first["tensors"].keys():
        _put(strategy, name, None)
    device = next((t.device for t in ours.values()), None)
    for name, (shape, dtype) in first["tensors"].items():
        if name not in ours or tuple(ours[name].shape) != shape or ours[name].dtype != dtype:
            _put(strategy, name, torch.empty(shape, dtype=dtype, device=ours[name].device if name in ours else device))
    ours = _tensors(strategy)
    return [ours[name] for name in first["tensors"]]


def _tensors(strategy: Strategy) -> dict[str, Tensor]:
    found = {**dict(strategy.named_parameters()), **dict(strategy.named_buffers())}
    return {name: found[name] for name in sorted(found) if found[name] is not None}


def _put(strategy: Strategy, name: str, value: Tensor | None) -> None:
    module, _, leaf = name.rpartition(".")
    strategy.get_submodule(module).register_buffer(leaf, value)
