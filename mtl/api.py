"""`mtl.train` and `mtl.grid`: runs from Python, in a script or a notebook, as `train.py` starts them.

Identity, folder, resuming and skipping of a run are as on the command line: both share all the code below
Hydra. Nothing of Hydra, of logging or of the process's signals is changed for longer than a call.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf

from mtl.cli.cell import Cell, commands, confirmed
from mtl.cli.explain import translate
from mtl.cli.overrides import parse, refuse_hidden, repeat, spell, unfold
from mtl.cli.parts import fold
from mtl.config.identity import CONF
from mtl.engine.directory import RunDirectory
from mtl.engine.files import read_json, write_text
from mtl.engine.outcome import Outcome
from mtl.errors import Busy, ConfigError, Diverged, SetupError, UserError
from mtl.tracking.console import table

STATUSES = {"running elsewhere": Busy, "diverged": Diverged}
ALONE = ("loss", "loss.task")  # what a single-task baseline has of its own
_hydra = threading.RLock()  # Hydra has one state for the process


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        status: finished; or planned, where only a plan was asked for.
        directory: of the run; `mtl.load(result.directory)` has its model.
    """

    status: str
    directory: Path

    @property
    def rows(self) -> list[dict[str, float]]:
        """metrics.jsonl, one row per epoch: losses, metrics, weights, times."""
        return RunDirectory(self.directory).rows()

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: best and last test figures, parameters, speed; empty for a plan."""
        return read_json(self.directory / "summary.json") if self.status == "finished" else {}


@dataclass(frozen=True)
class GridResult:
    """The runs of a grid; `pandas.DataFrame(result.rows)` is a data frame of them.

    Attributes:
        rows: one for each run: the options that are swept, its status, its folder, an error message, and the
            test figures of the last epoch, such as "digit_accuracy", where it finished.
    """

    rows: list[dict[str, Any]]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as a CSV file; what a run does not have is an empty field.

        Raises:
            SetupError: the file cannot be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if _absent(v) else v for k, v in row.items()} for row in self.rows)
        write_text(Path(path), text.getvalue())

    def __str__(self) -> str:
        columns = [c for c in self._columns() if c not in ("directory", "message")]
        return table(columns, [[_shown(row.get(c)) for c in columns] for row in self.rows]) if self.rows else "no runs"

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))


def train(*words: str, **options: Any) -> RunResult:
    """Train one run, or go on with it, or find it finished: `mtl.train("data=digits", "loss=pcgrad", seed=0)`.

    Args:
        words: as on the command line.
        options: the same as keywords. A dict holds keys of a node: `optimizer={"lr": 0.1}` is optimizer.lr=0.1.

    Raises:
        UserError: the line that the command line prints: a wrong option, missing data, a run that diverged or failed.
    """
    spelled = [*words, *_spell(options, sweep=False)]
    with _composer(spelled) as (compose_cell, overrides):
        if swept := [o.input_line for o in overrides if o.is_sweep_override()]:
            raise ConfigError(f"{swept[0]}: several values make a grid; use mtl.grid, or quote a value with a comma")
        cells = compose_cell([o.input_line for o in overrides])
    for cell in cells:
        outcome = _execute(cell)
        if outcome.code:
            kind = STATUSES.get(outcome.status, ConfigError if outcome.code == 2 else SetupError)
            raise kind(outcome.message)
    return RunResult(outcome.status, Path(outcome.directory))


def grid(*words: str, **options: Any) -> GridResult:
    """Train every combination: `mtl.grid("data=digits", "loss=equal,pcgrad", seed=[0, 1, 2])`.

    Finished runs are found and not trained again. A run that fails has its status and message in its row.

    Args:
        words: as on the command line after -m.
        options: the same as keywords; a list holds the values of a sweep.

    Raises:
        UserError: an option is wrong; nothing was trained.
    """
    spelled = [*words, *_spell(options, sweep=True)]
    with _composer(spelled) as (compose_cell, overrides):
        try:
            combinations = BasicSweeper.split_arguments(overrides, None)[0]
        except Exception as error:  # whatever Hydra says to interval(0, 1)
            raise translate(error, spelled) from error
        # To Hydra, a list of one value is no sweep.
        listed = [key for key, value in _flatten(options).items() if isinstance(value, list)]
        swept = [k for o in overrides if (k := o.get_key_element()) in listed or o.is_sweep_override()]
        cells = [(chosen, cell) for chosen in combinations for cell in compose_cell(chosen)]
    rows: dict[str, dict[str, Any]] = {}
    measured: dict[str, float] = {}
    for chosen, cell in cells:
        differs = _values(chosen, swept) | ({} if cell.last else _values(cell.words, ALONE))
        outcome = _execute(cell, measured)
        rows.setdefault(outcome.directory or cell.command, _row(differs, outcome))
    return GridResult(list(rows.values()))


def _execute(cell: Cell, measured: dict[str, float] | None = None) -> Outcome:
    with _heard(), cell, ExitStack() as stack:
        job = cell.prepare(stack, {} if measured is None else measured)
        cell.outcome = job if isinstance(job, Outcome) else job.execute()
    return confirmed(cell.outcome)[0]


def _row(differs: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    row = {**differs, "status": outcome.status, "directory": outcome.directory, "message": outcome.message}
    if outcome.status == "finished":
        last = read_json(Path(outcome.directory) / "summary.json")["last"]
        row |= {key.removeprefix("test/"): math.nan if value is None else value for key, value in last.items()}
    if outcome.plan:
        row |= {key: outcome.plan[key] for key in ("state", "epochs", "seconds")}
    return row


# -- Hydra without its command line -----------------------------------------------------------------------------------


@contextmanager
def _composer(words: Sequence[str]) -> Iterator[tuple[Any, list[Any]]]:
    """The function that makes the cells of some overrides, and the parsed overrides of `words`.

    Afterwards Hydra's state is as before: a notebook, or a program that uses Hydra itself, may have one.

    Raises:
        UserError: a word is wrong.
    """
    with _hydra, ExitStack() as stack:
        stack.callback(_restore, GlobalHydra.instance().hydra, VersionBase.instance().getbase())
        GlobalHydra.instance().clear()
        if wrong := [word for word in words if not isinstance(word, str)]:
            raise ConfigError(f"{wrong[0]!r:.80}: a word of the command line is needed, such as 'loss=dwa'")
        try:
            arguments = unfold(parse(list(words)))
            arguments.overrides = fold(arguments.overrides)
            if arguments.multirun:
                raise ConfigError("-m: leave it away; mtl.grid makes a grid, and mtl.train a run")
            for word in arguments.overrides:
                if word.lstrip("+~").startswith("hydra") and not word.startswith("hydra.searchpath="):
                    raise ConfigError(f"{word}: options of Hydra belong to the command line: train.py -m {word} …")
            folder = os.path.abspath(arguments.config_path or CONF)
            stack.enter_context(initialize_config_dir(version_base="1.3", config_dir=folder))
            overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(
                arguments.overrides
            )
        except UserError:
            raise
        except Exception as error:
            raise translate(error, words) from error
        searched = (
            [f"hydra.searchpath=[file://{os.path.abspath(arguments.config_dir)}]"] if arguments.config_dir else []
        )

        def compose_cell(overrides: Sequence[str]) -> list[Cell]:
            try:
                config = compose(arguments.config_name or "config", [*searched, *overrides], return_hydra_config=True)
            except Exception as error:
                raise translate(error, words) from error
            return _cells(config)

        yield compose_cell, overrides


def _restore(hydra: Any, base: Any) -> None:
    GlobalHydra.instance().hydra = hydra
    VersionBase.instance().setbase(base)


def _cells(config: DictConfig) -> list[Cell]:
    """The run that a composed config describes. Its single-task baselines come first, if they are wanted."""
    hydra = config.hydra
    refuse_hidden(hydra)
    typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    plain = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    found = commands(plain, dict(hydra.runtime.choices), typed, hydra)
    if own := re.search(
        r'"_target_": "(__main__\.[^"]*)', json.dumps([content for content, _, _ in found], default=str)
    ):
        raise ConfigError(f"{own[1]}: a run must know its code, and code of a notebook or script is in no file of its "
                          "own; put the class into a module, as in my_net.py, and name my_net.…")  # fmt: skip
    return [
        Cell(content, choices, repeat(hydra, words), words=words, last=i == len(found) - 1)
        for i, (content, choices, words) in enumerate(found)
    ]


def _values(words: Iterable[str], keys: Sequence[str]) -> dict[str, Any]:
    """{key: value} of those overrides that set one of `keys`; the last one counts."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    return {o.get_key_element(): o.value() for o in parsed if o.get_key_element() in keys}


