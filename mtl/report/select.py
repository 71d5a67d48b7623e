"""Which epoch's values stand for a run: two rules beside last, best and selected, on request (`--select`).

last10: the mean of the last ten epochs, as CAGrad, Nash-MTL, FAMO and FairGrad report it.

delta_m: early stopping as Elich et al. do it. Of each run it takes the epoch whose validation metrics have the best Δm
against the baseline (`mtl.report.baselines`). A single-task run has the epoch that its own validation metric chose.
Constants are what they are. This is a rule of the report: a run that trains to its end and then goes back to its best
epoch has the values of one that was stopped, with a patience that was long enough. So one run serves all rules. The
trainer's own `trainer.patience` saves time, but follows what chooses best.pt, and not Δm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mtl.errors import ConfigError, suggest
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import LAST, SELECTIONS, Run
from mtl.report.scores import Scores


def select(rule: str, benchmarks: Sequence[Protocol]) -> list[str]:
    """Make `rule` the main selection of every benchmark that has it. The baselines have been chosen before.

    Returns:
        a line for each benchmark that has not, and keeps its own.

    Raises:
        ConfigError: there is no such rule, or no benchmark has it.
    """
    check(rule)
    lines = []
    for benchmark in benchmarks:
        if lacks := lacking(rule, benchmark) or (_stop(benchmark) if rule == "delta_m" else ""):
            lines.append(f"--select {rule}: not of {benchmark.name}, which {lacks}; {benchmark.main} stands there")
        else:
            benchmark.select = rule
    if lines and len(lines) == len(benchmarks):
        raise ConfigError(lines[0].rpartition(";")[0])
    return lines


def check(rule: str) -> None:
    """Raises ConfigError: there is no such rule."""
    if rule not in SELECTIONS:
        raise ConfigError(f"--select {rule}: one of {', '.join(SELECTIONS)}{suggest(rule, SELECTIONS)}")


def lacking(rule: str, benchmark: Protocol) -> str:
    """What the runs of a benchmark lack for a rule; empty if nothing. Baselines are another matter."""
    runs = [r for g in [*benchmark.groups, *benchmark.baselines] for r in g.runs]
    shortest = min((len(curve) for r in runs for curve in r.curves.values()), default=0)
    if rule == "last10" and shortest < LAST:
        return f"has runs of {shortest} epochs; {LAST} or more are needed"
    if rule in ("selected", "delta_m") and not (runs and all(r.summary.get("selected") for r in runs)):
        return "has runs without validation data (data.val_fraction)"
    return ""


def _stop(benchmark: Protocol) -> str:
    """Choose the epochs of delta_m; what the benchmark lacks for it, empty if nothing."""
    for arch in benchmark.archs:
        scores = Scores(benchmark, arch)
        for group in scores.groups:
            if tasks := [task for task in benchmark.tasks if benchmark.baseline(group, task) is None]:
                if benchmark.common:
                    return f"lacks single-task runs of {', '.join(tasks)} on {arch}"
                return (
                    f"lacks single-task runs with the config of {group.label} (study.baselines=auto); --baseline best "
                    "holds all strategies against the best ones"
                )
            for run in group.runs:
                if epoch := _stopped(run, group, scores):
                    run.chosen["delta_m"] = epoch
        if scores.groups and not any("delta_m" in r.chosen for g in scores.groups for r in g.runs):
            return f"has no finite Δm on validation data on {arch}"
    for run in (r for b in benchmark.baselines for r in b.runs):
        run.chosen["delta_m"] = run.summary["selected"]["epoch"]
    return ""


def _stopped(run: Run, group: Group, scores: Scores) -> int | None:
    """The epoch, from 1, with the best Δm on validation data; of equal ones the first. None where no epoch has a Δm."""
    potentials = scores.potentials(run, group, scores.gained, "selected", "val")
    higher = [scores.metrics[m] for m in scores.gained]
    lines = [run.curves.get(f"val/{m}", np.array([])) for m in scores.gained]
    gains = [scores.gain(values, potentials, higher) for values in zip(*lines, strict=False)]
    best = max((g for g in gains if math.isfinite(g)), default=None)
    return None if best is None else 1 + gains.index(best)
