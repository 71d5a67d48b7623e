"""Images per second of the whole training loop against a plain PyTorch loop, side by side in one run.

    python benchmarks/throughput.py                              ResNet-20, 20 steps of 128 images, 3 rounds
    python benchmarks/throughput.py --arch resnet56 --steps 10
    python benchmarks/throughput.py --in-memory --layouts channels_last contiguous --seconds 60 --json times.json

The plain loop is the one of a tutorial. PIL images go through torchvision's RandomCrop, flip, ToTensor and Normalize
in a DataLoader with two workers. The model is eager fp32 in the default layout, with SGD and equal weighting. Our loop
is `Learner.train_epoch`, as train.py runs it. The loops alternate within a round, so that a change of the machine's
pace affects all of them. The table gives medians of the speeds, and of the ratios to the plain loop of the same round.

`--in-memory` adds a plain loop for each precision and layout. Its normalised images lie on the device and are not
augmented. It shows what our step costs, because a fast GPU waits for the tutorial's loader.

The last row is an upper bound: only the network's convolutions, forward and backward, layer by layer in the layout of
our loop. No fp32 loop that calls the same kernels can be faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from files import write
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from ways import ratios

from mtl.archs.model import HardSharing
from mtl.cli.command import CONF
from mtl.config import schema
from mtl.data.batches import TrainingBatches
from mtl.data.synthetic import Synthetic
from mtl.engine.build import assemble
from mtl.engine.device import Execution
from mtl.tracking.console import table

BATCH = 128
REFERENCE = "plain PyTorch loop, fp32"
Epoch = Callable[[], float]  # trains one epoch and returns the seconds that it took


def ours(
    arch: str, loss: str, precision: str, images: int, device: str, more: Sequence[str] = (), batch: int = BATCH
) -> Epoch:
    """A function that trains one epoch of `images` images with our loop and returns the seconds that it took."""
    overrides = ["data=synthetic", f"data.train_size={images}", "data.test_size=1", f"arch={arch}", f"loss={loss}"]
    overrides += [f"trainer.precision={precision}", f"trainer.device={device}", f"data.batch_size={batch}"]
    overrides += more
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True)
    benchmark, learner = assemble(config)
    batches = TrainingBatches(benchmark.splits()["train"], benchmark, learner.device, seed=0)
    return lambda: learner.train_epoch(batches, 0)["time/seconds"]


class Pictures(Dataset):
    """PIL images with two labels, augmented one by one."""

    def __init__(self, images: int):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self.pictures = [transforms.functional.to_pil_image(p) for p in pixels]
        self.fine = torch.randint(0, 100, (images,), generator=generator)
        normalise = transforms.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int):
        return self.transform(self.pictures[i]), self.fine[i], self.fine[i] // 5


def backbone(arch: str) -> torch.nn.Module:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose("config", ["data=synthetic", f"arch={arch}"]), resolve=True)["arch"]
    return schema.build(node, "arch", in_channels=3)


def plain(arch: str, images: int, device: str, batch: int = BATCH) -> Epoch:
    """As `ours`, for the tutorial's loop."""
    model = HardSharing(backbone(arch), Synthetic.tasks).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(Pictures(images), batch, shuffle=True, num_workers=2, persistent_workers=True)

    def epoch() -> float:
        started = time.perf_counter()
        for x, fine, coarse in loader:
            a, b = model({"image": x.to(device)}).predictions
            loss = F.cross_entropy(a, fine.to(device)) + F.cross_entropy(b, coarse.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # on a GPU, wait for the last step
        return time.perf_counter() - started

    return epoch


def in_memory(arch: str, precision: str, layout: str, images: int, device: str, batch: int = BATCH) -> Epoch:
    """As `ours`, for a plain loop whose normalised images are on the device."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = HardSharing(backbone(arch), Synthetic.tasks).to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(images, 3, 32, 32, generator=generator).to(device)
    fine = torch.randint(0, 100, (images,), generator=generator).to(device)

    def epoch() -> float:
        started = time.perf_counter()
        for chosen in torch.randperm(images, device=device).split(batch):
            x, y = pictures[chosen].to(memory_format=memory_format), fine[chosen]
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
                a, b = model({"image": x}).predictions
            loss = F.cross_entropy(a.float(), y) + F.cross_entropy(b.float(), y // 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # on a GPU, wait for the last step
        return time.perf_counter() - started

    return epoch


def convolutions(arch: str, images: int, device: str, batch: int = BATCH) -> Epoch:
    """As `ours`, for the backbone's convolutions only."""
    network = backbone(arch).to(device, memory_format=torch.channels_last)
    layers = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, inputs, y: layers.append((m, inputs[0].detach(), y.detach())))
    first = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    network(first)
    # The inputs of all layers need a gradient, except those of the first layer, which are the images.
    layers = [(m.forward, x.requires_grad_(x.shape[1] > 3), m.weight, torch.randn_like(y)) for m, x, y in layers]

    def epoch() -> float:
        started = time.perf_counter()
        for forward, x, weight, gradient in layers:
            wanted = [weight, x] if x.requires_grad else [weight]
            for _ in range(images // batch):
                torch.autograd.grad(forward(x), wanted, gradient)
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return epoch


@dataclass
class Loop:
    """One contender.

    Attributes:
        name: name of its row.
        epoch: trains one epoch and returns the seconds that it took.
        bare: name of the plain loop in memory with the same precision and layout, if there is one.
        seconds: seconds of each round, without the warm-up.
        memory: peak bytes on the GPU during an epoch, minus those in use before it.
    """

    name: str
    epoch: Epoch
    bare: str | None = None
    seconds: list[float] = field(default_factory=list)
    memory: int = 0


def contenders(options: argparse.Namespace, images: int) -> list[Loop]:
    """The tutorial's loop, then the other loops. bf16 is left out if the CPU only emulates it."""
    arch, device, batch = options.arch, options.device, options.batch
    slow = Execution(precision="bf16").slow_precision(torch.device(device))
    precisions = [p for p in options.precisions if not (slow and p == "bf16")]
    if precisions != options.precisions:
        print("bf16 is left out: this CPU emulates it")
    loops = [Loop(REFERENCE, plain(arch, images, device, batch))]
    for precision in precisions:
        for layout in options.layouts:
            setting = precision if layout == "channels_last" else f"{precision}, {layout}"
            bare = f"plain loop in memory, {setting}" if options.in_memory else None
            if bare:
                loops.append(Loop(bare, in_memory(arch, precision, layout, images, device, batch), bare))
            more = [f"trainer.channels_last={str(layout == 'channels_last').lower()}"]
            for loss in options.losses:
                epoch = ours(arch, loss, precision, images, device, more, batch)
                loops.append(Loop(f"mtl, {loss}, {setting}", epoch, bare))
    return [*loops, Loop("convolutions alone, fp32", convolutions(arch, images, device, batch))]


def measure(loops: Sequence[Loop], rounds: int, device: str, until: float, note: Callable[[], None]) -> None:
    """Time the loops in alternating rounds. The first round warms up.

    Args:
        loops: the loops; their times and memory are filled in.
        rounds: largest number of rounds, without the first.
        device: cpu, cuda or cuda:N.
        until: on the clock of time.monotonic; no loop starts after it.
        note: called after every measured time.
    """
    on_gpu = torch.device(device).type == "cuda"
    for number in range(rounds + 1):
        for loop in loops:
            if time.monotonic() >= until:
                return
            before = 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            elapsed = loop.epoch()
            if number:
                loop.seconds.append(elapsed)
                loop.memory = max(loop.memory, torch.cuda.max_memory_allocated(device) - before) if on_gpu else 0
                note()


def rows(loops: Sequence[Loop], images: int, batch: int) -> list[dict[str, Any]]:
    """The results of each loop so far, as plain Python values; None for a value that is not measured yet."""
    named = {loop.name: loop for loop in loops}
    result = []
    for loop in loops:
        seconds = statistics.median(loop.seconds) if loop.seconds else None
        bare = ratios(named[loop.bare].seconds, loop.seconds) if loop.bare else None
        result.append(
            {
                "loop": loop.name,
                "rounds": len(loop.seconds),
                "images_per_second": images / seconds if seconds else None,
                "step_ms": 1e3 * seconds * batch / images if seconds else None,
                "x_plain": ratios(loops[0].seconds, loop.seconds),
                "x_in_memory": bare,
                "memory_mib": loop.memory / 2**20 or None,
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--losses", nargs="+", default=["equal", "uncertainty", "dwa", "pcgrad", "graddrop"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--layouts", nargs="+", default=["channels_last"], choices=["channels_last", "contiguous"])
    parser.add_argument("--in-memory", action="store_true", help="add plain loops that load nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no loop after this time")
    parser.add_argument("--json", type=Path, help="write the rows to this file after every loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    until, images = time.monotonic() + options.seconds, options.steps * options.batch
    about = f"{options.arch}, batch {options.batch}, {options.steps} steps a round, {options.rounds} rounds, "
    about += f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    loops = contenders(options, images)

    def note() -> None:
        if options.json:
            write(options.json, {"about": about, "rows": rows(loops, images, options.batch)})

    measure(loops, options.rounds, options.device, until, note)
    print(about)
    print(_table(rows(loops, images, options.batch), options.in_memory))


def _table(found: Sequence[dict[str, Any]], in_memory: bool) -> str:
    def median(ratio: dict[str, float] | None) -> str:
        return f"{ratio['median']:.2f}" if ratio else "–"

    header = ["loop", "images/s", "x plain", "lowest–highest", *(["x in memory"] if in_memory else [])]
    body = []
    for row in found:
        speed, plain = row["images_per_second"], row["x_plain"]
        spread = f"{plain['lowest']:.2f}–{plain['highest']:.2f}" if plain else "–"
        cells = [row["loop"], f"{speed:,.0f}" if speed else "–", median(plain), spread]
        body.append([*cells, median(row["x_in_memory"])] if in_memory else cells)
    return table(header, body)


if __name__ == "__main__":
    main()
