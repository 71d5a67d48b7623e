"""Plan before you pay: how many epochs of a run are done, and how long the rest will take on this machine."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mtl.config.identity import Identity, canonical, decisive, today
from mtl.data.batches import EvaluationBatches, TrainingBatches
from mtl.engine.build import assemble
from mtl.engine.directory import RunDirectory
from mtl.engine.outcome import Outcome
from mtl.errors import UserError
from mtl.tracking.console import count, duration, table

log = logging.getLogger("mtl")
STEPS = 3  # timed, after one that is not


def plan(config: Mapping[str, Any], identity: Identity, measured: dict[str, float]) -> Outcome:
    """Find out how much of a run is left; train nothing.

    Args:
        config: resolved and checked, as plain Python objects.
        identity: of the run.
        measured: seconds of an epoch of each group that was timed before; a new group is added.

    Returns:
        an outcome with status "planned" and a plan: the state (finished, running, interrupted, failed, …, new), the
        epochs and seconds that are left, and the source of the seconds: "as seed0 took", or "measured" on a few steps.
        With `trainer.patience` fewer may be left.

    Raises:
        UserError: the config does not fit together, or the data is not there.
    """
    path = identity.directory(config["output_root"])
    directory = RunDirectory(path)
    status, epochs = directory.run.get("status", "new"), config["trainer"]["epochs"]
    if status == "running" and not directory.busy:
        status = "interrupted"  # killed before it could note that
    settled = status == "finished" or (status == "diverged" and config["study"].get("diverged") != "again")
    left = 0 if settled else epochs - len(directory.rows())
    seconds, source = 0.0, ""
    if left:
        seconds, source = _epoch_seconds(config, identity, path, measured)
    found = {"name": identity.title, "state": status, "epochs": left, "seconds": left * seconds, "source": source,
             "others": _of_other_epochs(config, path) if status == "new" else [],
             "may_stop": bool(left and config["trainer"].get("patience"))}  # fmt: skip
    return Outcome("planned", 0, str(path), plan=found)


def plan_table(plans: Sequence[Mapping[str, Any]]) -> str:
    """The table of all plans, with the total time."""
    rows = [
        [p["name"], p["state"], str(p["epochs"] or ""), duration(p["seconds"]) if p["epochs"] else "", p["source"]]
        for p in plans
    ]
    said = ", ".join(f"{n} {state}" for state, n in Counter(p["state"] for p in plans).items())
    total = duration(sum(p["seconds"] for p in plans))
    lines = [
        table(["run", "state", "epochs left", "time", "known"], rows),
        f"{count(len(plans), 'run')} ({said}); about {total} of training left, one after another on this machine",
    ]
    if longer := [p for p in plans if p.get("others")]:
        known = sorted({epochs for p in longer for epochs in p["others"]})
        lines.append(
            f"note: {len(longer)} of the new runs {'has' if len(longer) == 1 else 'have'} finished with another number "
            f"of epochs ({', '.join(map(str, known))}); a run cannot be lengthened, so these start from the first epoch"
        )
    if early := sum(p.get("may_stop", False) for p in plans):
        lines.append(f"note: trainer.patience may stop {early} of the runs earlier; epochs and time are the most")
    return "\n".join(lines)


def _of_other_epochs(config: Mapping[str, Any], path: Path) -> list[int]:
    """The epochs of finished runs that share all the rest of the config, and the seed."""

    def rest(node: Mapping[str, Any]) -> str:
        content = decisive({**node, "trainer": {**node["trainer"], "epochs": 0}})
        return json.dumps(canonical(content), sort_keys=True)

    found = []
    for folder in sorted(path.parents[1].glob(f"*/{path.name}")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, UserError):
            other = today(yaml.safe_load((folder / "config.yaml").read_text()))
            if RunDirectory(folder).run.get("status") == "finished" and rest(other) == rest(config):
                found.append(other["trainer"]["epochs"])
    return found


def _epoch_seconds(
    config: Mapping[str, Any], identity: Identity, path: Path, measured: dict[str, float]
) -> tuple[float, str]:
    """Seconds of one epoch: of this run or of another seed if one has begun, or else measured now."""
    for other in [path, *sorted(path.parent.glob("seed*"))]:
        if rows := RunDirectory(other).rows():
            return statistics.median(row["time/seconds"] for row in rows), f"as {other.name} took"
    if identity.group not in measured:
        log.info(f"timing a few steps of {identity.group}")
        measured[identity.group] = _measure(config)
    return measured[identity.group], "measured"


def _measure(config: Mapping[str, Any]) -> float:
    """Time a few training steps and one batch of each evaluation; the model that learns is thrown away."""
    benchmark, learner = assemble(config)
    splits = benchmark.splits()
    train, size = splits.pop("train"), benchmark.batch_size
    samples = benchmark.draws(train).samples

    def train_on(steps: int) -> float:
        part = TrainingBatches(train.select(slice(steps * size)), benchmark, learner.device, learner.seed, 2)
        return learner.train_epoch(part, 0)["time/seconds"] / len(part)

    train_on(1)  # the first step pays for allocations and for the choice of algorithms
    seconds = train_on(STEPS) * max(1, samples / size)
    for name, split in splits.items():
        batches = EvaluationBatches(split.select(slice(benchmark.eval_batch_size)), benchmark, learner.device)
        since = time.perf_counter()
        learner.evaluate(batches, name)
        seconds += (time.perf_counter() - since) * len(split) / batches.size
    return seconds
