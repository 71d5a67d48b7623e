"""Time of a training step under the gradient microscope, as a multiple of the same step without it.

    python benchmarks/microscope.py                      ResNet-20, batch 128: two minutes on two CPU cores
    python benchmarks/microscope.py --losses equal pcgrad --every 50 --rounds 10          on a GPU

Every round has four epochs: `--every` steps without the microscope, the same with one observed step, and two short
epochs in which every step is observed. The epochs alternate, so that a change of the machine's pace affects all of
them. The multiple compares the times per step within a round. The last column is the cost that the run's header
announces. On a CPU the time is the processor time of this process, so that other processes disturb less.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable

import torch
from throughput import BATCH, ours

from mtl.engine.learner import Learner
from mtl.tracking.console import table


def spent(run: Callable[[], float], on_cpu: bool) -> float:
    """Seconds that `run` takes: the wall time that it returns, or on a CPU the processor time of this process."""
    started = time.process_time()
    wall = run()
    return time.process_time() - started if on_cpu else wall


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--arch", default="resnet20")
    arguments.add_argument("--losses", nargs="+", default=["equal"])
    arguments.add_argument("--every", type=int, default=10)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--device", default="auto")
    options = arguments.parse_args()

    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    announced: list[str] = []
    train_epoch = Learner.train_epoch

    def noting(learner, batches, epoch):  # the announcement needs the learner, which `ours` does not return
        announced.append(learner.microscope.describe(learner, len(batches), BATCH))
        return train_epoch(learner, batches, epoch)

    Learner.train_epoch = noting
    looks = [(0, 0, options.every), (options.every, options.samples, options.every),
             (1, options.samples, 2), (1, 0, 2)]  # every, samples, steps of an epoch  # fmt: skip
    rows = []
    for loss in options.losses:
        runs = []
        for every, samples, steps in looks:
            more = [f"microscope.every={every}", f"microscope.samples={samples}"]
            runs.append(ours(options.arch, loss, "fp32", steps * BATCH, options.device, more))
        runs[-1]()  # warm up: the first steps of a process are slower
        multiples: list[list[float]] = [[] for _ in runs]
        for _ in range(options.rounds):
            announced.clear()
            seconds = [spent(run, on_cpu) / steps for run, (_, _, steps) in zip(runs, looks, strict=True)]
            for found, s in zip(multiples, seconds, strict=True):
                found.append(s / seconds[0])
        for (every, samples, _), found, line in zip(looks, multiples, announced, strict=True):
            said = re.search(r"\+(\d+) %", line)
            what = f"{loss}, every {every}, {samples} samples" if every else f"{loss}, off"
            spread = [f"{f(found):.2f}" for f in (statistics.median, min, max)]
            rows.append([what, *spread, f"{1 + int(said[1]) / 100:.2f}" if said else "1.00"])
    device = "cpu" if on_cpu else torch.cuda.get_device_name()
    about = f"{options.arch}, batch {BATCH}, {options.rounds} rounds, {device}, {torch.get_num_threads()} threads, "
    print(f"{about}torch {torch.__version__}")
    print(table(["microscope", "x off", "lowest", "highest", "announced"], rows))


if __name__ == "__main__":
    main()
