"""A user's own backbone, tried out before training: what would otherwise train nothing, or something else, is refused."""

from __future__ import annotations

import random
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from mtl.archs.model import MultiTaskModel

OURS = (Path(__file__).parents[1], Path(torch.__file__).parent)
LIBRARIES = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]


def check_features(backbone: nn.Module, features: Any, images: Tensor) -> None:
    """Raises:
    ValueError: `features` are not (N, out_features) numbers of the images' dtype.
    """
    name, needed = type(backbone).__name__, (len(images), int(backbone.out_features))
    if not isinstance(features, Tensor):
        raise ValueError(f"{name} returned a {type(features).__name__}; one tensor of features {needed} is needed")
    if features.shape != needed:
        hint = "; average over height and width with .mean((2, 3))" if features.ndim == 4 else ""
        raise ValueError(
            f"{name} returned features of shape {tuple(features.shape)} for {len(images)} images and "
            f"out_features={backbone.out_features}; {needed} is needed{hint}"
        )
    if features.dtype != images.dtype:
        given, wanted = (str(t.dtype).removeprefix("torch.") for t in (features, images))
        raise ValueError(f"{name} returned {given} features for {wanted} images; convert them to {wanted}")


def check_model(model: MultiTaskModel, images: Tensor) -> None:
    """Send a small batch twice through the model, in training mode; the model and all generators stay as they were.

    Args:
        images: (N, C, H, W) float32, in the memory layout of training.

    Raises:
        ValueError: a head's prediction has no row for each image, no loss reaches the backbone's parameters, a
            parameter is never made, or the second pass differs from the first.
    """
    name, kept = type(model.backbone).__name__, images.clone(memory_format=torch.preserve_format)
    if unmade := [key for key, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"the parameter {unmade[0]} has no shape yet after a forward pass; does {name} use it?")
    with _as_before(model):
        features = model.backbone(images)
        predictions = model.predict([features] * len(model.heads))
        for task, prediction in zip(model.heads, predictions, strict=True):
            if not isinstance(prediction, Tensor) or prediction.shape[:1] != images.shape[:1]:
                shown = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
                raise ValueError(f"the head of task {task!r} returned {shown} for {len(images)} images")
        _check_reach(model, predictions)
    if not torch.equal(images, kept):
        raise ValueError(f"{name} changes its images in place, and some methods use them twice; work on a copy")
    with _as_before(model):
        again = model.backbone(images)
    if not torch.allclose(features, again, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{name} returns other features for the same images, weights and random numbers when it is called again; "
            "what it remembers belongs into buffers (self.register_buffer), or no checkpoint holds it"
        )


def where(error: BaseException) -> str:
    """" (file, line 7)": the last line of a user's own code on the way to `error`; empty where there is none."""
    lines = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    lines = [(file, n) for file, n in lines if file.is_file() and not any(map(file.is_relative_to, OURS))]
    # A library that the user calls is not where the mistake is, if a file of the user's own is on the way.
    lines = [line for line in lines if not any(map(line[0].is_relative_to, LIBRARIES))] or lines
    return f" ({lines[-1][0]}, line {lines[-1][1]})" if lines else ""


def _check_reach(model: MultiTaskModel, predictions: list[Tensor]) -> None:
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    reached = [p for p in predictions if p.requires_grad]
    if reached:
        # Not autograd.grad, which re-entrant checkpoints do not bear.
        sum(p.sum() for p in reached).backward()
    gradients = [p.grad for p in parameters]
    for p in model.parameters():
        p.grad = None
    if parameters and all(g is None for g in gradients):
        raise ValueError(
            f"no loss reaches a parameter of {type(model.backbone).__name__}: are its features detached or made under "
            "torch.no_grad()? A backbone that is not to learn says so with requires_grad_(False)"
        )


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Training mode in here; afterwards modes, parameters, buffers and generators are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    tensors = [*model.parameters(), *(b for _, named in buffers for b in named.values() if b is not None)]
    values = [(t, t.detach().clone()) for t in tensors]
    states = random.getstate(), np.random.get_state()
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training
        for module, named in buffers:
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
