"""Which epoch's values stand for a run: two rules beside last, best and selected, on request (`--select`).

last10: the mean of the last ten epochs, as CAGrad, Nash-MTL, FAMO and FairGrad report it.

delta_m: early stopping as Elich et al. do it. Of each run it takes the epoch whose validation metrics have the best Δm
against single-task learning. A single-task run has the epoch that its own validation metric chose. This is a rule of
the report: a run that trains to its end and then goes back to its best epoch has the values of one that was stopped,
with a patience that was long enough. So one run serves all rules. The trainer's own `trainer.patience` saves time, but
follows what chooses best.pt, and not Δm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from mtl.errors import ConfigError, suggest
from mtl.report import multitask
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import LAST, SELECTIONS, Run
from mtl.report.scores import Scores
from mtl.report.statistics import mean
from mtl.report.validate import number


def select(rule: str, benchmarks: Sequence[Protocol]) -> list[str]:
    """Make `rule` the main selection of every benchmark that has it.

    Returns:
        a line for each benchmark that has not, and keeps its own.

    Raises:
        ConfigError: there is no such rule, or no benchmark has it.
    """
    if rule not in SELECTIONS:
        raise ConfigError(f"--select {rule}: one of {', '.join(SELECTIONS)}{suggest(rule, SELECTIONS)}")
    lines = []
    for benchmark in benchmarks:
        if lacks := _lacks(rule, benchmark):
            lines.append(f"--select {rule}: not of {benchmark.name}, which {lacks}; {benchmark.main} stands there")
        else:
            benchmark.select = rule
    if lines and len(lines) == len(benchmarks):
        raise ConfigError(lines[0].rpartition(";")[0])
    return lines


def _lacks(rule: str, benchmark: Protocol) -> str:
    """What a benchmark lacks for a rule; empty if nothing. For delta_m the epochs are chosen here."""
    runs = [r for g in [*benchmark.groups, *benchmark.baselines] for r in g.runs]
    shortest = min((len(curve) for r in runs for curve in r.curves.values()), default=0)
    if rule == "last10" and shortest < LAST:
        return f"has runs of {shortest} epochs; {LAST} or more are needed"
    if rule in ("selected", "delta_m") and not (runs and all(r.summary.get("selected") for r in runs)):
        return "has runs without validation data (data.val_fraction)"
    if rule == "delta_m":
        for arch in benchmark.archs:
            scores = Scores(benchmark, arch)
            for group in scores.groups:
                if None in [benchmark.baseline(group, task) for task in benchmark.tasks]:
                    return f"lacks single-task runs with the config of {group.label} (study.baselines=auto)"
                for run in group.runs:
                    run.chosen["delta_m"] = _stopped(run, group, scores)
        for run in (r for b in benchmark.baselines for r in b.runs):
            run.chosen["delta_m"] = run.summary["selected"]["epoch"]
    return ""


def _stopped(run: Run, group: Group, scores: Scores) -> int:
    """The epoch, from 1, with the best Δm on validation data; of equal ones the first."""
    bench = scores.benchmark
    metrics = scores.mains if bench.delta_m == "main" else [m for m in scores.metrics if m in scores.owner]
    owners = [scores.owner[m] for m in metrics]
    potentials = []
    for metric, owner in zip(metrics, owners, strict=True):
        alone = {r.seed: _value(r, r.summary["selected"]["epoch"], metric) for r in bench.baseline(group, owner).runs}
        potentials.append(alone.get(run.seed, mean(alone.values())))
    measure = partial(multitask.delta_m, tasks=owners if bench.delta_m == "task" else None)
    higher = [scores.metrics[m] for m in metrics]
    gains = [measure([number(row.get(f"val/{m}")) for m in metrics], potentials, higher) for row in run.rows]
    return 1 + max(range(len(gains)), key=lambda i: gains[i] if math.isfinite(gains[i]) else -math.inf)


def _value(run: Run, epoch: int, metric: str) -> float:
    return number(run.rows[epoch - 1].get(f"val/{metric}"))
