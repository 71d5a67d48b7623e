"""A prepared GPU day: tests, step times and CIFAR-100 runs on a bare GPU machine, within a given time, by one command.

    python benchmarks/gpu_day.py --minutes 9 --out DIR --data FOLDER --wheels .whl --commit $(git rev-parse HEAD)
    python benchmarks/gpu_day.py --minutes 9 --out DIR --plan                    say what would be done
    python benchmarks/gpu_day.py --minutes 3 --out /tmp/day --device cpu --tiny  try all of it without a GPU

DIR/gpu_day.md is the page, DIR/gpu_day.json its content. Both are replaced after every phase. The same command on a
later day resumes interrupted runs. FOLDER holds cifar-100-python/. The machine needs torch, torchvision and scipy.

A machine without a network gets the other packages as wheels. Prepare them on a machine with a network, in the
repository's folder:
    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp -d .whl \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        hydra-core==1.3.8 omegaconf==2.3.1 wandb==0.31.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types \
        typing-inspection typing-extensions pyyaml packaging filelock pytest iniconfig pluggy pygments
    python -m pip wheel --no-deps -w .whl antlr4-python3-runtime==4.9.3    # PyPI has no wheel of it
Data in parts for a transfer with a limit, and back:
    tar c cifar-100-python | xz -T2 | split -b 54m - cifar.     cat cifar.* | xz -dc -T0 | tar x -C FOLDER
Results to this machine, and to the machine of the next day:
    tar c DIR | split -b 15m - day.                             cat day.* | tar x
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from files import read, read_lines, write, write_text
from gpu_day_page import plan, render

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
GRACE = 12.0  # seconds that the runs get to end themselves after SIGTERM
RESERVE = 3.0  # seconds that are kept at the end to write the page
PHASES = ("tests", "steps", "at-once", "runs")
STEPS = {"resnet56": 10}  # steps per round; 20 for the other architectures
STEP_LOSSES = ("equal", "pcgrad", "graddrop")  # one of each family: on an H100 each needs about two seconds to start
PROTOCOL = ("experiment=cifar100", "trainer.precision=bf16")
TINY_TIMES = ("--steps", "1", "--rounds", "1", "--batch", "8", "--precisions", "fp32")
TINY_COUNT = ("--steps", "1", "--seconds", "1", "--batch", "8", "--counts", "1", "2")
TINY = ("data=digits", "data.limit_train=128", "data.limit_test=64", "data.batch_size=32", "trainer.epochs=2")


@dataclass
class Phase:
    """One process of the day.

    Attributes:
        name: tests, steps resnet20, …
        share: largest share of the whole time. The last phase also gets the time that earlier ones did not use.
        command: a function that returns the command line, from the number of seconds that the phase has.
        result: the JSON file that the process replaces while it works.
        grace: seconds between SIGTERM and SIGKILL; they are part of the budget.
        status: not reached, skipped, done, failed (its exit code was not 0) or cut (killed at its budget).
        seconds, budget: the time that it took and the time that it was allowed.
        error: why it failed or was not reached.
        typed: the command line.
        found: the content of the result file.
    """

    name: str
    share: float
    command: Callable[[float], Sequence[str]]
    result: Path
    grace: float = 3.0
    status: str = "not reached"
    seconds: float = 0.0
    budget: float = 0.0
    error: str | None = None
    typed: str = ""
    found: Any = None

    def note(self) -> dict[str, Any]:
        """The entry of this phase in gpu_day.json."""
        keys = ("status", "seconds", "budget", "error", "found")
        return {"command": self.typed, **{key: getattr(self, key) for key in keys}}


@dataclass
class Clock:
    """The time of a day.

    Args:
        total: length in seconds, from now on.
        now: the clock; tests replace it.
    """

    total: float
    now: Callable[[], float] = time.monotonic
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.now()

    def elapsed(self) -> float:
        """Seconds since the day began."""
        return self.now() - self.began

    def budget(self, share: float) -> float:
        """Seconds that a phase may take, including the grace after SIGTERM. It is never more than the time left."""
        return max(0.0, min(share * self.total, self.total - RESERVE - self.elapsed()))


class Stopped(Exception):
    """Raised when SIGTERM or Ctrl-C reaches this process."""


def execute(phase: Phase, clock: Clock, env: dict[str, str]) -> None:
    """Run the process of a phase within its budget and read its result. Its output goes into a log beside the result.

    Raises:
        Stopped: a signal stopped this process; the processes of the phase have ended.
    """
    phase.budget = clock.budget(phase.share)
    if phase.budget <= phase.grace + 1:
        phase.error = f"{phase.budget:.0f} s were left"
        return
    log = phase.result.with_suffix(".log")
    phase.result.parent.mkdir(parents=True, exist_ok=True)
    phase.result.unlink(missing_ok=True)  # of an earlier day
    command = list(phase.command(phase.budget))
    phase.typed = shlex.join(command)
    began = clock.elapsed()
    stopped = False
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(phase.budget - phase.grace)
            phase.status = "failed" if code else "done"
        except subprocess.TimeoutExpired:
            phase.status = "cut"
        except Stopped:
            phase.status, stopped = "cut", True
        _end(process, phase.grace)
    if phase.status == "failed":
        lines = log.read_text(errors="replace").strip().splitlines()
        phase.error = f"exit code {process.returncode}: {lines[-1] if lines else 'no output'}"
    phase.seconds = clock.elapsed() - began
    phase.found = read_lines(phase.result) if phase.result.suffix == ".jsonl" else read(phase.result)
    if stopped:
        raise Stopped


def _end(process: subprocess.Popen, grace: float) -> None:
    """Send SIGTERM to the process, then SIGKILL to all processes that it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def phases(options: argparse.Namespace) -> list[Phase]:
    """The phases of the day in their order. Phases that `--phases` leaves out are marked as skipped."""
    python, logs, tiny = sys.executable, options.out / "logs", options.tiny
    result = []
    if options.wheels:
        pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target",
               options.site, *sorted(map(str, options.wheels.glob("*.whl")))]  # fmt: skip
        result.append(Phase("install", 0.1, lambda _: pip, logs / "install.json"))
    pytest = [python, "-m", "pytest", "tests/test_gpu.py", "-p", "gpu_day_tests", "-p", "no:cacheprovider"]
    result.append(Phase("tests", 0.3, lambda _: pytest, logs / "tests.jsonl"))
    for arch in options.archs[: 1 if tiny else None]:
        file = logs / f"steps-{arch}.json"
        times = [python, str(HERE / "throughput.py"), "--arch", arch, "--device", options.device, "--in-memory",
                 "--losses", *STEP_LOSSES[: 2 if tiny else None],
                 *(TINY_TIMES if tiny else ("--steps", str(STEPS.get(arch, 20)))), "--json", str(file)]  # fmt: skip
        # The process starts its clock after its imports, so it gets less time than the phase has.
        result.append(Phase(f"steps {arch}", 0.125, lambda s, t=times: [*t, "--seconds", f"{s - 10:.0f}"], file))
    file = logs / "at-once.json"
    count = [python, str(HERE / "at_once.py"), "--arch", options.arch, "--device", options.device,
             *(TINY_COUNT if tiny else ()), "--json", str(file)]  # fmt: skip
    result.append(Phase("at-once", 0.15, lambda _: count, file))
    file = logs / "runs.json"

    def train(seconds: float) -> list[str]:
        measured = (read(logs / "at-once.json") or {}).get("choice", 4)
        return [python, str(HERE / "gpu_day_runs.py"), "--out", str(options.out), "--until",
                f"{time.time() + seconds - GRACE - 5:.0f}", "--at-once", str(options.at_once or measured),
                "--losses", *options.losses, "--seeds", *map(str, options.seeds), "--", *words(options)]  # fmt: skip

    result.append(Phase("runs", 1.0, train, file, GRACE))
    for phase in result:
        kind = phase.name.partition(" ")[0]
        if kind not in ("install", *options.phases) or (kind == "at-once" and options.at_once):
            phase.status = "skipped"
    return result


