"""Time of a training step with each method, as a multiple of equal weighting's, side by side in one run.

    python benchmarks/methods.py                          all, ResNet-20, batch 128; writes results/step-time/steps.csv
    python benchmarks/methods.py --losses mgda cagrad     some, printed only

Every round times one short epoch of each method, equal weighting first. All use the same synthetic images with a fine
and a coarse head. The multiple compares the times within a round. The table gives the median and the range over the
rounds.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
from pathlib import Path

import torch
from throughput import BATCH, ours

from mtl.tracking.console import table

ROOT = Path(__file__).parents[1]
NEEDED = {
    "static": ["loss.weights={fine: 1, coarse: 0.5}"],
    "single": ["loss.task=fine"],
    "pivrg": ["loss.baselines={fine: 68.8, coarse: 78.9}"],
    "amtl": ["loss.potentials={fine: 68.8, coarse: 78.9}"],
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--arch", default="resnet20")
    arguments.add_argument("--losses", nargs="+")
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--device", default="auto")
    options = arguments.parse_args()
    every = sorted(f.stem for f in (ROOT / "conf" / "loss").glob("*.yaml") if f.stem != "custom")
    names = ["equal", *(n for n in options.losses or every if n != "equal")]
    images = options.steps * BATCH
    epochs = {n: ours(options.arch, n, "fp32", images, options.device, NEEDED.get(n, [])) for n in names}
    for run in epochs.values():
        run()  # warm up
    multiples: dict[str, list[float]] = {n: [] for n in names}
    for _ in range(options.rounds):
        seconds = {n: run() for n, run in epochs.items()}
        for n in names:
            multiples[n].append(seconds[n] / seconds["equal"])
    rows = [[n, f"{statistics.median(x):.2f}", f"{min(x):.2f}", f"{max(x):.2f}"] for n, x in multiples.items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = f"{options.arch}, batch {BATCH}, {options.steps} steps a round, {options.rounds} rounds, {device}, "
    about += f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"
    print(about)
    print(table(["loss", "x equal", "lowest", "highest"], rows))
    if not options.losses:
        folder = ROOT / "results" / "step-time"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "steps.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["loss", "multiple", "lowest", "highest", "measured"])
            writer.writerows([*row, about] for row in rows)


if __name__ == "__main__":
    main()
