"""Train several runs at a time on one device, and stop them cleanly when the time is over. `gpu_day.py` starts this.

    python benchmarks/gpu_day_runs.py --out DIR --until $(($(date +%s) + 300)) --at-once 4 --losses dwa equal \
        --seeds 42 123 456 -- experiment=cifar100 arch=resnet20 trainer.precision=bf16

Every run is `train.py` in a process of its own, so the same command resumes interrupted runs. DIR/logs/runs.json holds
the state of all runs. It is replaced every few seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from files import read, read_lines, write
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mtl.cli.command import CONF
from mtl.config.identity import identify

ROOT = Path(__file__).parents[1]
GRACE = 10.0  # seconds that interrupted runs get to write their state
LEAST = 20.0  # no run starts in the last 20 seconds: it would not finish an epoch
PAUSE = 0.5  # seconds between two checks of the processes


@dataclass
class Run:
    """One run of the queue.

    Attributes:
        loss, seed: its loss strategy and its seed.
        words: its whole command line after train.py.
        directory: the folder into which it writes.
        epochs: number of epochs in its config.
        before: number of epochs that were finished when the day began.
        process: its process while it trains; otherwise None.
        error: why its process failed; None if it did not.
    """

    loss: str
    seed: int
    words: list[str]
    directory: Path
    epochs: int
    before: int = 0
    process: subprocess.Popen | None = None
    error: str | None = None
    log: Path = field(default_factory=Path)

    @property
    def finished(self) -> bool:
        return (read(self.directory / "run.json") or {}).get("status") == "finished"

    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl, without a half-written last one."""
        return read_lines(self.directory / "metrics.jsonl")

    def state(self) -> dict[str, Any]:
        """The values of this run that the page shows, as plain Python values."""
        rows = self.rows()
        keys = [key for key in (rows[-1] if rows else {}) if key.startswith("test/") and key.endswith("_accuracy")]
        today = rows[self.before :]
        status = (read(self.directory / "run.json") or {}).get("status", "not started")
        if self.error and status != "diverged":
            status = "failed"
        elif status == "running" and self.process is None:
            status = "killed"
        return {
            "loss": self.loss,
            "seed": self.seed,
            "status": status,
            "error": self.error,
            "epochs": len(rows) if status == "finished" else self.epochs,  # trainer.patience stops a run early
            "before": self.before,
            "reached": len(rows),
            "last": {key: rows[-1][key] for key in keys},
            "best": {key: max(row[key] for row in rows) for key in keys},
            "seconds_per_epoch": _median(today, "time/seconds"),
            "images_per_second": _median(today, "time/images_per_second"),
            "peak_memory_gib": (read(self.directory / "summary.json") or {}).get("peak_memory_gib"),
        }


def _median(rows: Sequence[dict[str, float]], key: str) -> float | None:
    return statistics.median(row[key] for row in rows) if rows else None


def queue(out: Path, losses: Sequence[str], seeds: Sequence[int], words: Sequence[str]) -> list[Run]:
    """All runs: every seed of the first loss, then of the next.

    Args:
        out: folder of the day. Runs go into out/runs, their output into out/logs.
        losses, seeds: the loss strategies and seeds; every combination is a run.
        words: the part of the command line that all runs have in common.
    """
    runs = []
    for loss in losses:
        for seed in seeds:
            own = [*words, f"loss={loss}", f"seed={seed}", f"output_root={out / 'runs'}", "logger=none"]
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose("config", own, return_hydra_config=True)
            choices = dict(config.hydra.runtime.choices)
            plain = OmegaConf.to_container(
                OmegaConf.masked_copy(config, [k for k in config if k != "hydra"]), resolve=True
            )
            directory = identify(plain, choices).directory(out / "runs")
            run = Run(loss, seed, own, directory, plain["trainer"]["epochs"], log=out / "logs" / f"{loss}-{seed}.log")
            run.before = len(run.rows())
            runs.append(run)
    return runs


class Pool:
    """Keeps `at_once` processes at work until the time is over.

    Args:
        runs: the runs in the order of their start. Finished runs are skipped.
        at_once: number of processes at a time.
        until: the end, on the clock of time.time. All processes have ended by then.
    """

    def __init__(self, runs: Sequence[Run], at_once: int, until: float):
        self.runs, self.at_once, self.until = runs, at_once, until
        self.waiting = [run for run in runs if not run.finished]
        self.active: list[Run] = []
        self.stopped = False

    def left(self) -> float:
        """Seconds that are left for training."""
        return 0.0 if self.stopped else self.until - GRACE - time.time()

    def turn(self) -> bool:
        """Note which processes have ended and start others; return whether any process is running."""
        for run in [r for r in self.active if r.process.poll() is not None]:
            self._ended(run)
        while self.waiting and len(self.active) < self.at_once and self.left() > LEAST:
            self._start(self.waiting.pop(0))
        return bool(self.active)

    def close(self) -> None:
        """Interrupt all processes; kill those that take longer than the grace."""
        for run in self.active:
            run.process.send_signal(signal.SIGTERM)
        end = time.time() + GRACE
        for run in list(self.active):
            try:
                run.process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()
            run.process = None
        self.active = []

    def _start(self, run: Run) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.at_once))
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("a") as log:
            run.process = subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *run.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": threads, **os.environ},
            )
        self.active.append(run)

    def _ended(self, run: Run) -> None:
        if run.process.returncode:
            lines = run.log.read_text(errors="replace").strip().splitlines()
            run.error = f"exit code {run.process.returncode}: {lines[-1] if lines else 'no output'}"
        run.process = None
        self.active.remove(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="Unix time by which all processes have ended")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--losses", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("words", nargs="*", help="of every run's command line")
    options = parser.parse_args()
    began = time.monotonic()
    runs = queue(options.out.resolve(), options.losses, options.seeds, options.words)
    pool = Pool(runs, options.at_once, options.until)

    def stop(signum, frame) -> None:
        pool.stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    def note() -> None:
        content = {"at_once": options.at_once, "seconds": time.monotonic() - began, "words": options.words}
        write(options.out / "logs" / "runs.json", {**content, "runs": [run.state() for run in runs]})

    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    noted = 0.0
    while pool.turn() and pool.left() > 0:
        if time.monotonic() - noted > 5:
            note()
            noted = time.monotonic()
        time.sleep(PAUSE)
    pool.close()
    note()
    for run in runs:
        state = run.state()
        print(f"{run.loss} seed {run.seed}: {state['status']}, {state['reached']}/{run.epochs} epochs")
    if failed := sum(run.error is not None for run in runs):
        sys.exit(f"{failed} of {len(runs)} runs failed")


if __name__ == "__main__":
    main()
