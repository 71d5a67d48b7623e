"""Checks of a network before training, on random inputs.

A user's own network may have mistakes that raise no error: a weight that is never trained, a parameter with the wrong
owner, or a state that a checkpoint does not save. They are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mtl.archs.model import ArchError, Model, Outputs
from mtl.archs.restore import as_before
from mtl.data.columns import Batch, equal
from mtl.tasks.predictions import Predictions


def check_model(model: Model, batch: Batch, tasks: Sequence[str]) -> Outputs:
    """Send a small batch through the model several times. The model and all generators stay as they were.

    Args:
        model: the model, on any device.
        batch: float32 inputs of a few samples, in the memory layout of training.
        tasks: names of the tasks.

    Returns:
        the outputs of a pass in training mode.

    Raises:
        ArchError: a prediction lacks a row for each sample, or a parameter's declared owner is wrong. Or a weight is
            not registered or never created, the inputs are changed in place, or two equal passes differ.
    """
    name = type(model.trunk).__name__
    # Copies, to find out whether the network changes its inputs in place.
    kept = {key: value.clone() for key, value in batch.items()}
    with as_before(model):
        outputs = _pass(model, batch, tasks, training=True)
    # Only after a forward pass, because it creates the parameters of lazy modules.
    if unmade := [key for key, p in model.named_parameters() if is_lazy(p)]:
        raise ArchError(f"the parameter {unmade[0]} has no shape yet after a forward pass; does {name} use it?")
    check_owners(model, batch, tasks)
    if not all(equal(batch[key], kept[key]) for key in kept):
        raise ArchError(f"{name} changes its inputs in place, and some methods use them twice; work on a copy")
    # A second pass with the same weights and random numbers must give the same result. Otherwise the network keeps a
    # state of its own, such as a counter, and a resumed run would differ.
    with as_before(model):
        again = _pass(model, batch, tasks, training=True)
    pairs = zip(_tensors([outputs.features, outputs.predictions]), _tensors([again.features, again.predictions]),
                strict=True)  # fmt: skip
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) for a, b in pairs):
        raise ArchError(
            f"{name} returns other features for the same inputs, weights and random numbers when it is called again; "
            "what it remembers belongs into buffers (self.register_buffer), and random numbers come from torch's own "
            "generator, or a resumed run would differ"
        )
    return outputs


def check_owners(model: Model, batch: Batch, tasks: Sequence[str]) -> None:
    """Compare each trainable parameter's declared owner with the tasks whose predictions depend on it.

    At least two tasks must use a shared parameter (or one, if there is only one task). Only its own task may use a
    task's own parameter.

    Raises:
        ArchError: a declaration is wrong or missing, or no task uses a parameter.
    """
    # For each parameter, the tasks that use it, and whether its gradient was ever other than 0.
    users: dict[int, dict[str, bool]] = {}
    shared, owner = _declared(model, tasks)
    # In both modes: some networks drop whole layers at random in training, and others use a layer only in training.
    for training in (True, False):
        with as_before(model):
            outputs = _pass(model, batch, tasks, training)
            _refuse_strangers(model, outputs.predictions)
            for place, found in _all_reached(model, outputs.predictions, shared):
                for p, moved in found:
                    known = users.setdefault(id(p), {})
                    known[tasks[place]] = known.get(tasks[place], False) or moved
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if any(id(p) in shared for p in trainable.values()) and not any(users.get(k) for k in shared):
        raise ArchError(
            f"no loss reaches a parameter of {type(model.trunk).__name__}: are its features detached or made under "
            "torch.no_grad()? A backbone that is not to learn says so with requires_grad_(False)"
        )
    unused = [key for key, p in trainable.items() if not users.get(id(p))]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise ArchError(
            f"no task uses the parameter {unused[0]}{more}; remove it (nn.Identity() in the place of its layer), or "
            "freeze it with requires_grad_(False)"
        )
    for key, p in trainable.items():
        task = owner.get(id(p))
        # Alike tasks have a common graph, from which each one seems to use all heads. Only a gradient shows the truth.
        found = {user for user, moved in users[id(p)].items() if moved or user == task or task is None}
        if id(p) in shared and task is not None:
            continue  # tied weights, in both lists: each backward pass decides whose they are
        if id(p) not in shared and task is None:
            raise ArchError(f"{key} is neither a shared parameter nor a task's own, and would not be balanced")
        if id(p) in shared and len(found) < min(2, len(tasks)):
            raise ArchError(
                f"{key} is declared shared, but only task {min(found)!r} uses it; declare it that task's own"
            )
        if id(p) not in shared and found != {task}:
            other = min(found - {task})
            raise ArchError(f"{key} is declared task {task!r}'s own, but task {other!r} uses it; declare it shared")


def _declared(model: Model, tasks: Sequence[str]) -> tuple[set[int], dict[int, str]]:
    """The ids of the shared parameters, and {id of an own parameter: its task}.

    Raises:
        ArchError: something else than a parameter of the model is declared, or two tasks declare the same one.
    """
    names, owner = {id(p): key for key, p in model.named_parameters()}, {}

    def ids(declared: Iterable[Any], call: str) -> Iterator[int]:
        for one in declared:
            if id(one) not in names:
                shown = f"of shape {tuple(one.shape)} " if isinstance(one, Tensor) else ""
                kind = type(model).__name__
                raise ArchError(
                    f"{kind}.{call} has a {type(one).__name__} {shown}that is not a parameter of {kind}; return its "
                    "parameters, as in self.gate.parameters()"
                )
            yield id(one)

    shared = set(ids(model.shared_parameters(), "shared_parameters()"))
    for task in tasks:
        for key in ids(model.own_parameters(task), f"own_parameters({task!r})"):
            if (other := owner.setdefault(key, task)) != task:
                raise ArchError(f"{names[key]} is declared both {other!r}'s and {task!r}'s own; declare it shared only")
    return shared, owner


def _pass(model: Model, batch: Batch, tasks: Sequence[str], training: bool) -> Outputs:
    """One forward pass, with a check of the outputs' form.

    Raises:
        ArchError: there is not one prediction for each task, or a prediction lacks a row for each sample.
    """
    outputs = model.train(training)(batch)
    kind, size = type(model).__name__, len(next(iter(batch.values())))
    predictions = getattr(outputs, "predictions", None)
    if not isinstance(predictions, Sequence) or len(predictions) != len(tasks):
        shown = f"Outputs of a {type(predictions).__name__}"
        if predictions is None:
            shown = f"a {type(outputs).__name__}"
        elif isinstance(predictions, Sequence):
            shown = f"{len(predictions)} predictions"
        raise ArchError(
            f"{kind} returned {shown}; Outputs([…]) is needed, a list with one prediction for each of {len(tasks)} "
            f"tasks, in this order: {', '.join(tasks)}"
        )
    for task, prediction in zip(tasks, predictions, strict=True):
        if not _tensors(prediction) or (isinstance(prediction, Tensor) and prediction.shape[:1] != (size,)):
            shown = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
            raise ArchError(f"the head of task {task!r} returned {shown} for {size} samples")
    return outputs


def _tensors(value: Any) -> list[Tensor]:
    """All floating tensors in a prediction, which may be nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _all_reached(
    model: Model, predictions: Sequence[Any], shared: set[int]
) -> Iterator[tuple[int, list[tuple[nn.Parameter, bool]]]]:
    """For each task's position, the parameters that its prediction uses, as from `_reached`.

    Predictions that are rows of one tensor use the same parameters. One pass through the backbone finds them. Only the
    heads, whose gradients tell the rows apart, need a pass for each task.
    """
    groups = predictions.groups() if isinstance(predictions, Predictions) else [[i] for i in range(len(predictions))]
    for first, *others in groups:
        found = _reached(model, predictions[first])
        yield first, found
        own = [p for p, _ in found if id(p) not in shared]
        for place in others:
            total = predictions[place].sum()
            gradients = torch.autograd.grad(total, own, retain_graph=True, allow_unused=True) if own else ()
            moved = {id(p): g is not None and _not_zero(g) for p, g in zip(own, gradients, strict=True)}
            yield place, [(p, moved.get(id(p), before)) for p, before in found]


