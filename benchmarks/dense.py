"""A step of three dense tasks: ours, plain PyTorch loops, TorchJD and a LibMTL-like loop, on the same network.

    python benchmarks/dense.py                                  U-Net of width 8, 8 images of 96x72
    python benchmarks/dense.py --arch segnet --arch-width 16 --precision bf16 --device cuda --json dense.json

Segmentation (13 classes), depth and normals of random images, with Adam at 1e-4. What a step of each row includes,
apart from the forward pass, three losses, the backward pass and Adam:

    tutorial               reads each loss with `.item()`; torch's default memory layout and cuDNN settings
    plain loop             the same in our layout (--layout) and with cuDNN's search for the fastest kernels
    plain loop, metrics    the same, and LibMTL's training metrics: confusion matrix, depth errors, angles on the host
    ours, step             `mtl.Step`; reads nothing, as the engine reads its sums once an epoch
    ours, epoch            `Learner.train_epoch`, as train.py runs it: gathers and normalises uint8 images, adds up
                           losses and metrics, watches for divergence, reads the sums at the end of the epoch
    <method>: ours         as "ours, step", with the method
    …: ours, parallel      the same with `step.parallel`: one backward pass for all tasks
    torchjd …, loop        hand-written losses of the plain loop, and nothing read

All data is on the device before, and is normalised and in each loop's own format, except for "ours, epoch". The losses
of the plain loops are written by hand in the field's way. TorchJD's rows are left out without torchjd.

A first step of all ways is compared before: losses, and gradients of the network where the method draws nothing. If
they differ, nothing is measured. The ways then alternate within a round. Time is the median over the rounds. The ratio
is the median of those to the row "against" in the same round. Memory is the growth above data and model: of a process
of its own for each way, or of the GPU's allocator after the first step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from dense_data import Data, Metrics, by_hand
from files import write
from torch import Tensor
from ways import Compute, apart, autogram, autojac, detached, loop, peak_growth, ratios

from mtl.archs.model import HardSharing
from mtl.archs.segnet import SegNet
from mtl.archs.unet import UNet
from mtl.data.batches import TrainingBatches
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.engine.switches import Switches
from mtl.losses import Equal, PCGrad, UPGrad
from mtl.optim.schedules import Constant
from mtl.tracking.console import table

ARCHS = {"unet": UNet, "segnet": SegNet}
METHODS = {"equal": Equal, "pcgrad": PCGrad, "upgrad": UPGrad}
TORCHJD = {"pcgrad": "PCGrad", "upgrad": "UPGrad"}
# {key: (name in the table, key of the way it is compared with)}
WAYS = {
    "tutorial": ("tutorial", "plain"),
    "plain": ("plain loop", "plain"),
    "plain-metrics": ("plain loop, metrics", "plain"),
    "step": ("ours, step", "plain"),
    "epoch": ("ours, epoch", "plain-metrics"),
}
for method in TORCHJD:
    for kind, name in (("ours", "ours"), ("parallel", "ours, parallel"), ("autojac", "torchjd autojac"),
                       ("autogram", "torchjd autogram"), ("loop", "loop")):  # fmt: skip
        WAYS[f"{method}-{kind}"] = (f"{method}: {name}", f"{method}-ours")


@dataclass
class Way:
    """One contender.

    Attributes:
        train: train(n) makes n steps, and returns the T losses of the last one.
        model: what it trains.
    """

    train: Callable[[int], Sequence[Any]]
    model: HardSharing


def build(key: str, options: argparse.Namespace, data: Data) -> Way:
    """The way of this key in WAYS, always from the same initial weights.

    Raises:
        Exception: whatever TorchJD raises if it cannot use the network.
    """
    torch.manual_seed(0)
    method, _, kind = key.partition("-") if key.partition("-")[0] in TORCHJD else ("equal", "", key)
    tasks, layout = data.benchmark.tasks, "contiguous" if key == "tutorial" else options.layout
    execution = Execution(precision=options.precision, channels_last=layout == "channels_last")
    backbone = ARCHS[options.arch](3, options.arch_width)
    model = execution.place(HardSharing(backbone, tasks), data.device).train()
    optimizer = torch.optim.Adam([{"params": list(model.parameters()), "initial_lr": 1e-4}], lr=1e-4)
    strategy = METHODS[method]([task.name for task in tasks])
    if kind in ("step", "epoch", "ours", "parallel"):
        switches = Switches(parallel=len(tasks) if kind == "parallel" else 1)
        learner = Learner(execution, model, list(tasks), strategy, optimizer, Constant(), data.device, 0, switches)
        return Way(_epoch(learner, data) if kind == "epoch" else _steps(learner, data), model)

    batches = data.field(torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    current = [batches[0]]  # the batch of the next step

    def compute() -> tuple[Tensor, list[Tensor]]:
        image, *labels = current[0]
        with execution.autocast(data.device):
            features = model.backbone(image)
            predictions = [head(features) for head in model.heads.values()]
        predictions = [p.float() for p in predictions]
        if metrics is not None:
            metrics.update(predictions, labels)
        return features, by_hand(predictions, labels)

    metrics, step = None, plain(optimizer, compute)
    if kind == "plain-metrics":
        metrics = Metrics(data.device)
    elif kind == "loop":
        step = loop(model, optimizer, strategy, compute)
    elif kind in ("autojac", "autogram"):
        step = {"autojac": autojac, "autogram": autogram}[kind](model, optimizer, TORCHJD[method], compute)

    def train(steps: int) -> Sequence[Any]:
        with nullcontext() if kind == "tutorial" else execution.flags():
            for batch in batches[:steps]:
                current[0] = batch
                losses = step()
        return losses

    return Way(train, model)


def plain(optimizer: torch.optim.Optimizer, compute: Compute) -> Callable[[], list[float]]:
    """The step of a tutorial, with equal weights. It returns the T losses as numbers."""

    def step() -> list[float]:
        _, losses = compute()
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        return [loss.item() for loss in losses]

    return step


def _steps(learner: Learner, data: Data) -> Callable[[int], Sequence[Any]]:
    step = learner.step()

    def train(steps: int) -> Sequence[Any]:
        with learner.trainer.flags():
            for batch in data.ready[:steps]:
                info = step(learner.forward(batch, learner._groups.units(batch)), data.size)
        return detached(info.passes[0].values)

    return train


def _epoch(learner: Learner, data: Data) -> Callable[[int], Sequence[Any]]:
    batches: dict[int, TrainingBatches] = {}
    epoch = count()

    def train(steps: int) -> Sequence[Any]:
        if steps not in batches:
            split = data.split.select(slice(steps * data.size))
            batches[steps] = TrainingBatches(split, data.benchmark, data.device, seed=0)
        row = learner.train_epoch(batches[steps], next(epoch))
        return [row[f"train/{task.name}_loss"] for task in learner.tasks]

    return train


def chosen(options: argparse.Namespace) -> list[str]:
    """The keys of the ways to run. Without torchjd, its ways are left out, with one line."""
    keys = list(options.ways)
    if find_spec("torchjd") is None and any("auto" in key for key in keys):
        print("torchjd is not installed: its rows are left out")
        keys = [key for key in keys if "auto" not in key]
    return keys


class Differs(SystemExit):
    """Two ways do not compute the same."""


def check(keys: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """Compare the first step of all ways, in fp32 and without TF32.

    Returns:
        {key: message} of the ways that cannot use the network, or not in this precision.

    Raises:
        Differs: the losses of two ways differ by more than 1e-4 of their size, or the gradients of the shared
            parameters by more than 1e-2 of their norm.
    """
    exact = argparse.Namespace(**{**vars(options), "precision": "fp32"})
    data, found, refused = Data(exact, 1), {}, {}
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        for key in dict.fromkeys(["plain", *keys]):
            try:
                found[key] = first_step(key, exact, data)
                if "auto" in key and options.precision != "fp32":
                    first_step(key, options, data)
            except Exception as error:
                if "auto" not in key and "parallel" not in key:
                    raise
                refused[key] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    for key, (losses, gradient) in found.items():
        if not torch.allclose(losses, found["plain"][0], rtol=1e-4, atol=0):
            raise Differs(f"{key}: losses {losses.tolist()}, but the plain loop's are {found['plain'][0].tolist()}")
        method = key.partition("-")[0]
        against = f"{method}-ours" if method in TORCHJD else "plain"
        if against not in found or (method == "pcgrad" and "auto" in key):  # TorchJD draws another order of the tasks
            continue
        wanted = found[against][1]
        distance = ((gradient - wanted).norm() / wanted.norm()).item()
        if not distance <= 1e-2:
            raise Differs(f"{key}: its gradient differs from that of {against} by {distance:.1e} of the norm")
    return refused


def first_step(key: str, options: argparse.Namespace, data: Data) -> tuple[Tensor, Tensor]:
    """(T,) losses of a way's first step, and the gradient of its shared parameters, on the host."""
    way = build(key, options, data)
    losses = torch.tensor([float(loss) for loss in way.train(1)])
    return losses, torch.cat([p.grad.flatten() for p in way.model.backbone.parameters()]).cpu()


