"""A step with UPGrad at T = 2, 11 and 40 alike tasks: ours, TorchJD (autojac and autogram) and a LibMTL-like loop.

    python benchmarks/many_tasks.py                     prints a table; needs torchjd for its two columns
    python benchmarks/many_tasks.py --tasks 2 40 --steps 5 --device cuda
    python benchmarks/many_tasks.py --tasks 40 --arch celeba_cnn --size 64 --steps 1 --ways forward ours 2 4 8 16

A number as a way is ours with so many chunks (`step.chunks`), which take less memory.
All train one network on the same random images, with one linear head a task and binary cross-entropy. Each way runs in
a process of its own, because peak memory is that of a process (on a GPU, of its allocator). Time is the median of the
steps. The LibMTL-like loop calls each head and loss by itself, and copies each task's gradients into a matrix.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import mtl
from mtl.archs.celeba_cnn import CelebACNN
from mtl.archs.model import HardSharing
from mtl.archs.resnet import ResNet
from mtl.engine.switches import Switches
from mtl.losses import UPGrad
from mtl.tasks import alike
from mtl.tasks.binary import Binary
from mtl.tasks.groups import Groups
from mtl.tracking.console import table

WAYS = ("forward", "ours", "ours, tasks apart", "torchjd autojac", "torchjd autogram", "loop")
NETWORKS = {"resnet20": lambda: ResNet(3, 20), "celeba_cnn": lambda: CelebACNN(3)}


def make(way: str, tasks: int, options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """One step of a way."""
    torch.manual_seed(0)
    batch, size = options.batch, options.size
    names = [f"t{i}" for i in range(tasks)]
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(2, (batch, tasks), device=device)
    kinds = alike(Binary, names, target="y")
    if way.isdigit():
        way, chunks = "ours", int(way)
    else:
        chunks = 1
    if way == "ours, tasks apart":
        kinds = tuple(Binary(name) for name in names)
    labels = {"y": y, **{name: y[:, i].contiguous() for i, name in enumerate(names)}}
    model, groups = HardSharing(NETWORKS[options.arch](), kinds).to(device), Groups(kinds)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def losses_of(part: slice = slice(None)) -> list[Tensor]:
        piece = {name: column[part] for name, column in labels.items()}
        return groups.losses(model({"image": x[part]}).predictions, piece)

    def loop_losses() -> tuple[Tensor, list[Tensor]]:
        features = model.backbone(x)
        outputs = [head(features) for head in model.heads.values()]
        return features, [F.binary_cross_entropy_with_logits(o[:, 0], y[:, i].float()) for i, o in enumerate(outputs)]

    if way == "forward":
        return lambda: torch.stack(losses_of()).sum().backward()
    if way.startswith("ours"):
        heads = [list(model.own_parameters(name)) for name in names]
        step = mtl.Step(UPGrad(names), optimizer, model.backbone, heads, model=model, switches=Switches(chunks=chunks))
        return lambda: step(losses_of, batch)
    if way == "loop":
        shared, strategy = list(model.backbone.parameters()), UPGrad(names)

        def loop() -> None:
            optimizer.zero_grad()
            _, losses = loop_losses()
            rows = torch.zeros(tasks, sum(p.numel() for p in shared), device=device)
            for i, loss in enumerate(losses):
                found = torch.autograd.grad(loss, shared, retain_graph=True)
                rows[i] = torch.cat([g.flatten() for g in found])
            sum(losses).backward()  # the heads' gradients, as LibMTL takes them
            with torch.no_grad():
                merged = strategy.weights(rows @ rows.T).to(rows) @ rows
                for p, g in zip(shared, merged.split([p.numel() for p in shared]), strict=True):
                    p.grad = g.view_as(p)
            optimizer.step()

        return loop
    from torchjd.aggregation import UPGrad as TheirUPGrad
    from torchjd.aggregation import UPGradWeighting
    from torchjd.autogram import Engine
    from torchjd.autojac import jac_to_grad, mtl_backward

    def autojac() -> None:
        optimizer.zero_grad()
        features, losses = loop_losses()
        mtl_backward(losses, features=features)
        jac_to_grad(list(model.backbone.parameters()), TheirUPGrad())
        optimizer.step()

    if way == "torchjd autojac":
        return autojac
    engine, weighting = Engine(model.backbone, batch_dim=None), UPGradWeighting()

    def autogram() -> None:
        optimizer.zero_grad()
        losses = torch.stack(loop_losses()[1])
        losses.backward(weighting(engine.compute_gramian(losses)))
        optimizer.step()

    return autogram


def measure(way: str, tasks: int, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and peak memory above that before the first step, in MiB."""
    device, seconds = torch.device(options.device), []
    step = make(way, tasks, options, device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(options.steps + 1):  # the first one warms up
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": statistics.median(seconds[1:]), "mib": peak}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--tasks", type=int, nargs="+", default=[2, 11, 40])
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--size", type=int, default=32)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--arch", default="resnet20", choices=NETWORKS)
    arguments.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY")
    arguments.add_argument("--only", nargs=2, metavar=("WAY", "T"), help=argparse.SUPPRESS)  # one measurement, as JSON
    options = arguments.parse_args()
    if options.only:
        print(json.dumps(measure(options.only[0], int(options.only[1]), options)))
        return
    rows = []
    for tasks in options.tasks:
        found = {}
        for way in options.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", way, str(tasks)]
            done = subprocess.run(command, capture_output=True, text=True)
            found[way] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
            if done.returncode:
                print(f"{way}, {tasks} tasks: {done.stderr.strip().splitlines()[-1][:160]}", file=sys.stderr)
        ours = found.get("ours")
        for way, one in found.items():
            if one is None or ours is None:
                rows.append([str(tasks), way, "–", "–", "–"])
            else:
                rows.append([str(tasks), way, f"{1000 * one['seconds']:.0f}", f"{one['seconds'] / ours['seconds']:.2f}",
                             f"{one['mib']:.0f}"])  # fmt: skip
    print(table(["tasks", "way", "ms a step", "x ours", "peak MiB more"], rows))


if __name__ == "__main__":
    main()
