"""The command line around Hydra: help out of the config files, and errors of one line instead of tracebacks."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mtl import __version__
from mtl.cli import launchers
from mtl.cli.explain import GROUPS, refuse_unquoted, translate, with_known_keys
from mtl.cli.overrides import parse, spell, spelled, unfold
from mtl.cli.parts import fold
from mtl.config import torchrun
from mtl.config.identity import CONF
from mtl.config.program import program
from mtl.errors import ConfigError, SetupError, Terminated, UserError, remove_empty

TARGET = "_target_"


# The files of a grid's record, ours, Hydra's and its plugins'.
RECORD = (
    "grid.json",
    "multirun.yaml",
    "cell-*.json",
    "cell-*.json.tmp",
    ".process-*.lock",
    "optimization_results.yaml",
)


# Hydra would merge two options of a group into one tracker.
LOGGERS = dict.fromkeys(("logger=[wandb,tensorboard]", "logger=[tensorboard,wandb]"), "logger=all")
PATIENCE = 2.0  # seconds after a signal in which further ones are not heard: a closed terminal sends several
RECORDLESS = "mtl-grid-"  # the start of the temporary folder's name where no record can be kept


@dataclass
class Launch:
    """What one call of `launch` knows of its runs. A later call in the same process begins with nothing.

    Attributes:
        codes: the exit code of each run so far.
        directory: the folder of the grid; None for a single run, and in a process that a launcher started.
        made: the folders that were made for it, the innermost first.
        measured: seconds of an epoch of each group of runs that `study.plan` has timed.
    """

    codes: list[int] = field(default_factory=list)
    directory: Path | None = None
    made: list[Path] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def close(self, interrupted: bool = False) -> int:
        """Print the table of all runs of the grid; return 1 if one of them failed.

        Args:
            interrupted: by a signal. Slurm's jobs may then still be in the queue: they need their files.
        """
        if self.directory is None or not self.directory.exists():
            return 0
        if not any(self.directory.glob("cell-*.json")):  # refused before the first run began: leave nothing behind
            if not (interrupted and (self.directory / ".submitit").exists()):
                self._discard()
            return 0
        from mtl.cli.grid import summarise  # late: it needs the plotting library

        code, empty = summarise(self.directory, not _temporary(self.directory), interrupted)
        if empty:
            self._discard()
        return code

    def _discard(self) -> None:
        """Remove the grid's record: the files that it is made of, and the folders that were made for it."""
        folders = [f for f in self.directory.glob(".submitit/**/") if f.is_dir()]
        files = [file for folder in folders for file in folder.iterdir() if file.is_file()]
        for pattern in RECORD:
            files += self.directory.glob(pattern)
        for file in files:
            file.unlink(missing_ok=True)
        for folder in sorted(folders, reverse=True):
            remove_empty([folder])
        remove_empty(self.made)


_under_way: ContextVar[Launch | None] = ContextVar("launch", default=None)  # Hydra calls our code without it


def under_way() -> Launch:
    """The launch that this thread is at work on; a new one in a process that a launcher started."""
    found = _under_way.get()
    if found is None:
        _under_way.set(found := Launch())
    return found


def say_start(config: DictConfig) -> None:
    """The first line of a command: at once, since PyTorch takes seconds to load."""
    if "torch" not in sys.modules and _under_way.get() is not None and torchrun.rank() == 0:
        chosen = HydraConfig.get().runtime.choices
        words = ", ".join(str(chosen[group]) for group in ("data", "arch", "loss") if chosen.get(group))
        print(f"start     {words}, seed {OmegaConf.select(config, 'seed')}; PyTorch is loading", flush=True)