def memory(key: str, options: argparse.Namespace) -> float:
    """MiB by which memory grows above data and model in the first three steps."""
    gc.collect()  # what an earlier way has left must not be freed while this one is measured
    data = Data(options, min(2, options.steps))
    way = build(key, options, data)
    return peak_growth(lambda: way.train(1), lambda: way.train(len(data.ready)), data.device)


def times(ways: Mapping[str, Way], options: argparse.Namespace) -> dict[str, list[float]]:
    """{key: seconds a step, in each round}. The ways alternate; the first round warms up."""
    found: dict[str, list[float]] = {key: [] for key in ways}
    wait = partial(torch.cuda.synchronize, options.device) if options.device != "cpu" else lambda: None
    for number in range(options.rounds + 1):
        for key, way in ways.items():
            wait()
            started = time.perf_counter()
            way.train(options.steps)
            wait()
            if number:
                found[key].append((time.perf_counter() - started) / options.steps)
    return found


def rows(keys: Sequence[str], seconds: Mapping[str, list[float]], mib: Mapping[str, float | None],
         refused: Mapping[str, str]) -> list[dict[str, Any]]:  # fmt: skip
    """The results as plain Python values."""
    result = []
    for key in keys:
        name, against = WAYS[key]
        own = seconds.get(key)
        result.append(
            {
                "way": name,
                "key": key,
                "step_ms": 1e3 * statistics.median(own) if own else None,
                "against": WAYS[against][0],
                "x": ratios(own, seconds[against]) if own and against in seconds else None,
                "memory_mib": mib.get(key),
                "refused": refused.get(key),
            }
        )
    return result


