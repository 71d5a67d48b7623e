"""Time and peak memory of `python -m mtl.report` on thousands of synthetic runs.

    python benchmarks/report.py                2,000 runs of 200 epochs, a few damaged or half-written
    python benchmarks/report.py --runs 200

The runs are written into a temporary folder; 2,000 runs take 0.3 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ARCHS = ("resnet20", "resnet56", "vgg16_bn")
TASKS = ("fine", "coarse")


def write(root: Path, runs: int, epochs: int) -> None:
    """Write strategies x architectures x ten seeds, until there are `runs` runs."""
    names = sorted(f.stem for f in (ROOT / "conf" / "loss").glob("*.yaml") if f.stem not in ("single", "custom"))
    losses = [("single", {"task": t}) for t in TASKS] + [(n, {"variant": v}) for v in range(9) for n in names]
    cells = ((arch, *loss, seed) for loss in losses for arch in ARCHS for seed in range(10))
    draw = random.Random(0)
    for number, (arch, loss, arguments, seed) in zip(range(runs), cells, strict=False):
        tasks = [arguments["task"]] if loss == "single" else TASKS
        digest = f"{zlib.crc32(repr((arch, loss, arguments)).encode()):08x}"
        folder = root / "cifar100" / arch / loss / digest / f"seed{seed}"
        folder.mkdir(parents=True)
        rows = [_row(e, epochs, tasks, draw) for e in range(1, epochs + 1)]
        kind = "diverged" if number % 199 == 7 else "running" if number % 199 == 17 else "finished"
        _files(folder, arch, loss, arguments, digest, seed, rows, kind, tasks)
        if number % 199 == 27:  # a power cut in the middle of a row
            (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-300])
        if number % 199 == 37:  # a half-written summary
            (folder / "summary.json").write_text('{"status": "fini')


def _row(epoch: int, epochs: int, tasks: tuple[str, ...], draw: random.Random) -> dict[str, float]:
    """A row of metrics.jsonl with plausible losses and accuracies."""
    row = {"epoch": epoch}
    for split in ("train", "val", "test"):
        for task in tasks:
            row[f"{split}/{task}_loss"] = 4 * math.exp(-3 * epoch / epochs) + draw.gauss(0, 0.05)
            row[f"{split}/{task}_accuracy"] = 70 * (1 - math.exp(-3 * epoch / epochs)) + draw.gauss(0, 1)
        if split == "train":
            row |= {f"weights/{task}": draw.random() for task in tasks}
            row |= {"grad/norm": draw.random(), "grad/cosine": draw.random(), "lr": 0.1 * (1 - epoch / epochs)}
            row |= {"time/seconds": 10 + draw.random(), "time/images_per_second": 5000 + draw.random()}
    return row


def _files(folder, arch, loss, arguments, digest, seed, rows, status, tasks) -> None:
    """The files of one run. An unfinished run has no summary."""
    keys = [f"test/{task}_accuracy" for task in tasks]
    best = {k: max(rows, key=lambda r: r[k]) for k in keys}
    chosen = max(rows, key=lambda r: r[f"val/{tasks[0]}_accuracy"])
    info = {
        "data": "cifar100", "arch": arch, "loss": loss, "digest": digest, "seed": seed,
        "name": f"{arch}-{loss}-s{seed}-{digest}", "group": f"cifar100/{arch}/{loss}/{digest}",
        "choices": {"optimizer": "sgd", "loss": loss}, "command": f"python train.py arch={arch} loss={loss}",
        "status": status, "error": "fine loss became nan" if status == "diverged" else None,
        "commit": "0" * 40, "dirty": False, "hardware": {"gpu": None, "cpu": "any"},
    }  # fmt: skip
    config = {
        "data": {"_target_": "mtl.data.cifar100.CIFAR100", "root": "data", "batch_size": 128, "limit_train": None,
                 "limit_test": None, "val_fraction": 0.1, "residency": "auto", "workers": 2, "download": True},
        "arch": {"_target_": "mtl.archs.resnet.ResNet", "depth": arch},
        "loss": {"_target_": "mtl.losses.Single" if loss == "single" else f"mtl.losses.{loss}", **arguments},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"_target_": "mtl.optim.schedules.Cosine", "final": 0.0, "warmup_epochs": 0, "interval": "epoch"},
        "step": {"gradients": "paper", "transform": "none", "heads": "paper", "scale": "paper"},
        "trainer": {"epochs": len(rows), "device": "auto", "precision": "fp32", "channels_last": True},
        "logger": {"_target_": "mtl.tracking.Tracker"}, "seed": seed, "output_root": "outputs",
    }  # fmt: skip
    summary = {
        "status": status, "epochs": len(rows), "higher_is_better": dict.fromkeys(keys, True),
        "best": {k: {"value": row[k], "epoch": row["epoch"]} for k, row in best.items()},
        "last": {k: rows[-1][k] for k in keys},
        "selected": {"by": f"val/{tasks[0]}_accuracy", "epoch": chosen["epoch"], **{k: chosen[k] for k in keys}},
        "parameters": 279624, "macs": 40820224, "seconds": 2000.0, "images_per_second": 5000.0, "peak_memory_gib": 1.0,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info, indent=2))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status != "running":
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.runs, options.epochs)
        size = sum(f.stat().st_size for f in Path(folder).rglob("metrics.jsonl")) / 1e6
        print(f"{options.runs:,} runs of {options.epochs} epochs, {size:,.0f} MB of metrics.jsonl")
        code = (
            "import resource, sys, time; start = time.perf_counter(), time.process_time();"
            "from mtl.report.__main__ import main; code = main(sys.argv[1:]);"
            "print(f'{time.perf_counter() - start[0]:.1f} s, {time.process_time() - start[1]:.1f} s of one core, '"
            "f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB', file=sys.stderr); sys.exit(code)"
        )
        since = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        print(f"{time.perf_counter() - since:.1f} s with the start of Python; {len(done.stdout.splitlines()):,} lines")


if __name__ == "__main__":
    main()
