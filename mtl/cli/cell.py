"""One command, or one cell of a grid: train it or plan it, and note the outcome for the grid's closing table."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl.cli import launchers
from mtl.cli.baselines import Command, fill, single_tasks
from mtl.cli.command import translate, under_way
from mtl.cli.grid import progress
from mtl.cli.overrides import refuse_hidden, repeat
from mtl.cli.parts import with_parts
from mtl.cli.plan import plan, plan_table
from mtl.config import schema, source, torchrun
from mtl.config.environment import activation
from mtl.config.identity import identify, own_code
from mtl.engine.build import check
from mtl.engine.directory import RunDirectory, write_json
from mtl.engine.follow import Follower
from mtl.engine.outcome import Outcome
from mtl.engine.replay import objective
from mtl.engine.run import Job, prepare
from mtl.errors import Busy, ConfigError, UserError, one_line, out_of_memory
from mtl.parallel.processes import together
from mtl.report.runs import load
from mtl.tracking.console import Console, clear_line

log = logging.getLogger("mtl")
RUNNING = Outcome("running", 0)


@dataclass(frozen=True)
class Study:
    """What happens around a run.

    Args:
        plan: show which runs are done and how long the rest will take; train nothing.
        baselines: auto first trains every task alone (loss=single), with the same config and seed.
        diverged: keep leaves a run alone that has diverged before, since it would do so again; again trains it.
    """

    plan: bool = False
    baselines: Literal["none", "auto"] = "none"
    diverged: Literal["keep", "again"] = "keep"


def run_from_hydra(config: DictConfig) -> float | None:
    """Run one composed config. In a grid, the outcome is noted beside the other cells' and the grid goes on.

    Returns:
        the best validation value, which a Hydra sweeper optimises; None if there is none (a failed trial).
    """
    hydra, launched = HydraConfig.get(), under_way()
    away = hydra.mode == RunMode.MULTIRUN and launched.directory is None  # in a process that a launcher started
    _open_console(hydra, away)
    for cell in _cells(config, hydra, away):
        job = None  # the network and the data of the run before make room for the next one's
        cell.begin()
        with launchers.at_work() if away else nullcontext(), cell, ExitStack() as stack:
            start = partial(cell.prepare, stack, launched.measured)
            job = launchers.when_free(start) if away else start()
            cell.outcome = job if isinstance(job, Outcome) else job.execute()
        found = cell.end()
        launched.codes.append(cell.outcome.code)
    return found


def _open_console(hydra: DictConfig, away: bool) -> None:
    """Print the log of this process's runs, from its first run on."""
    if not log.handlers:
        console = Console(sys.stdout)
        console.setLevel(logging.INFO)
        log.addHandler(console)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        if away:
            launchers.enter(hydra, console)


@dataclass
class Cell:
    """One run of a command, and the note of how it went. In a grid the note is a file beside the other cells'.

    It is a context manager for the run's work: whatever goes wrong in the block becomes the outcome. A signal passes.

    Attributes:
        config: resolved, as plain Python objects.
        choices: the option chosen in each config group.
        command: the command line that describes it.
        number: of the grid's cell.
        note: the file in the grid's record; None for a single run.
        away: this process was started by a launcher.
        last: it is the run itself, not one of its single-task baselines.
        refused: why there is no config to run.
        words: the overrides that describe it.
        outcome: how the run ended.
    """

    config: Mapping[str, Any]
    choices: Mapping[str, str]
    command: str
    number: int = 0
    note: Path | None = None
    away: bool = False
    last: bool = True
    refused: UserError | None = None
    words: Sequence[str] = ()
    outcome: Outcome = RUNNING

    def begin(self) -> None:
        """Note that the cell is at work."""
        self.since = time.perf_counter()
        if self.note is not None:
            write_json(self.note, {"command": self.command, **asdict(self.outcome)})
        if self.away:
            launchers.note(self.number, f"started: {self.command}")

    def prepare(self, stack: ExitStack, measured: dict[str, float]) -> Job | Follower | Outcome:
        """What to execute, until `stack` closes; or the outcome, where nothing is left to do.

        Raises:
            UserError: the run cannot begin, or there is no config to run.
        """
        if self.refused is not None:
            raise self.refused
        return stack.enter_context(prepared(self.config, self.choices, self.command, measured))

    def __enter__(self) -> Cell:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Busy):
            # In a grid it is no failure: the other process reports that run.
            code = error.exit_code if self.note is None else 0
            path = identify(self.config, self.choices).directory(self.config["output_root"])
            self.outcome = Outcome("running elsewhere", code, str(path), str(error))
        elif isinstance(error, UserError):
            # If the engine has reworded an error of the user's own code, the file and line are still missing.
            self.outcome = Outcome("refused", error.exit_code, message=f"{error}{source.blame(error)}")
        elif isinstance(error, Exception):  # a user's own code, or a bug of ours, before the run had a log for it
            reason = "not enough memory" if out_of_memory(error) else type(error).__name__
            self.outcome = Outcome("failed", 1, message=f"{reason}: {one_line(error)}{_told(error)}")
        return isinstance(error, Exception)

    def end(self) -> float | None:
        """Note and print the outcome; return the value that a sweeper optimises."""
        outcome, found = confirmed(self.outcome)
        self.outcome = outcome
        if outcome.message and outcome.code == 0:
            log.info(f"elsewhere {outcome.message}")
        elif outcome.message and torchrun.rank() == 0:
            clear_line()
            print(f"error: {outcome.message}", file=sys.stderr)
        if self.away:
            where = f", in {outcome.directory}" if outcome.directory else ""
            launchers.note(self.number, f"{outcome.status}{where}")
        if self.note is not None:
            seconds = time.perf_counter() - self.since
            write_json(self.note, {"command": self.command, "seconds": seconds, **asdict(outcome)})
            if outcome.plan is None and self.last:
                log.info(progress(self.note.parent))
        elif outcome.status == "finished" and (line := activation()) and torchrun.rank() == 0:
            log.info(f"first:     {line}")
        elif outcome.plan:
            log.info(plan_table([outcome.plan]))
        return found


