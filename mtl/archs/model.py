"""The base class of models: from a batch to each task's prediction, with a declared owner for every parameter.

Balancing methods need the owners. They balance the gradients of the shared parameters, and leave each task's own
parameters to its own loss.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mtl.archs.restore import as_before
from mtl.data.columns import Batch
from mtl.tasks import Task
from mtl.tasks.groups import places_of_alike
from mtl.tasks.predictions import Predictions

Views = Callable[[Tensor], Sequence[Tensor]]  # features → each decoder's input
Runner = Callable[[nn.Module, Sequence[Tensor]], Tensor]  # (backbone, its inputs) → features


class ArchError(ValueError):
    """A backbone or a task's head cannot be trained as it is."""


class Outputs(NamedTuple):
    """The outputs of a forward pass.

    Attributes:
        predictions: the output of each task's decoder, in the order of the tasks. Only the task's own loss and metrics
            read it, so it may be anything.
        features: (N, …) the last tensor that all tasks share, for methods on the gradients of features. None if there
            is no such tensor.
    """

    predictions: Sequence[Any]
    features: Tensor | None = None


class Model(nn.Module, ABC):
    """Base of every multi-task network. It declares the owner of each parameter; `check_owners` verifies it.

    Attributes:
        inputs: names of the columns that the model reads.
    """

    inputs: Sequence[str] = ("image",)

    @abstractmethod
    def forward(self, batch: Batch) -> Outputs:
        """The predictions of all tasks for the samples of a batch."""

    @abstractmethod
    def shared_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that several tasks use. Per-task gradients are taken with respect to these."""

    @abstractmethod
    def own_parameters(self, task: str) -> Iterable[nn.Parameter]:
        """Parameters that only the task of this name uses."""

    @property
    def trunk(self) -> nn.Module:
        """The module whose children are the gradient microscope's layer groups; messages show its class name."""
        return self


class HardSharing(Model):
    """One shared backbone, and one decoder for each task: backbone → features → a prediction for each task.

    Args:
        backbone: any module that returns one tensor (N, …). A method `decoder(task)`, if it has one, makes each task's
            decoder. Without it, decoders are linear layers: then the backbone returns (N, F), and has the attribute
            `out_features` = F. The attribute `inputs` names the columns that `forward` takes; default: ("image",).
        tasks: the tasks, in the order of the predictions.

    Raises:
        ArchError: the backbone or a decoder is not a module, or `out_features` is missing.
    """

    def __init__(self, backbone: nn.Module, tasks: Sequence[Task]):
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise ArchError(f"a {type(backbone).__name__} was built; a torch.nn.Module is needed")
        self.inputs = tuple(getattr(backbone, "inputs", type(self).inputs))
        self.backbone = backbone
        self.heads = nn.ModuleDict()
        for task in tasks:
            # Not heads[name] = …: ModuleDict refuses names of its own methods, such as a task called "values".
            self.heads._modules[task.name] = _decoder(backbone, task)
        self._alike = places_of_alike(tasks)

    def forward(self, batch: Batch, views: Views | None = None, run: Runner | None = None) -> Outputs:
        """The predictions of all tasks.

        Args:
            batch: contains the backbone's inputs.
            views: makes each decoder's input from the features (RotoGrad); None gives the features to all decoders.
            run: calls the backbone in place of this function, if several processes divide the batch.

        Raises:
            ArchError: the backbone's features are not as described in the class.
        """
        inputs = [batch[name] for name in self.inputs]
        features = self.backbone(*inputs) if run is None else run(self.backbone, inputs)
        _check_features(self.backbone, features, inputs[0])
        # RotoGrad gives each decoder its own rotation of the features. All other methods give them the features.
        seen = [features] * len(self.heads) if views is None else views(features)
        return Outputs(decode(list(self.heads.values()), seen, self._alike), features)

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


def decode(decoders: Sequence[nn.Module], inputs: Sequence[Any], places: Sequence[Sequence[int]]) -> Predictions:
    """The predictions of T decoders. Linear decoders of alike tasks are computed in one product.

    Args:
        decoders: of the T tasks.
        inputs: of the T decoders.
        places: positions of alike tasks, as from `places_of_alike`.
    """
    found = Predictions([None] * len(decoders))
    for group in places:
        several = [decoders[i] for i in group]
        if len(group) > 1 and _stackable(several) and all(inputs[i] is inputs[group[0]] for i in group):
            found.put(group, _stacked(several, inputs[group[0]]))
        else:
            for i, decoder in zip(group, several, strict=True):
                found[i] = decoder(inputs[i])
    return found


def _stackable(decoders: Sequence[Any]) -> bool:
    """Whether all are linear layers of one shape. A layer with hooks must be called, for them to run."""
    first, hooks = decoders[0], ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(type(d) is nn.Linear and not any(getattr(d, hook) for hook in hooks) for d in decoders) and all(
        d.weight.shape == first.weight.shape and (d.bias is None) == (first.bias is None) for d in decoders
    )


def _stacked(layers: Sequence[nn.Linear], features: Tensor) -> Tensor:
    """(K, N, …, C) predictions of K linear layers. Each layer keeps parameters of its own, which are joined here."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    found = F.linear(features, weight, bias)
    # [None][0] changes nothing here. Backwards it copies, so the product gets its gradient row by row in memory. The
    # bias's sum over the samples is then rounded in the same order for any C.
    return found[None][0].unflatten(-1, (len(layers), -1)).movedim(-2, 0).contiguous()


def _check_features(backbone: nn.Module, features: Any, first: Tensor) -> None:
    """Check the features that a backbone returned.

    Args:
        backbone: the backbone, for its name and `out_features`.
        features: its output.
        first: its first input.

    Raises:
        ArchError: the features are not a tensor with a row for each sample. For linear decoders: the shape is not
            (N, out_features), or the dtype is not the inputs' dtype.
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
    device = first.device.type
    # Under autocast, features may be bf16. The device "meta", on which sizes are computed without memory, has none.
    mixed = device != "meta" and torch.is_autocast_enabled(device)
    if features.dtype != first.dtype and first.is_floating_point() and not mixed:
        given, wanted = (str(t.dtype).removeprefix("torch.") for t in (features, first))
        raise ArchError(f"{name} returned {given} features for {wanted} inputs; convert them to {wanted}")


def takes(model: Model, option: str) -> bool:
    """Whether the model's `forward` has an argument of this name, such as `views` or `run`."""
    return option in inspect.signature(model.forward).parameters


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def count_macs(model: nn.Module, batch: Batch) -> int:
    """Number of multiply-accumulates of a forward pass, in convolutions and linear layers.

    Args:
        model: stays as it was.
        batch: inputs of one sample.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with as_before(model), FlopCounterMode(display=False) as counter:
        model.eval()({name: value.to(device) for name, value in batch.items()})
    return counter.get_total_flops() // 2  # torch counts a multiply-accumulate as two operations
