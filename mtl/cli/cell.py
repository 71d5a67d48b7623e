"""One command, or one cell of a grid: train it or plan it, and note the outcome for the grid's closing table."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
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
from mtl.cli.command import Grid, translate
from mtl.cli.grid import progress
from mtl.cli.overrides import refuse_hidden, repeat
from mtl.cli.plan import plan, plan_table
from mtl.config import schema, source, torchrun
from mtl.config.identity import identify, own_code
from mtl.engine.build import check
from mtl.engine.directory import write_json
from mtl.engine.replay import objective
from mtl.engine.run import Outcome, run
from mtl.errors import Busy, ConfigError, UserError, one_line, out_of_memory
from mtl.parallel.processes import together
from mtl.report.runs import load

log = logging.getLogger("mtl")


@dataclass(frozen=True)
class Study:
    """What happens around a run.

    Args:
        plan: say what is already there and how long the rest will take, and train nothing.
        baselines: auto first trains every task alone (loss=single) under the same config and seed, unless that is done.
    """

    plan: bool = False
    baselines: Literal["none", "auto"] = "none"


def run_from_hydra(config: DictConfig) -> float | None:
    """Run one composed config. In a grid, the outcome is noted beside the other cells' and the grid goes on.

    Returns:
        what a Hydra sweeper searches by: the best validation figure; None where there is none (a failed trial).
    """
    hydra = HydraConfig.get()
    grid = hydra.mode == RunMode.MULTIRUN
    away = grid and Grid.directory is None  # in a process that a launcher started
    if not log.handlers:
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.INFO)
        log.addHandler(console)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        if away:
            launchers.enter(hydra, console)
    # As typed: resolving would trip over an interpolation that leads nowhere.
    words, choices = OmegaConf.to_container(hydra.overrides.task, resolve=False), dict(hydra.runtime.choices)
    try:
        refuse_hidden(hydra)
        cells = _cells(config, choices, words)
    except UserError as error:
        cells = [(None, choices, words)]
        refused = Outcome("refused", error.exit_code, message=str(error))
    for i, (plain, chosen, typed) in enumerate(cells):
        command, since = repeat(hydra, typed), time.perf_counter()
        if grid:
            suffix = f"-{i}" if i < len(cells) - 1 else ""  # the baselines of a cell stand before it
            file = Path(hydra.sweep.dir) / f"cell-{hydra.job.num:05d}{suffix}.json"
            write_json(file, {"command": command, **asdict(Outcome("running", 0))})
        if away:
            launchers.note(hydra.job.num, f"started: {command}")
        with launchers.at_work() if away else nullcontext():
            if plain is None:
                outcome = refused
            elif away:
                outcome = launchers.when_free(partial(execute, plain, chosen, command, away))
            else:
                outcome = execute(plain, chosen, command)
        outcome, found = _objective(outcome)
        if outcome.message and torchrun.rank() == 0:
            print(f"error: {outcome.message}", file=sys.stderr)
        if away:
            where = f", in {outcome.directory}" if outcome.directory else ""
            launchers.note(hydra.job.num, f"{outcome.status}{where}")
        if grid:
            write_json(file, {"command": command, "seconds": time.perf_counter() - since, **asdict(outcome)})
            if outcome.plan is None and not suffix:
                log.info(progress(file.parent))
        elif outcome.plan:
            log.info(plan_table([outcome.plan]))
        Grid.codes.append(outcome.code)
    return found


def _objective(outcome: Outcome) -> tuple[Outcome, float | None]:
    """What a sweeper searches by; a finished run whose files are damaged counts as damaged, not as finished."""
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


def _cells(config: DictConfig, choices: dict[str, str], words: list[str]) -> list[Command]:
    """The run that a command describes, after those of its single-task baselines where they are asked for.

    Raises:
        UserError: an interpolation leads nowhere, or the study or data node is wrong.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    schema.check(plain.get("study"), "study")
    cells, study = [(plain, choices, words)], schema.build(plain["study"], "study")
    if torchrun.size() > 1 and study != Study():
        raise ConfigError("study: torchrun starts one run at a time; plan and train baselines without it")
    return [*single_tasks(plain, choices, words), *cells] if study.baselines == "auto" else cells


def execute(config: Mapping[str, Any], choices: Mapping[str, str], command: str, patient: bool = False) -> Outcome:
    """Train or plan one config; whatever goes wrong becomes the outcome.

    Args:
        config: resolved, as plain Python objects.
        choices: the option chosen in each config group.
        command: the command line that describes it.
        patient: the caller waits for another process that is at work on it.

    Raises:
        Busy: where the caller is patient.
    """
    try:
        filled = fill(config, choices)
        check(filled)
        # By the config as typed: single-task results that were filled in differ from seed to seed.
        identity = identify(config, choices)
        if module := source.changed(own_code(config)):
            raise ConfigError(f"{module} was changed while this command ran; the same command again runs the new code")
        if config["study"]["plan"]:
            return plan(filled, identity)
        with together() as processes:
            return run(filled, choices, identity, command, processes)
    except Busy as error:
        if patient:
            raise
        return Outcome("running elsewhere", error.exit_code, message=str(error))
    except UserError as error:
        # Where the engine has put an error of the user's own code into its words, the place is still missing.
        return Outcome("refused", error.exit_code, message=f"{error}{source.blame(error)}")
    except Exception as error:  # a user's own code, or a bug of ours, before the run had a log to put it into
        reason = "not enough memory" if out_of_memory(error) else type(error).__name__
        return Outcome("failed", 1, message=f"{reason}: {one_line(error)}{_told(error)}")


def _told(error: Exception) -> str:
    """Where the error comes from, with the file that has its traceback."""
    file = source.keep(error)
    return source.blame(error) or (f" (traceback in {file})" if file else "")
