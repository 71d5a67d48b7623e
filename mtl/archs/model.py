"""What a model is: from a batch to each task's prediction, with every parameter's owner declared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtl.archs.restore import as_before
from mtl.data.columns import Batch
from mtl.tasks import Task

Views = Callable[[Tensor], Sequence[Tensor]]
Runner = Callable[[nn.Module, Sequence[Tensor]], Tensor]


class ArchError(ValueError):
    """A backbone, or a task's head, is not what can be trained."""


class Outputs(NamedTuple):
    """What a forward pass returns.

    Attributes:
        predictions: for each task what its decoder returns, in the order of the tasks. Only the task reads it.
        features: (N, …) the tensor at which sharing ends, for methods that work on the gradients of features. None
            where there is no such tensor.
    """

    predictions: Sequence[Any]
    features: Tensor | None = None


class Model(nn.Module, ABC):
    """Base of every network of several tasks. Ownership of the parameters is declared, and checked before training.

    Attributes:
        inputs: names of the columns that the model reads.
    """

    inputs: Sequence[str] = ("image",)

    @abstractmethod
    def forward(self, batch: Batch) -> Outputs:
        """The predictions of all tasks for the samples of a batch."""

    @abstractmethod
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that several tasks use. Per-task gradients are taken of these."""

    @abstractmethod
    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        """Parameters that only the task of this name uses."""

    @property
    def trunk(self) -> nn.Module:
        """The module whose children are the layer groups of the gradient microscope."""
        return self


class HardSharing(Model):
    """One shared backbone, and one decoder for each task: backbone → features → a prediction for each task.

    Args:
        backbone: any module that returns one tensor (N, …). It may have a method `decoder(task)`, which makes a task's
            decoder, and an attribute `inputs`, the names of the columns that its `forward` takes. Without `decoder` it
            needs the attribute `out_features` = F and returns features (N, F); decoders are then linear layers.
        tasks: the tasks, in the order in which predictions are returned.

    Raises:
        ArchError: the backbone or a decoder is no module, or `out_features` is missing.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[Task]):
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise ArchError(f"a {type(backbone).__name__} was built; a torch.nn.Module is needed")
        self.inputs = tuple(getattr(backbone, "inputs", type(self).inputs))
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        for task in tasks:
            # Past ModuleDict's own check, which refuses a task that is called "type" or "values".
            self.heads._modules[task.name] = _decoder(backbone, task)

    def forward(self, batch: Batch, views: Views | None = None, run: Runner | None = None) -> Outputs:
        """The predictions of all tasks.

        Args:
            batch: with the backbone's inputs.
            views: makes what each decoder sees from the features; None gives the features to all.
            run: calls the backbone, where several processes divide the batch.

        Raises:
            ArchError: the backbone does not return features as described for the class.
        """
        inputs = [batch[name] for name in self.inputs]
        features = self.backbone(*inputs) if run is None else run(self.backbone, inputs)
        _check_features(self.backbone, features, inputs[0])
        seen = [features] * len(self.heads) if views is None else views(features)
        return Outputs([head(view) for head, view in zip(self.heads.values(), seen, strict=True)], features)

    def shared_parameters(self) -> Iterable[nn.Parameter]:
        return self.backbone.parameters()

    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        return self.heads[task].parameters()

    @property
    def trunk(self) -> nn.Module:
        return self.backbone


def _decoder(backbone: nn.Module, task: Task) -> nn.Module:
    name = type(backbone).__name__
    if hasattr(backbone, "decoder"):
        decoder = backbone.decoder(task)
        if not isinstance(decoder, nn.Module):
            kind = type(decoder).__name__
            raise ArchError(f"{name}.decoder made a {kind} for task {task.name!r}; a torch.nn.Module is needed")
        return decoder
    width = getattr(backbone, "out_features", None)
    if not isinstance(width, Integral) or width < 1:
        raise ArchError(
            f"{name} needs an int attribute out_features: the width of its features, not {width!r}; "
            "or a method decoder(task)"
        )
    return nn.Linear(int(width), task.outputs)


def _check_features(backbone: nn.Module, features: Any, first: Tensor) -> None:
    """Look at what a backbone returned.

    Args:
        first: the first input.

    Raises:
        ArchError: it is no tensor with a row for each sample; or, for linear decoders, not (N, out_features) numbers
            of the inputs' dtype.
    """
    name, size, own = type(backbone).__name__, len(first), hasattr(backbone, "decoder")
    needed = f"({size}, …)" if own else str((size, int(backbone.out_features)))
    if not isinstance(features, Tensor):
        raise ArchError(f"{name} returned a {type(features).__name__}; one tensor of features {needed} is needed")
    if own and features.shape[:1] == (size,):
        return
    if own or features.shape != (size, int(backbone.out_features)):
        hint = "; average over height and width with .mean((2, 3))" if features.ndim == 4 and not own else ""
        width = "" if own else f", with out_features={backbone.out_features}"
        raise ArchError(
            f"{name} returned features of shape {tuple(features.shape)} for a batch of {size}{width}; "
            f"{needed} is needed{hint}"
        )
    device = first.device.type  # meta has no autocast, where sizes are counted without memory
    mixed = device != "meta" and torch.is_autocast_enabled(device)  # features may then be bf16
    if features.dtype != first.dtype and first.is_floating_point() and not mixed:
        given, wanted = (str(t.dtype).removeprefix("torch.") for t in (features, first))
        raise ArchError(f"{name} returned {given} features for {wanted} inputs; convert them to {wanted}")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def count_macs(model: nn.Module, batch: Batch) -> int:
    """Multiply-accumulates of a forward pass (convolutions and linear layers) for the one sample of `batch`."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with as_before(model), FlopCounterMode(display=False) as counter:
        model.eval()({name: value.to(device) for name, value in batch.items()})
    return counter.get_total_flops() // 2
