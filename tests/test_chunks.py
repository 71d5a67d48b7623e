"""`step.chunks`: the same step without the whole Jacobian in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mtl
from mtl.engine.switches import Switches
from mtl.losses import MGDA, FairGrad, GradDrop, MoDo, NashMTL, PCGrad, SDMGrad, Strategy, Uncertainty, UPGrad

T, N = 5, 12


def network() -> tuple[nn.Module, list[nn.Module]]:
    """Shared layers with batch norm and dropout. The last task skips the upper layer: it does not reach all chunks."""
    torch.manual_seed(0)
    lower = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3))
    upper = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
    shared = nn.ModuleDict({"lower": lower, "upper": upper}).double()
    return shared, [nn.Linear(6 if t == T - 1 else 7, 1).double() for t in range(T)]


def a_step(strategy: Strategy, chunks: int, **options) -> tuple[mtl.engine.switches.Info, list[Tensor]]:
    """The report and the gradients of all parameters; two steps, so that a state has an effect."""
    shared, heads = network()
    switches = Switches(chunks=chunks, **options.pop("switches", {}))
    strategy.epoch_start(0, 1, 0)
    for _ in range(2):
        batches = []
        for _ in range(strategy.samples):
            z = shared["lower"](torch.randn(N, 4).double())
            features = [shared["upper"](z)] * (T - 1) + [z]
            batches.append([(h(f) - t).square().mean() for t, (h, f) in enumerate(zip(heads, features, strict=True))])
        for p in (*shared.parameters(), *(p for h in heads for p in h.parameters())):
            p.grad = None
        losses = batches if strategy.samples > 1 else batches[0]
        info = mtl.backward(losses, strategy, shared, heads, switches=switches, **options)
        torch.optim.SGD(shared.parameters(), lr=0.1).step()
    return info, [p.grad for p in (*shared.parameters(), *(p for h in heads for p in h.parameters()))]


@pytest.mark.parametrize("chunks", [2, 9, 1000])
@pytest.mark.parametrize(("kind", "options"), [
    (MGDA, {}), (PCGrad, {}), (UPGrad, {}), (NashMTL, {}), (FairGrad, {}), (SDMGrad, {}), (MoDo, {}),
    (Uncertainty, {"switches": {"scale": "norm"}}), (MGDA, {"switches": {"scale": "sum", "heads": "weighted"}}),
    (UPGrad, {"present": [True, False, True, True, True]}), (PCGrad, {"scale": 1024.0}),
    (FairGrad, {"switches": {"transform": "log"}}),
])  # fmt: skip
def test_a_step_in_chunks_equals_the_whole_one(kind, options, chunks):
    """In float64. A thousand chunks are more than there are columns."""
    whole, expected = a_step(kind(T), 1, **options)
    info, found = a_step(kind(T), chunks, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for name in ("weights", "norm", "ratio", "cosine", "conflict", "magnitude"):
        torch.testing.assert_close(getattr(info, name), getattr(whole, name), rtol=1e-9, atol=1e-11)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else [made]:
            self.elements = max(self.elements, one.numel() if isinstance(one, Tensor) else 0)
        return made


@pytest.mark.parametrize(("chunks", "rows"), [(1, 20), (4, 5)])
def test_no_more_than_one_chunk_is_held(chunks, rows):
    """Of twenty gradients of a network, whose largest layer is nearly all of it."""
    shared, heads = nn.Sequential(nn.Linear(9, 100), nn.Linear(100, 9)), [nn.Linear(9, 1) for _ in range(20)]
    features, size = shared(torch.randn(2, 9)), sum(p.numel() for p in shared.parameters())
    with Largest() as largest:
        losses = [h(features).square().mean() for h in heads]
        mtl.backward(losses, UPGrad(20), shared, heads, switches=Switches(chunks=chunks))
    assert rows * size <= largest.elements < rows * size + 20


@pytest.mark.parametrize(("strategy", "options", "message"), [
    (GradDrop(2), {}, r"chunks=4: GradDrop merges whole gradients and needs all of them at once; drop it, or choose"),
    (MGDA(2), {"gradients": "features"}, r"chunks=4: gradients of features are small, and come in one piece; drop it"),
])  # fmt: skip
def test_a_method_that_cannot_use_chunks_is_refused(strategy, options, message):
    with pytest.raises(ValueError, match=message):
        Switches(chunks=4, **options).check(strategy)


@pytest.mark.parametrize("chunks", [0, -1, 1.5, True, "4"])
def test_a_number_of_chunks_is_an_integer_from_one(chunks):
    with pytest.raises(ValueError, match=rf"chunks={chunks!r}: must be an integer from 1"):
        Switches(chunks=chunks)


class Hidden(torch.autograd.Function):
    """Its backward adds to `.grad` of a layer that the graph does not show."""

    layer: nn.Module

    @staticmethod
    def forward(ctx, x: Tensor, shown: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = Hidden.layer if shown else None
        return Hidden.layer(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            Hidden.layer(x).backward(gradient)
        return x.grad, None


@pytest.mark.parametrize("shown", [True, False])
def test_functions_that_hide_parameters_are_refused(shown):
    """If the function shows the layer, the first check finds it. Otherwise its gradient does."""
    Hidden.layer = nn.Linear(3, 3)
    shared, heads = nn.ModuleList([nn.Linear(3, 3), Hidden.layer]), [nn.Linear(3, 1) for _ in range(2)]
    features = Hidden.apply(shared[0](torch.randn(4, 3)), shown)
    losses = [h(features).square().mean() for h in heads]
    with pytest.raises(ValueError, match="chunks=2: a custom autograd function"):
        mtl.backward(losses, UPGrad(2), shared, heads, switches=Switches(chunks=2))
    assert all(p.grad is None for p in shared.parameters())


def test_a_run_in_chunks_with_the_microscope(cli):
    """The command line takes the option. The microscope then computes its own Jacobian."""
    words = ("data=digits", "arch=mlp", "data.limit_train=64", "data.limit_test=30", "data.batch_size=32",
             "trainer.epochs=1", "microscope.every=1", "microscope.samples=0", "logger=none", "trainer.device=cpu",
             "loss=mgda")  # fmt: skip
    done = cli(*words, "step.chunks=3")
    assert done.code == 0, done.err
    (row,) = Path("outputs").rglob("metrics.jsonl")
    assert "micro/tasks/cosine/all" in row.read_text()
    wrong = cli(*words, "step.chunks=0")
    assert wrong.code != 0 and "step.chunks=0: must be greater than or equal to 1" in wrong.err