@contextmanager
def prepared(
    config: Mapping[str, Any], choices: Mapping[str, str], command: str, measured: dict[str, float]
) -> Iterator[Job | Follower | Outcome]:
    """Check one config and build its run, whose `execute` then trains it inside this block; or plan it.

    Args:
        config: resolved, as plain Python objects.
        choices: the option chosen in each config group.
        command: the command line that describes it.
        measured: as in `mtl.cli.plan.plan`.

    Raises:
        Busy: another process is at work on this run.
        UserError: the run cannot begin.
    """
    filled = fill(config, choices)
    check(filled)
    # By the config as typed: single-task results that were filled in differ from seed to seed.
    identity = identify(config, choices)
    if module := source.changed(own_code(config)):
        raise ConfigError(f"{module} was changed while this command ran; the same command again runs the new code")
    if config["study"]["plan"]:
        yield plan(filled, identity, measured)
        return
    if config["study"].get("diverged", "keep") == "keep" and (kept := _kept(identity.directory(config["output_root"]))):
        yield kept
        return
    with together() as processes, prepare(filled, choices, identity, command, processes) as job:
        yield job


def _kept(path: Path) -> Outcome | None:
    """The outcome of a run that has diverged before: the same config diverges again."""
    run = RunDirectory(path).run
    if run.get("status") != "diverged":
        return None
    return Outcome("diverged", 1, str(path), f"{run.get('error')} (before; study.diverged=again trains it again)")


def confirmed(outcome: Outcome) -> tuple[Outcome, float | None]:
    """The outcome, and the value that a sweeper optimises. A finished run with damaged files counts as damaged."""
    # Under torchrun the files are the first process's, which may still be writing them.
    if outcome.status != "finished" or torchrun.rank() != 0:
        return outcome, None
    try:
        reasons = [reason for _, reason in load([outcome.directory]).damaged]
        found = None if reasons else objective(outcome.directory)
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        reasons = [one_line(error) or type(error).__name__]
    if reasons:
        message = f"{outcome.directory}: {reasons[0]}; delete that folder to run it again"
        return Outcome("damaged", 1, outcome.directory, message), None
    return outcome, found


def _cells(config: DictConfig, hydra: DictConfig, away: bool) -> list[Cell]:
    """The run that a command describes. With study.baselines=auto, its single-task runs come first."""
    # As typed: resolving would trip over an interpolation that leads nowhere.
    words, choices = OmegaConf.to_container(hydra.overrides.task, resolve=False), dict(hydra.runtime.choices)
    refused = None
    try:
        refuse_hidden(hydra)
        found = commands(config, choices, words, hydra)
    except UserError as error:
        found, refused = [({}, choices, words)], error
    grid, cells = hydra.mode == RunMode.MULTIRUN, []
    for i, (plain, chosen, typed) in enumerate(found):
        last = i == len(found) - 1
        number = hydra.job.num if grid else 0
        note = Path(hydra.sweep.dir) / f"cell-{number:05d}{'' if last else f'-{i}'}.json" if grid else None
        cells.append(Cell(plain, chosen, repeat(hydra, typed), number, note, away, last, refused))
    return cells


def commands(config: DictConfig, choices: dict[str, str], words: list[str], hydra: DictConfig) -> list[Command]:
    """The command of each run.

    Raises:
        UserError: an interpolation leads nowhere, or the study or data node is wrong.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    plain = with_parts(plain, hydra)
    schema.check(plain.get("study"), "study")
    commands, study = [(plain, choices, words)], schema.build(plain["study"], "study")
    if torchrun.size() > 1 and (study.plan or study.baselines != "none"):
        raise ConfigError("study: torchrun starts one run at a time; plan and train baselines without it")
    return [*single_tasks(plain, choices, words), *commands] if study.baselines == "auto" else commands


def _told(error: Exception) -> str:
    """The line that raised the error, and the file with the traceback."""
    file = source.keep(error)
    return source.blame(error) or (f" (traceback in {file})" if file else "")
