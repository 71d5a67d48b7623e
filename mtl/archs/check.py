"""A user's own backbone, tried out before training: what would train nothing, or something else, is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mtl.random import kept


class ArchError(ValueError):
    """A backbone, or a task's head, is not what can be trained."""


def check_features(backbone: nn.Module, features: Any, images: Tensor) -> None:
    """Raises:
    ArchError: `features` are not (N, out_features) numbers of the images' dtype.
    """
    name, needed = type(backbone).__name__, (len(images), int(backbone.out_features))
    if not isinstance(features, Tensor):
        raise ArchError(f"{name} returned a {type(features).__name__}; one tensor of features {needed} is needed")
    if features.shape != needed:
        hint = "; average over height and width with .mean((2, 3))" if features.ndim == 4 else ""
        raise ArchError(
            f"{name} returned features of shape {tuple(features.shape)} for a batch of {len(images)}, with "
            f"out_features={backbone.out_features}; {needed} is needed{hint}"
        )
    if features.dtype != images.dtype:
        given, wanted = (str(t.dtype).removeprefix("torch.") for t in (features, images))
        raise ArchError(f"{name} returned {given} features for {wanted} images; convert them to {wanted}")


def check_model(model: nn.Module, images: Tensor) -> None:
    """Send a small batch twice through the model, in training mode; the model and all generators stay as they were.

    Args:
        images: (N, C, H, W) float32, in the memory layout of training.

    Raises:
        ArchError: a head's prediction has no row for each image, no loss reaches the backbone's parameters or one
            reaches a weight that is not registered, a parameter is never made, or the passes differ.
    """
    name, kept = type(model.backbone).__name__, images.clone(memory_format=torch.preserve_format)
    if unmade := [key for key, p in model.named_parameters() if is_lazy(p)]:
        raise ArchError(f"the parameter {unmade[0]} has no shape yet after a forward pass; does {name} use it?")
    with as_before(model):
        model.train()
        features = model.backbone(images)
        check_features(model.backbone, features, images)
        predictions = model.predict([features] * len(model.heads))
        for task, prediction in zip(model.heads, predictions, strict=True):
            if not isinstance(prediction, Tensor) or prediction.shape[:1] != images.shape[:1]:
                shown = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
                raise ArchError(f"the head of task {task!r} returned {shown} for {len(images)} images")
        _check_reach(model, predictions)
    if not torch.equal(images, kept):
        raise ArchError(f"{name} changes its images in place, and some methods use them twice; work on a copy")
    with as_before(model):
        model.train()
        again = model.backbone(images)
    if not torch.allclose(features, again, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ArchError(
            f"{name} returns other features for the same images, weights and random numbers when it is called again; "
            "what it remembers belongs into buffers (self.register_buffer), and random numbers come from torch's own "
            "generator, or a resumed run would differ"
        )


def _check_reach(model: nn.Module, predictions: list[Tensor]) -> None:
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    reached = [p for p in predictions if p.requires_grad]
    if reached:
        total = sum(p.sum() for p in reached)
        known = set(map(id, model.parameters()))
        if strange := [leaf for leaf in _leaves(total) if id(leaf) not in known]:
            raise ArchError(
                f"{len(strange)} weights of {type(model.backbone).__name__} or a head are not among its parameters, "
                f"such as one of shape {tuple(strange[0].shape)}, and would never be trained; use nn.Parameter for a "
                "tensor and nn.ModuleList for a list of modules"
            )
        # Not autograd.grad, which re-entrant checkpoints do not bear.
        total.backward()
    gradients = [p.grad for p in parameters]
    for p in model.parameters():
        p.grad = None
    if parameters and all(g is None for g in gradients):
        raise ArchError(
            f"no loss reaches a parameter of {type(model.backbone).__name__}: are its features detached or made under "
            "torch.no_grad()? A backbone that is not to learn says so with requires_grad_(False)"
        )


def _leaves(total: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from `total` would give a gradient."""
    found, todo, seen = [], [total.grad_fn], set()
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        todo += [parent for parent, _ in node.next_functions]
    return found


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards the modes, parameters, buffers and all global generators are as they were.

    Only parameters and buffers of lazy modules, which the first forward pass makes, stay.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    tensors = [*model.parameters(), *(b for _, named in buffers for b in named.values() if b is not None)]
    values = [(t, t.detach().clone()) for t in tensors if not is_lazy(t)]
    try:
        with kept():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, named in buffers:
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