def launch(main: Callable[[], None]) -> int:
    """Run a `@hydra.main` function; return the process's exit code.

    0: all runs finished. 1: a run failed, or the machine is at fault. 2: the command or config is wrong.
    129 / 130 / 143: interrupted by a closed terminal, Ctrl-C or SIGTERM; the same command resumes.
    """
    # The process's, not a run's: the command line has the process for itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand the exceptions to us instead of printing them over many lines
    logging.raiseExceptions = False  # a run goes on, without tracebacks, when whoever read its output (| head) is gone
    token = _under_way.set(launched := Launch())
    before = _listen(_first_stops())
    try:
        code, interrupted = _run(main, launched)
        return max(code, launched.close(interrupted))
    except (KeyboardInterrupt, Terminated) as error:  # during the closing table
        return _code(error)
    finally:
        _under_way.reset(token)
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(main: Callable[[], None], launched: Launch) -> tuple[int, bool]:
    """The exit code of `main`, and whether a signal ended it."""
    try:
        _read_command()
        _compose_and_run(main, launched)
        code = max(launched.codes, default=0)
    except UserError as error:
        code = _say(error)
    except MissingConfigException as error:  # an OSError by inheritance, but not about the disk
        code = _say(translate(error))
    except BrokenPipeError:  # `python train.py --help | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        place = error.filename or launched.directory or "the output folder"  # a full disk does not say which file
        wrong = SetupError(f"cannot write to {place}: {error.strerror}; set output_root=DIR")
        code = _say(launchers.explain(error) or wrong)
    except Exception as error:  # a run's own errors end in its outcome: this one is Hydra's
        code = _say(translate(error))
    except (KeyboardInterrupt, Terminated) as error:
        return _code(error), True
    return code, False


def _compose_and_run(main: Callable[[], None], launched: Launch) -> None:
    """Call `main` with the command line; once more where Hydra refuses a key that the class of a node has."""
    try:
        main()
    except (OmegaConfBaseException, HydraException) as error:
        mended = None if launched.codes else with_known_keys(sys.argv[1:], error)
        if mended is None:
            raise
        sys.argv[1:] = mended
        if launched.directory is not None:  # the grid begins anew
            launched._discard()
            launched.directory, launched.made = None, []
        GlobalHydra.instance().clear()
        _compose_and_run(main, launched)


def script(main: Callable[[], None]) -> NoReturn:
    """Call `launch`, then end the process. A signal after the last run ends it without a traceback."""
    # Before and after `launch` no run's results can be lost: there are only imports, W&B and Python's own cleaning up.
    _listen(lambda number, frame: os._exit(128 + number))
    sys.exit(launch(main))


def _code(error: BaseException) -> int:
    return error.code if isinstance(error, Terminated) else 130


def _first_stops() -> Callable:
    """A handler that stops the run at the first signal. For a while it ignores more, so that the run can note that."""
    since: list[float] = []

    def stop(number, frame):
        if not since:
            since.append(time.monotonic())
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)
        if time.monotonic() - since[0] > PATIENCE:
            os._exit(128 + number)

    return stop


def _listen(handler: Callable) -> dict[int, Any]:
    """Handle the signals that end a process, except the ones that it ignores (nohup); return the handlers before."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: h or signal.SIG_DFL for n, h in before.items() if h is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


class Grid(Callback):
    """What Hydra calls when a multirun begins: it makes the folder for the grid's record.

    The folder is always new. If `hydra.sweep.dir` exists already, the record gets a new folder inside of it. Other
    files there, such as another grid's record or a user's results, are not overwritten, counted or removed.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        try:
            folder, made = _new_folder(Path(config.hydra.sweep.dir), Path(str(config.get("output_root"))))
        except OSError:  # Hydra only warns of an error in a callback; it fails at the same folder next, with an error
            return
        launched = under_way()
        launched.directory, launched.made = folder, made
        # The sweeper and the launcher write there, too. Cells in other processes learn of it through the overrides.
        with open_dict(config):
            config.hydra.sweep.dir = str(folder)
            kept = [w for w in config.hydra.overrides.hydra if not w.lstrip("+").startswith("hydra.sweep.dir=")]
            config.hydra.overrides.hydra = [*kept, f"hydra.sweep.dir={spell(str(folder))}"]
        note = {"started": time.time(), "cells": _count(config.hydra)}
        if "study.baselines=auto" in config.hydra.overrides.task:
            note["bases"] = _count(config.hydra, but=("loss", "step", "study"))
        with suppress(OSError):  # a full disk: as above
            (folder / "grid.json").write_text(json.dumps(note) + "\n")
        if line := launchers.announce(config.hydra):
            print(line, flush=True)


