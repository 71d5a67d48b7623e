"""How many trainings should share a GPU? Measures the summed images per second of several trainings at a time.

    python benchmarks/at_once.py --counts 1 2 4 8 --seconds 3

Each training is a process. All processes start once, then 1, 2, 4, … of them train for a few seconds each on synthetic
images in the shape of CIFAR-100. The choice is the smallest number within 5 % of the highest sum.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from files import write
from throughput import BATCH, ours

from mtl.tracking.console import table


def choose(speeds: Mapping[int, float]) -> int:
    """The smallest number of trainings whose summed images/s is within 5 % of the highest sum."""
    return min(count for count, speed in speeds.items() if speed >= 0.95 * max(speeds.values()))


def worker(pipe: Connection, arch: str, loss: str, precision: str, steps: int, batch: int, device: str) -> None:
    """Wait for a number of seconds on the pipe, train that long, and answer with the images per second. 0 ends it."""
    images = steps * batch
    epoch = ours(arch, loss, precision, images, device, batch=batch)
    epoch()  # warm up: the first steps of a process are slower
    pipe.send("ready")
    while seconds := pipe.recv():
        started, trained = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            epoch()
            trained += images
        pipe.send(trained / (time.monotonic() - started))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--loss", default="equal")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=20, help="of an epoch, whose end waits for the device")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the sums to this file after every measurement")
    options = parser.parse_args()
    # A training keeps one core busy. More threads would only compete.
    os.environ["OMP_NUM_THREADS"] = "1"
    context, pipes = multiprocessing.get_context("spawn"), []
    arguments = (options.arch, options.loss, options.precision, options.steps, options.batch, options.device)
    for _ in range(max(options.counts)):
        mine, theirs = context.Pipe()
        context.Process(target=worker, args=(theirs, *arguments), daemon=True).start()
        theirs.close()  # if a worker dies, recv() then raises EOFError instead of waiting forever
        pipes.append(mine)
    for pipe in pipes:
        pipe.recv()
    about = f"{options.arch}, {options.loss}, {options.precision}, batch {options.batch}, {options.device}, "
    about += f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    speeds: dict[int, float] = {}
    for count in sorted(options.counts):
        for pipe in pipes[:count]:
            pipe.send(options.seconds)
        speeds[count] = sum(pipe.recv() for pipe in pipes[:count])
        if options.json:
            write(options.json, {"about": about, "images_per_second": speeds, "choice": choose(speeds)})
    for pipe in pipes:
        pipe.send(0)
    print(about)
    print(table(["at once", "images/s, sum"], [[str(n), f"{speed:,.0f}"] for n, speed in speeds.items()]))
    print(f"choice: {choose(speeds)}")


if __name__ == "__main__":
    main()
