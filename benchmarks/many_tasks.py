"""A step with UPGrad at T = 2, 11 and 40 alike tasks: ours, TorchJD (autojac and autogram) and a LibMTL-like loop.

    python benchmarks/many_tasks.py                     prints a table; needs torchjd for its two columns
    python benchmarks/many_tasks.py --tasks 2 40 --steps 5 --device cuda
    python benchmarks/many_tasks.py --tasks 40 --arch celeba_cnn --size 64 --steps 1 --ways ours chunks-2 chunks-8

"ours, parallel" takes the gradients of all tasks in one backward pass (`step.parallel`). chunks-8 is ours with
`step.chunks=8`, which takes less memory.
All train one network on the same random images, with one linear head a task and binary cross-entropy. On a CPU each way
runs in a process of its own, because peak memory is that of a process. On a GPU it is that of the allocator, and all
ways run in one process. Time is the median of the steps. The LibMTL-like loop calls each head and loss by itself, and
copies each task's gradients into a matrix.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from ways import apart, autogram, autojac, loop, peak_growth

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

WAYS = ("forward", "ours", "ours, parallel", "ours, tasks apart", "torchjd autojac", "torchjd autogram", "loop")
NETWORKS = {"resnet20": lambda: ResNet(3, 20), "celeba_cnn": lambda: CelebACNN(3)}


def make(way: str, tasks: int, options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """One step of a way."""
    torch.manual_seed(0)
    batch, size = options.batch, options.size
    names = [f"t{i}" for i in range(tasks)]
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(2, (batch, tasks), device=device)
    kinds = alike(Binary, names, target="y")
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
    if way.startswith(("ours", "chunks-")):
        chunks = int(way.removeprefix("chunks-")) if way.startswith("chunks-") else 1
        switches = Switches(chunks=chunks, parallel=tasks if way == "ours, parallel" else 1)
        heads = [list(model.own_parameters(name)) for name in names]
        step = mtl.Step(UPGrad(names), optimizer, model.backbone, heads, model=model, switches=switches)
        return lambda: step(losses_of, batch)
    if way == "loop":
        return loop(model, optimizer, UPGrad(names), loop_losses)
    return {"torchjd autojac": autojac, "torchjd autogram": autogram}[way](model, optimizer, "UPGrad", loop_losses)


def measure(way: str, tasks: int, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and peak memory above that before the first step, in MiB."""
    device, seconds = torch.device(options.device), []
    step = make(way, tasks, options, device)

    def steps() -> None:
        for _ in range(options.steps):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)

    peak = peak_growth(step, steps, device)
    return {"seconds": statistics.median(seconds), "mib": peak}


def here(way: str, tasks: int, options: argparse.Namespace) -> dict[str, float] | None:
    """As `measure`. If another package refuses, the answer is None and its message is printed."""
    try:
        return measure(way, tasks, options)
    except Exception as error:
        print(f"{way}, {tasks} tasks: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr)
        return None
    finally:
        gc.collect()  # what this way has left must not be freed while the next one is measured


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
            if torch.device(options.device).type == "cuda":
                found[way] = here(way, tasks, options)
            else:
                found[way] = apart(__file__, [way, str(tasks)], f"{way}, {tasks} tasks")
        ours = found.get("ours")
        for way, one in found.items():
            if one is None or ours is None:
                rows.append([str(tasks), way, "–", "–", "–"])
            else:
                rows.append([str(tasks), way, f"{1000 * one['seconds']:.1f}", f"{one['seconds'] / ours['seconds']:.2f}",
                             f"{one['mib']:.0f}"])  # fmt: skip
    print(table(["tasks", "way", "ms a step", "x ours", "peak MiB more"], rows))


if __name__ == "__main__":
    main()