def _table(found: Sequence[dict[str, Any]]) -> str:
    body = []
    for row in found:
        x, mib = row["x"], row["memory_mib"]
        body.append([
            row["way"], f"{row['step_ms']:.1f}" if row["step_ms"] else "–", f"{x['median']:.2f}" if x else "–",
            f"{x['lowest']:.2f}–{x['highest']:.2f}" if x else "–", row["against"], f"{mib:.0f}" if mib else "–",
        ])  # fmt: skip
    return table(["way", "ms a step", "x", "lowest–highest", "against", "peak MiB more"], body)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=72)
    parser.add_argument("--arch", default="unet", choices=list(ARCHS))
    parser.add_argument("--arch-width", type=int, default=8, help="channels of the first convolution")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--layout", default="channels_last", choices=["channels_last", "contiguous"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY",
                        help=", ".join(WAYS))  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", choices=list(WAYS), help=argparse.SUPPRESS)  # one way's memory, as JSON
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.only:
        print(json.dumps({"mib": memory(options.only, options)}))
        return
    about = (
        f"{options.arch} of width {options.arch_width}, {options.batch} images of {options.height}x{options.width}, "
    )
    about += f"{options.precision}, {options.layout}, {options.steps} steps a round, {options.rounds} rounds, "
    about += f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(about, flush=True)
    keys, mib = chosen(options), {}
    if options.device == "cpu":
        # First of all: a process inherits the peak of the one that starts it.
        for key in keys:
            mib[key] = (apart(__file__, [key], WAYS[key][0]) or {}).get("mib")
    refused = check(keys, options)
    for key, message in refused.items():
        print(f"{WAYS[key][0]} cannot be used: {message}")
    able = [key for key in keys if key not in refused]
    if options.device != "cpu":
        mib = {key: memory(key, options) for key in able}
    data = Data(options, options.steps)
    seconds = times({key: build(key, options, data) for key in able}, options)
    found = rows(keys, seconds, mib, refused)
    if options.json:
        write(options.json, {"about": about, "rows": found})
    print(_table(found))


if __name__ == "__main__":
    main()
