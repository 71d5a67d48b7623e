"""A step adds few operations to its passes. On a GPU, a small network waits for each of them to be launched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_alike import Calls
from torch import Tensor, nn

import mtl
from mtl.archs.model import HardSharing
from mtl.archs.resnet import ResNet
from mtl.archs.unet import UNet
from mtl.losses import PCGrad
from mtl.metrics.tally import Tally
from mtl.tasks import Depth, Normals, Segmentation, Task, alike
from mtl.tasks.binary import Binary
from mtl.tasks.groups import Groups

N = 4


def network(name: str) -> tuple[nn.Module, tuple[Task, ...], dict[str, Tensor]]:
    """A backbone, its tasks, and a batch of them."""
    draws = torch.Generator().manual_seed(0)
    if name == "resnet20":
        labels = {"y": torch.randint(2, (N, 2), generator=draws)}
        return ResNet(3, 20), alike(Binary, ["a", "b"], target="y"), {"image": torch.randn(N, 3, 8, 8), **labels}
    shape, tasks = (N, 16, 16), (Segmentation("segmentation", 5), Depth("depth"), Normals("normals"))
    labels = {"segmentation": torch.randint(5, shape, generator=draws), "depth": torch.ones(shape)}
    labels["normals"] = torch.ones(*shape, 3)
    return UNet(3, 2), tasks, {"image": torch.randn(N, 3, 16, 16), **labels}


@pytest.mark.parametrize(("name", "most"), [("resnet20", 410), ("unet", 460)])
def test_a_gradient_method_adds_few_operations(name, most):
    """To forward pass, T backward passes and optimizer. Most of the rest are views of the 61 shared parameters."""
    backbone, tasks, batch = network(name)
    model, groups, names = HardSharing(backbone, tasks), Groups(tasks), [task.name for task in tasks]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    heads = [list(model.own_parameters(name)) for name in names]
    step = mtl.Step(PCGrad(names), optimizer, model.backbone, heads, model=model)
    shared, every = list(model.backbone.parameters()), list(model.parameters())
    gradients = [torch.zeros_like(p) for p in every]

    def forward(part: slice) -> list[Tensor]:
        return groups.losses(model({key: column[part] for key, column in batch.items()}).predictions, batch)

    def bare() -> None:
        for loss in forward(slice(N)):
            torch.autograd.grad(loss, shared, retain_graph=True)
        for p, gradient in zip(every, gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    for _ in range(2):  # these also check the graphs
        step(forward, N)
    ours, needed = operations(lambda: step(forward, N)), operations(bare)
    assert ours - needed <= most, (ours, needed)


def test_an_epochs_sums_grow_in_one_operation():
    values = {name: torch.tensor(2.0, dtype=dtype) for name, dtype in (("a", torch.float32), ("b", torch.float64))}
    values["c"] = torch.arange(3)
    tally = Tally()
    tally.add_all(values)
    values["new"] = torch.ones(2)
    with Calls() as calls:
        tally.add_all(values)
    assert [name for name in calls.names if "add" in name] == ["_foreach_add_.List"]
    found = {name: value.tolist() for name, value in tally.read().items()}
    assert found == {"a": 4, "b": 4, "c": [0, 2, 4], "new": [1, 1]}


def operations(function: Callable[[], object]) -> int:
    """The number of operations that reach the device."""
    with Calls() as calls:
        function()
    return sum(calls.names.values())