def words(options: argparse.Namespace) -> list[str]:
    """The options of train.py in every run, except loss, seed and folder."""
    result = [*(TINY if options.tiny else PROTOCOL), f"arch={options.arch}", f"trainer.device={options.device}"]
    if options.data and not options.tiny:
        result += [f"data.root={options.data}", "data.download=false"]
    return [*result, *options.override]


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Command, commit, machine and versions. Unknown values are None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = _output(query) if options.device != "cpu" else None
    name, driver, memory = (smi.splitlines()[0].split(", ") + [None] * 3)[:3] if smi else (None, None, None)
    packages = {}
    for package in ("torch", "torchvision", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": options.commit or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "device": {"asked": options.device, "name": name, "driver": driver, "memory": memory, "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **packages},
    }


def _output(command: Sequence[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def report(out: Path, day: dict[str, Any]) -> None:
    """Replace gpu_day.json and gpu_day.md."""
    write(out / "gpu_day.json", day)
    write_text(out / "gpu_day.md", render(day))


def keep(out: Path) -> None:
    """Rename the page of an earlier day to gpu_day-1.md, gpu_day-2.md, …"""
    if (out / "gpu_day.json").exists():
        number = 1 + len(list(out.glob("gpu_day-*.json")))
        for suffix in ("json", "md"):
            with suppress(FileNotFoundError):
                (out / f"gpu_day.{suffix}").rename(out / f"gpu_day-{number}.{suffix}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options, with absolute paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of the whole command")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; a later day goes on in it")
    parser.add_argument("--data", type=Path, help="folder that holds cifar-100-python/")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install into a temporary folder first")
    parser.add_argument("--commit", help="where the repository came without .git")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--archs", nargs="+", default=["resnet20", "resnet56"], help="whose steps are timed")
    parser.add_argument("--arch", default="resnet20", help="that is trained")
    parser.add_argument("--losses", nargs="+", default=["dwa", "equal", "uncertainty", "pcgrad"], help="to train with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 123, 456])
    parser.add_argument("--at-once", type=int, help="runs at a time; measured if not given")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of every run's config")
    parser.add_argument("--tiny", action="store_true", help="digits, two epochs, single steps: does it all work?")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    options = parser.parse_args(arguments)
    for name in ("out", "data", "wheels"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    if options.data and not (options.data / "cifar-100-python").is_dir():
        parser.error(f"--data: {options.data} holds no cifar-100-python/")
    if options.wheels and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: {options.wheels} holds no wheels")
    options.site = str(Path(tempfile.gettempdir()) / f"gpu-day-{os.getpid()}")  # the wheels are installed here
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day; the exit code is 1 if a phase failed or a signal stopped the day."""
    options = parse(arguments)
    clock = Clock(60 * options.minutes)
    todo = phases(options)
    if options.plan:
        print(plan(options, todo, read(options.out / "gpu_day.json")))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    keep(options.out)
    path = [options.site, str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    results = str(options.out / "logs" / "tests.jsonl")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "GPU_DAY_TESTS": results,
           "PYTHONUNBUFFERED": "1"}  # fmt: skip
    day, stopped = about(options), False

    def stop(signum, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not stop the closing
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Stopped

    def note() -> None:
        day.update(seconds=clock.elapsed(), phases={phase.name: phase.note() for phase in todo})
        report(options.out, day)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        for phase in todo:
            note()
            if phase.status != "skipped":
                execute(phase, clock, env)
                print(f"{phase.name}: {phase.status} after {phase.seconds:.0f} s {phase.error or ''}", flush=True)
    except Stopped:
        stopped = True
        print("stopped by a signal", flush=True)
    note()
    shutil.rmtree(options.site, ignore_errors=True)
    print(f"{options.out / 'gpu_day.md'}, {clock.elapsed():.0f} s")
    return int(stopped or any(phase.status == "failed" for phase in todo))


if __name__ == "__main__":
    sys.exit(main())
