"""The command line around Hydra: help from the config files themselves, and errors of one line instead of tracebacks."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl.config.errors import ConfigError, SetupError, UserError, one_line, suggest

CONF = Path(__file__).parents[2] / "conf"
GROUPS = ("arch", "data", "loss", "optimizer", "schedule", "trainer", "logger", "experiment")


def launch(main: Callable[[], None]) -> int:
    """Run a `@hydra.main` function; return the process's exit code.

    0: all runs finished. 1: a run failed, or the machine is at fault. 2: the command or config is wrong.
    130 / 143: interrupted by Ctrl-C / SIGTERM; the same command resumes.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand the exceptions to us instead of printing them over many lines
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_flags()
        main()
        code = max(Grid.codes, default=0)
    except UserError as error:
        code = _say(error)
    except (HydraException, OmegaConfBaseException) as error:
        code = _say(_translate(error))
    except OSError as error:
        code = _say(SetupError(f"{error.strerror or one_line(error)}: {error.filename or 'output_root'}"))
    except (KeyboardInterrupt, Terminated) as error:
        code = 143 if isinstance(error, Terminated) else 130
    return max(code, Grid.close())


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

    @classmethod
    def close(cls) -> int:
        """Print the table of all runs of the grid; return 1 if one of them failed."""
        if cls.directory is None or not cls.directory.exists():
            return 0
        cells = sorted(cls.directory.glob("cell-*.json"))
        if not cells:  # refused before the first run began: leave nothing behind
            shutil.rmtree(cls.directory, ignore_errors=True)
            return 0
        from mtl.study.grid import summarise  # late: it needs the plotting library

        return summarise(cells)


def _say(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _check_flags() -> None:
    parser = get_args_parser()
    flags = [option for action in parser._actions for option in action.option_strings]

    def refuse(message: str):
        word = next((a for a in sys.argv[1:] if a.startswith("-") and a.partition("=")[0] not in flags), "")
        if word.startswith("--"):
            option = word.removeprefix("--")
            raise ConfigError(f"{word}: no such flag; options are written without dashes, e.g. {option.partition('=')[0]}=VALUE")
        raise ConfigError(one_line(message))

    parser.error = refuse
    parser.parse_args()


def _translate(error: Exception) -> ConfigError:
    """One line for what Hydra and OmegaConf say over many."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(
            f"{group}={option}: no such option; {group} is one of {', '.join(error.options)}{suggest(option, error.options)}"
        )
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"{error.override!r} is not KEY=VALUE; write it without spaces around = and quote values that hold , or spaces"
        )
    if isinstance(error, ConfigCompositionException) and "Could not override" in str(error):
        key = str(error).partition("Could not override '")[2].partition("'")[0].lstrip("+~")
        allowed = _keys_beside(cause, key)
        return ConfigError(f"{key}: unknown key; allowed: {', '.join(allowed)}{suggest(key.rpartition('.')[2], allowed)}")
    return ConfigError(one_line(cause))


def _keys_beside(error: Exception, key: str) -> list[str]:
    parent = getattr(error, "parent_node", None)
    names = [k for k in parent if k not in ("_target_", "hydra")] if isinstance(parent, DictConfig) else []
    return sorted(map(str, names)) or list(GROUPS)


def describe_groups() -> str:
    """Every option of every config group with the first comment line of its file; shown by --help."""
    lines = []
    for group in GROUPS:
        lines.append(f"  {group}")
        for file in sorted((CONF / group).glob("*.yaml"), key=lambda f: [int(t) if t.isdigit() else t for t in _parts(f.stem)]):
            comment = next(l for l in file.read_text().splitlines() if not l.startswith("# @package")).lstrip("# ")
            lines.append(f"    {file.stem:14s}{comment}")
    return "\n".join(lines)


def _parts(name: str) -> list[str]:
    """'resnet110' → ['resnet', '110', ''], so that numbers sort as numbers."""
    letters = name.rstrip("0123456789")
    return [letters, name[len(letters) :] or "0"]


OmegaConf.register_new_resolver("mtl.groups", describe_groups, replace=True)