def _reached(model: Model, prediction: Any) -> list[tuple[nn.Parameter, bool]]:
    """The parameters in the graph of a prediction, and whether the gradient of each is other than 0."""
    tensors = [t for t in _tensors(prediction) if t.requires_grad]
    if not tensors:
        return []
    # Not autograd.grad: re-entrant checkpoints raise an error in it.
    sum(t.sum() for t in tensors).backward(retain_graph=True)
    found = [(p, _not_zero(p.grad)) for p in model.parameters() if p.grad is not None]
    for p, _ in found:
        p.grad = None
    return found


def _not_zero(gradient: Tensor) -> bool:
    return bool((gradient.to_dense() if gradient.is_sparse else gradient).any())


def _refuse_strangers(model: Model, predictions: Sequence[Any]) -> None:
    """Refuse weights that the optimizer would never see, such as a tensor with requires_grad in a Python list.

    Raises:
        ArchError: the predictions depend on such a weight.
    """
    tensors = [t for t in _tensors(list(predictions)) if t.requires_grad]
    if not tensors:
        return
    known = set(map(id, model.parameters()))
    if strange := [leaf for leaf in _leaves(sum(t.sum() for t in tensors)) if id(leaf) not in known]:
        raise ArchError(
            f"{len(strange)} weights of {type(model.trunk).__name__} or a head are not among its parameters, "
            f"such as one of shape {tuple(strange[0].shape)}, and would never be trained; use nn.Parameter for a "
            "tensor and nn.ModuleList for a list of modules"
        )


def _leaves(total: Tensor) -> list[Tensor]:
    """The leaf tensors to which a backward pass from `total` would give a gradient."""
    # A loop instead of recursion, because the graph of a deep network exceeds Python's recursion limit.
    found, todo, seen = [], [total.grad_fn], set()
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        todo += [parent for parent, _ in node.next_functions]
    return found