def _new_folder(wanted: Path, output_root: Path) -> tuple[Path, list[Path]]:
    """Make a folder for a grid's record: `wanted`, or one inside of it, or a temporary one if neither can be written.

    Returns:
        the folder, and all folders that were made for it, the innermost first.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    for folder in (wanted, wanted / now):
        made = [f for f in (folder, *folder.parents) if not f.exists()]
        try:
            folder.mkdir(parents=True)
            return folder, made
        except FileExistsError:
            continue
        except OSError as error:
            remove_empty(made)
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not output_root.is_dir():
                raise
            # Another user's results can still be listed.
            print(f"grid      cannot write to {folder}: no record is kept of this grid", flush=True)
            folder = Path(tempfile.mkdtemp(prefix=RECORDLESS))
            return folder, [folder]
    raise FileExistsError(errno.EEXIST, "exists and is no folder", str(wanted))


def _temporary(folder: Path) -> bool:
    return folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith(RECORDLESS)


def _count(hydra: DictConfig, but: Collection[str] = ()) -> int | None:
    """How many cells a grid has; None if a sweeper decides that as it goes (Optuna), or will refuse the words.

    Args:
        hydra: Hydra's config.
        but: nodes whose values do not count.
    """
    if not str(hydra.sweeper[TARGET]).endswith("BasicSweeper"):
        return None
    words = [*(f"{k}={v}" for k, v in (hydra.sweeper.params or {}).items()), *hydra.overrides.task]
    running = GlobalHydra.instance()  # its loader knows the options of a group, which glob(*) selects from
    parser = OverridesParser.create(running.config_loader() if running.is_initialized() else None)
    sweeps = [o for o in parser.parse_overrides(words) if o.is_sweep_override()]
    sweeps = [sweep for sweep in sweeps if sweep.key_or_group.partition(".")[0] not in but]
    if not all(sweep.is_discrete_sweep() for sweep in sweeps):
        return None
    return math.prod(sum(1 for _ in sweep.sweep_string_iterator()) for sweep in sweeps)


def _say(error: UserError) -> int:
    if torchrun.rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _read_command() -> None:
    if "--version" in sys.argv[1:]:
        print(f"mtl {__version__}")
        sys.exit(0)
    arguments = unfold(parse(sys.argv[1:]))
    refuse_unquoted(arguments.overrides)
    arguments.overrides = fold([LOGGERS.get(word, word) for word in arguments.overrides])
    sys.argv[1:] = spelled(arguments)
    if arguments.multirun and torchrun.size() > 1:
        raise ConfigError("-m: torchrun starts one run at a time; leave -m away and call it once for each run")


def describe_groups() -> str:
    """Every option of every config group, with the first comment of its file. --help prints it."""
    lines = []
    for group in GROUPS:
        lines.append(f"  {group}")
        for file in sorted((CONF / group).glob("*.yaml"), key=_natural):
            comment = next(t for t in file.read_text().splitlines() if not t.startswith("# @package"))
            lines.append(f"    {file.stem:22s}{comment.lstrip('# ')}")
    return "\n".join(lines)


def _natural(file: Path) -> tuple[str, int]:
    """resnet20 before resnet110."""
    letters = file.stem.rstrip("0123456789")
    return letters, int(file.stem[len(letters) :] or 0)


OmegaConf.register_new_resolver("mtl.groups", describe_groups, replace=True)
OmegaConf.register_new_resolver("mtl.program", lambda: shlex.join(program()), replace=True)