def _flatten(options: Mapping[str, Any], node: str = "") -> dict[str, Any]:
    """Keywords by the keys of the command line: {"optimizer": {"lr": 0.1}} as {"optimizer.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping) and not node and "." not in key:
            flat |= _flatten(value, f"{key}.")
        else:
            flat[f"{node}{key}"] = _plain(value, f"{node}{key}")
    return flat


def _spell(options: Mapping[str, Any], sweep: bool) -> list[str]:
    """Keywords as words of the command line; in a grid, a list is a sweep."""
    words = []
    for key, value in _flatten(options).items():
        several = sweep and isinstance(value, list)
        if several and not value:
            raise ConfigError(f"{key}: an empty list leaves nothing to train")
        words.append(f"{key}={','.join(map(spell, value)) if several else spell(value)}")
    return words


def _plain(value: Any, key: str) -> Any:
    """`value` as YAML has it: arrays, tuples and ranges as lists, paths as strings.

    Raises:
        ConfigError: YAML has nothing like it.
    """
    if isinstance(value, Mapping):
        return {str(name): _plain(item, key) for name, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # an array, a tensor, or one number of them
        return value.tolist()
    if isinstance(value, list | tuple | range):
        return [_plain(item, key) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    raise ConfigError(
        f"{key}: {kind} is no number, string, list or dict; a class goes by its path, as in {key}._target_"
    )


# -- what the user hears ----------------------------------------------------------------------------------------------


class _Onward(logging.Handler):
    """Hands on, from its level up, to the handlers that the user has set up."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().callHandlers(record)


_log = logging.getLogger("mtl")
_onward = _Onward()
_calls: list[None] = []  # calls under way, in several threads perhaps: the first one opens, the last one closes
_before: list[tuple[int, bool]] = []
_lock = threading.Lock()


@contextmanager
def _heard() -> Iterator[None]:
    """train.log gets every line in this block. The user hears what their own logging lets through: mtl's lines are
    of level INFO, so `logging.basicConfig(level="INFO")` shows the epochs."""
    with _lock:
        if not _calls and _log.propagate:
            _before.append((_log.level, _log.propagate))
            _onward.setLevel(_log.getEffectiveLevel())
            _log.addHandler(_onward)
            _log.setLevel(logging.DEBUG)
            _log.propagate = False
        _calls.append(None)
    try:
        yield
    finally:
        with _lock:
            _calls.pop()
            if not _calls and _before:
                level, propagate = _before.pop()
                _log.removeHandler(_onward)
                _log.setLevel(level)
                _log.propagate = propagate


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
