"""`step.parallel`: the gradients of several tasks from one backward pass."""

from __future__ import annotations

import pytest
import torch
from test_chunks import T, a_step
from torch import Tensor, nn

import mtl
from mtl.engine.switches import Switches
from mtl.losses import MGDA, FairGrad, GradDrop, MoDo, PCGrad, Uncertainty, UPGrad


@pytest.mark.parametrize("parallel", [2, 100])
@pytest.mark.parametrize(("kind", "options"), [
    (MGDA, {}), (PCGrad, {}), (UPGrad, {}), (GradDrop, {}), (MoDo, {}),
    (Uncertainty, {"switches": {"scale": "norm"}}), (UPGrad, {"present": [True, False, True, True, True]}),
    (PCGrad, {"scale": 1024.0}), (FairGrad, {"switches": {"transform": "log"}}),
    (FairGrad, {"chunks": 3}),
])  # fmt: skip
def test_a_step_with_passes_for_several_tasks_equals_one_with_a_pass_for_each(kind, options, parallel):
    """In float64. A hundred are more than there are tasks; two leave a last pass for the fifth task alone."""
    extra = options.get("switches", {})
    whole, expected = a_step(kind(T), **{"chunks": 1, **options, "switches": dict(extra)})
    info, found = a_step(kind(T), **{"chunks": 1, **options, "switches": {**extra, "parallel": parallel}})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for name in ("weights", "norm", "ratio", "cosine", "conflict", "magnitude"):
        torch.testing.assert_close(getattr(info, name), getattr(whole, name), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("parallel", "count"), [(1, 6), (3, 2), (6, 1)])
def test_a_layer_is_run_once_for_all_tasks_of_a_pass(parallel, count):
    shared, heads = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), [nn.Linear(4, 1) for _ in range(6)]
    features = shared(torch.randn(2, 3))
    losses = [head(features).square().mean() for head in heads]
    passes = []
    features.register_hook(lambda gradient: passes.append(1))
    mtl.backward(losses, UPGrad(6), shared, heads, switches=Switches(parallel=parallel))
    assert len(passes) == count


@pytest.mark.parametrize("unused", [False, True])
def test_half_precision_has_the_gradients_of_one_pass_for_each_task(unused):
    """Batch norm in bf16 mixes two precisions, for which torch.vmap has no rule."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    heads = [nn.Linear(64, 1) for _ in range(3)]
    if unused:
        shared.register_parameter("spare", nn.Parameter(torch.ones(2)))
    found = []
    for parallel in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            features = shared(torch.randn(5, 3, 8, 8))
            losses = [head(features).float().square().mean() for head in heads]
        mtl.backward(losses, UPGrad(3), shared, heads, switches=Switches(parallel=parallel))
        found.append([p.grad for module in (shared, *heads) for p in module.parameters()])
        shared.zero_grad(), [head.zero_grad() for head in heads]
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
    assert found[0][-1].abs().sum() > 0


class Opaque(torch.autograd.Function):
    """A user's function that torch cannot run for several gradients at once."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, gradient.sum().item())


def test_a_network_that_cannot_be_batched_is_refused_in_one_line():
    shared, heads = nn.Linear(3, 3), [nn.Linear(3, 1) for _ in range(2)]
    features = Opaque.apply(shared(torch.randn(4, 3)))
    losses = [head(features).square().mean() for head in heads]
    with pytest.raises(ValueError, match=r"^parallel=2: torch cannot run .* at once \(.*\); use parallel=1$"):
        mtl.backward(losses, UPGrad(2), shared, heads, switches=Switches(parallel=2))
    assert all(p.grad is None for p in shared.parameters())


def test_loss_weighting_makes_one_pass_anyway():
    """So a grid of both families may name the options once."""
    expected = a_step(Uncertainty(T), 1)[1]
    found = a_step(Uncertainty(T), 3, switches={"parallel": 4})[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match=r"parallel=0: must be an integer from 1"):
        Switches(parallel=0)
