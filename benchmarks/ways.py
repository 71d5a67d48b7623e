"""What many_tasks.py and dense.py share: steps as other libraries make them, peak memory, ratios of times."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mtl.archs.model import HardSharing
from mtl.losses import GramianWeighting

Compute = Callable[[], tuple[Tensor, list[Tensor]]]  # a forward pass: the shared features, and the T losses
OneStep = Callable[[], list[Tensor]]  # an update; it returns the T losses


def loop(model: HardSharing, optimizer: torch.optim.Optimizer, strategy: GramianWeighting, compute: Compute) -> OneStep:
    """As LibMTL: a backward pass for each task, whose shared gradients are copied into a matrix."""
    shared = list(model.backbone.parameters())
    sizes = [p.numel() for p in shared]

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        _, losses = compute()
        rows = torch.zeros(len(losses), sum(sizes), device=shared[0].device)
        for i, loss in enumerate(losses):
            loss.backward(retain_graph=i + 1 < len(losses))  # the head keeps its gradient
            rows[i] = torch.cat([p.grad.flatten() for p in shared])
            for p in shared:
                p.grad = None
        with torch.no_grad():
            merged = strategy.weights(rows @ rows.T).to(rows) @ rows
            for p, g in zip(shared, merged.split(sizes), strict=True):
                p.grad = g.view_as(p)
        optimizer.step()
        return detached(losses)

    return step


def autojac(model: HardSharing, optimizer: torch.optim.Optimizer, method: str, compute: Compute) -> OneStep:
    """TorchJD's autojac: the Jacobian, and an aggregator of it. `method` is a class of torchjd.aggregation."""
    from torchjd import aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = getattr(aggregation, method)()

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        features, losses = compute()
        mtl_backward(losses, features=features)
        jac_to_grad(list(model.backbone.parameters()), aggregator)
        optimizer.step()
        return detached(losses)

    return step


def autogram(model: HardSharing, optimizer: torch.optim.Optimizer, method: str, compute: Compute) -> OneStep:
    """TorchJD's autogram: the Gramian without the Jacobian. It weighs the heads' gradients, too."""
    from torchjd import aggregation
    from torchjd.autogram import Engine

    # Batch norm mixes the samples of a batch. So no dimension of the features may be treated as independent samples.
    engine, weighting = Engine(model.backbone, batch_dim=None), getattr(aggregation, f"{method}Weighting")()

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        losses = torch.stack(compute()[1])
        losses.backward(weighting(engine.compute_gramian(losses)))
        optimizer.step()
        return detached(losses)

    return step


def detached(losses: Iterable[Tensor]) -> list[Tensor]:
    """The losses without their graphs, which hold the activations."""
    return [loss.detach() for loss in losses]


def peak_growth(warm_up: Callable[[], object], work: Callable[[], object], device: torch.device) -> float:
    """MiB by which memory grows at most: of the process, or of the GPU's allocator.

    On a GPU, the peak during the warm-up does not count: cuDNN then tries kernels that need more memory. On a CPU, only
    a process that has done nothing else before gives a meaningful figure.
    """
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) / 2**20 if on_gpu else _peak_of_process()
    warm_up()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    work()
    return (torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else _peak_of_process()) - before


def _peak_of_process() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float] | None:
    """Median and range of the ratios, over the rounds that both loops have; None if there is no such round."""
    each = [n / d for n, d in zip(numerator, denominator, strict=False)]
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)} if each else None


def apart(file: str, only: Sequence[str], name: str) -> dict[str, float] | None:
    """Run this command line again in a process of its own, with `--only` and its values.

    Args:
        file: the benchmark.
        only: values of `--only`.
        name: of the measurement, for the message if it fails.

    Returns:
        the JSON of the last line that the process prints; None if it fails.
    """
    command = [sys.executable, file, *sys.argv[1:], "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}", file=sys.stderr)
    return None
