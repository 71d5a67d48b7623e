"""The command line around Hydra: help out of the config files, and errors of one line instead of tracebacks."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl.config import launchers, torchrun
from mtl.config.errors import ConfigError, SetupError, UserError, one_line, remove_empty, suggest
from mtl.config.identity import CONF
from mtl.config.program import program

TARGET = "_target_"
GROUPS = (
    "arch", "data", "loss", "optimizer", "schedule", "step", "microscope", "trainer", "logger", "study", "experiment",
)  # fmt: skip


def launch(main: Callable[[], None]) -> int:
    """Run a `@hydra.main` function; return the process's exit code.

    0: all runs finished. 1: a run failed, or the machine is at fault. 2: the command or config is wrong.
    130 / 143: interrupted by Ctrl-C / SIGTERM; the same command resumes.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand the exceptions to us instead of printing them over many lines
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as an earlier call in this process has left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.raiseExceptions = False  # a run goes on, without tracebacks, when whoever read its output (| head) is gone
    try:
        _check_flags()
        main()
        code = max(Grid.codes, default=0)
    except UserError as error:
        code = _say(error)
    except MissingConfigException as error:  # an OSError by inheritance, but not about the disk
        code = _say(translate(error))
    except BrokenPipeError:  # `python train.py --help | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        wrong = SetupError(f"cannot write to {error.filename}: {error.strerror}; set output_root=DIR")
        code = _say(launchers.explain(error) or wrong)
    except Exception as error:  # a run's own errors end in its outcome: what arrives here is Hydra's
        code = _say(translate(error))
    except (KeyboardInterrupt, Terminated) as error:
        code = _interrupted(error)
    try:
        code = max(code, Grid.close())
    except (KeyboardInterrupt, Terminated) as error:  # a second one, while the table is drawn
        code = _interrupted(error)
    # What is left is Python's own exit: a signal ends it at once, without a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (_terminate, signal.default_int_handler):
            signal.signal(number, signal.SIG_DFL)
    return code


def _interrupted(error: BaseException) -> int:
    return 143 if isinstance(error, Terminated) else 130


class Terminated(BaseException):
    """SIGTERM, as an exception: the run in progress notes that it was interrupted, the grid stops."""


def _terminate(signum, frame):
    raise Terminated


class Grid(Callback):
    """Remembers the multirun of this process and the outcome of its runs, for the closing table."""

    directory: Path | None = None
    codes: list[int] = []

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        Grid.directory = Path(config.hydra.sweep.dir)
        note = {"started": time.time(), "cells": _count(config.hydra)}
        with suppress(OSError):  # what Hydra writes next fails as well, and says so
            Grid.directory.mkdir(parents=True, exist_ok=True)
            (Grid.directory / "grid.json").write_text(json.dumps(note) + "\n")
        if line := launchers.announce(config.hydra):
            print(line, flush=True)

    @classmethod
    def close(cls) -> int:
        """Print the table of all runs of the grid; return 1 if one of them failed."""
        if cls.directory is None or not cls.directory.exists():
            return 0
        if not any(cls.directory.glob("cell-*.json")):  # refused before the first run began: leave nothing behind
            shutil.rmtree(cls.directory, ignore_errors=True)
            remove_empty(cls.directory.parents)
            return 0
        from mtl.study.grid import summarise  # late: it needs the plotting library

        return summarise(cls.directory)


def _count(hydra: DictConfig) -> int | None:
    """How many runs a grid has; None where a sweeper decides that as it goes (Optuna)."""
    if not str(hydra.sweeper[TARGET]).endswith("BasicSweeper"):
        return None
    words = [*(f"{k}={v}" for k, v in (hydra.sweeper.params or {}).items()), *hydra.overrides.task]
    sweeps = [o for o in OverridesParser.create().parse_overrides(words) if o.is_sweep_override()]
    return math.prod(sum(1 for _ in sweep.sweep_string_iterator()) for sweep in sweeps)


def _say(error: UserError) -> int:
    if torchrun.rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _check_flags() -> None:
    # argparse loses what follows a flag in the middle: `train.py logger=none -m seed=0,1` must work as well.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    parser = get_args_parser()

    def refuse(message: str):
        word = message.rpartition(": ")[2].split()[0]
        if message.startswith("unrecognized arguments") and word.startswith("--"):
            key = word.removeprefix("--").partition("=")[0]
            raise ConfigError(f"{word}: no such flag; options are written without dashes: {key}=VALUE")
        raise ConfigError(one_line(message))

    parser.error = refuse
    if parser.parse_args().multirun and torchrun.size() > 1:
        raise ConfigError("-m: torchrun starts one run at a time; leave -m away and call it once for each run")


def translate(error: Exception) -> UserError:
    """One line for what Hydra, OmegaConf and the launchers say over many."""
    if known := launchers.explain(error):
        return known
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        text = f"{group}={option}: no such option; {group} is one of {', '.join(error.options)}"
        return ConfigError(text + suggest(option, error.options))
    if isinstance(error, OverrideParseException):
        advice = "write it without spaces around = and quote values that hold spaces, commas or ~"
        return ConfigError(f"{error.override!r} is not KEY=VALUE; {advice}")
    if text.startswith("Ambiguous value for argument"):
        override = text.partition("'")[2].partition("'\n")[0]
        command = shlex.join([*program(), "-m", *sys.argv[1:]])
        return ConfigError(f"{override}: several values make a grid, which needs -m: {command}")
    if text.startswith("Config group override must be"):
        names = {arg.partition("=")[0] for arg in sys.argv[1:]}
        group = next((g for g in GROUPS if g in names), "a config group")
        return ConfigError(f"{group}: must be the name of one of its options, see --help ({one_line(text)})")
    if isinstance(getattr(cause, "parent_node", None), DictConfig) and " not in " in str(cause):
        # What is meant is a key of that name a level deeper (lr: optimizer.lr), or the nearest word beside the unknown.
        allowed, key = sorted(str(k) for k in cause.parent_node if k not in (TARGET, "hydra")), cause.full_key
        word, nodes = key.rpartition(".")[2], OmegaConf.to_container(cause.parent_node, resolve=False)
        deeper = [f"{name}.{word}" for name in allowed if isinstance(nodes[name], dict) and word in nodes[name]]
        nearest = f"; did you mean {' or '.join(deeper)}?" if deeper else suggest(word, allowed)
        return ConfigError(f"{key}: unknown key; allowed: {', '.join(allowed) or 'none'}{nearest}")
    return ConfigError(one_line(cause))


def describe_groups() -> str:
    """Every option of every config group with the first comment line of its file; shown by --help."""
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
