"""Cells in other processes than the command's (`hydra/launcher=joblib`, Slurm, Ray): their console, GPU and end.

A cell's directory follows from its identity, and an interrupted cell resumes. So a launcher may start a cell as often
as it likes. The presets are in conf/hydra/launcher/.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from hydra.errors import MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ValidationError

from mtl.errors import Busy, ConfigError, SetupError, Terminated, UserError, one_line

log = logging.getLogger("mtl")
T = TypeVar("T")

# {option of hydra/launcher that our presets build on: its plugin, hydra-…-launcher}.
PLUGINS = {"joblib": "joblib", "submitit_slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}

# Both belong to a process that a launcher started, whatever runs it works on.
_slots: list[FileLock] = []  # of its GPU: held for as long as this process lives
_at_work = threading.Event()  # whether it runs a cell now: its signal handler must know
POLL, PATIENCE = 1.0, 60.0  # seconds: between two checks of the parent; for a cell to note that it was interrupted


def announce(hydra: DictConfig) -> str:
    """The command's line before cells start elsewhere; empty if they run in its own process, one after another."""
    plugin = _plugin(hydra)
    if plugin == "joblib":
        return f"grid      {hydra.launcher.n_jobs} cells at a time; train.log in a cell's directory has its epochs"
    if plugin == "submitit":
        return f"grid      a job for each cell; what they print is in {hydra.sweep.dir}/.submitit/"
    return f"grid      cells run by {plugin}" if plugin else ""


def enter(hydra: DictConfig, console: logging.Handler) -> None:
    """Prepare this process, which a launcher started, for the cells that it will run: its threads, GPU and signals.

    Args:
        hydra: Hydra's config.
        console: prints the log. If processes share it, a run's own lines appear in its train.log only.
    """
    plugin = _plugin(hydra)
    if plugin == "submitit":  # every job prints to a file of its own
        if threads := hydra.launcher.cpus_per_task:
            from torch import set_num_threads  # late: torch takes a second

            set_num_threads(threads)
    else:
        from mtl.tracking.console import Progress
        from mtl.tracking.runlog import of_a_run

        console.addFilter(lambda record: record.levelno > logging.INFO or not of_a_run(record))
        Progress.allowed = False
    if plugin == "joblib":  # it sets the threads; Slurm and Ray give a job its GPUs themselves
        _take_gpu(Path(hydra.sweep.dir))
        end_with_parent()


@contextmanager
def at_work() -> Iterator[None]:
    """A cell runs in this block. If a signal ends the process, the cell can still note that it was interrupted."""
    _at_work.set()
    try:
        yield
    except Terminated as error:  # raised in `end_with_parent`; joblib's loop would only wait for the next cell
        sys.stdout.flush()
        os._exit(error.code)
    finally:
        _at_work.clear()


def end_with_parent() -> None:
    """End this process soon after the command that started it has ended. A killed command cannot end its workers.

    joblib's workers would go on to train, or idle for minutes. They would hold locks and keep the output open.
    """
    parent, heard = os.getppid(), threading.Event()

    def stop(number: int, frame: object) -> None:
        if not _at_work.is_set():  # joblib's loop, which waits for the next cell
            os._exit(128 + number)
        if not heard.is_set():  # later ones are ignored, while the run notes the first
            heard.set()
            raise Terminated(128 + number)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=watch, daemon=True).start()


def note(number: int, text: str) -> None:
    """One line on a cell that runs elsewhere."""
    log.info(f"cell {number:<4d} {text}")


def _plugin(hydra: DictConfig) -> str:
    """joblib, submitit, ray, …; empty for Hydra's own launcher."""
    return hydra.launcher._target_.partition("hydra_plugins.hydra_")[2].partition("_")[0]


def _take_gpu(folder: Path) -> None:
    """Let this process see one of several GPUs. Each GPU gets the same number of processes."""
    from torch.cuda import device_count  # late: torch takes a second; it does not start CUDA to count

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(i) for i in range(device_count())]
    if len(gpus) < 2:
        return
    for i in itertools.count():
        slot = FileLock(folder / f".process-{i}.lock")
        try:
            slot.acquire(blocking=False)
        except Timeout:
            continue
        _slots.append(slot)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        return


def when_free(start: Callable[[], T], seconds: float = 1.0) -> T:
    """Wait until no other process holds the run's lock, then run it.

    The lock is held in three cases. Another cell of the grid is the same run. Another cell trains the same single-task
    baseline. Or a preempted job has died on a network disk, and its lock is not gone yet.

    Args:
        start: raises Busy as long as another process is at work.
        seconds: between two tries.
    """
    for attempt in itertools.count():
        try:
            return start()
        except Busy as error:
            if not attempt:
                log.info(f"waiting   {str(error).partition(';')[0]}")
            time.sleep(seconds)


def explain(error: Exception) -> UserError | None:
    """One line for an error of a launcher itself; None for all other errors."""
    if isinstance(error, MissingConfigException):
        plugin = PLUGINS.get(str(error.missing_cfg_file).removeprefix("hydra/launcher/"))
        return plugin and SetupError(f"hydra/launcher needs a package: pip install hydra-{plugin}-launcher")
    cause = error.__cause__ or error
    if isinstance(cause, ValidationError) and str(cause.full_key).startswith("hydra.launcher."):
        return ConfigError(f"{cause.full_key}: {one_line(cause).partition(' full_key:')[0]}")
    origins = {type(error).__module__.partition(".")[0], _raised_in(error)} & set(PLUGINS.values())
    if not origins:
        return None
    # From a traceback of another process, take the line that names the error.
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[0])
    return SetupError(
        f"{origins.pop()} could not run the cells: {one_line(reason)[:300].rstrip('.')}; the same command again goes on"
    )


def _raised_in(error: Exception) -> str:
    """The package whose code raised `error`: Ray raises built-in exceptions too."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] if frames else ""
