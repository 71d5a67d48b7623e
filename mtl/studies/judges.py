"""What chooses a learning rate: the first task's validation metric, or Δm on validation data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtl.engine.files import read_json
from mtl.engine.replay import chosen_by, objective
from mtl.errors import ConfigError, suggest
from mtl.report import baselines, select
from mtl.report.notes import pairing
from mtl.report.protocols import DELTA_M, Group, benchmarks
from mtl.report.runs import Collection, Run, load
from mtl.report.scores import Scores
from mtl.report.summaries import defined

RULES = ("metric", "delta_m")

# {metric: (value at the epoch that validation data chose, value of the last epoch)} on test data
Figures = dict[str, tuple[float, float]]


class ByMetric:
    """The validation metric that chooses the epoch: the first task's main one, or the mean over tasks."""

    def title(self, run: Path) -> str:
        """The criterion in words."""
        return self._summary(run)["selected"]["by"]

    def value(self, run: Path) -> float:
        """The criterion of a finished run."""
        return objective(run)

    def key(self, run: Path) -> float:
        """The larger, the better."""
        return self.value(run) if chosen_by(self._summary(run)).higher else -self.value(run)

    def figures(self, run: Path) -> Figures:
        """The run's test metrics."""
        selected, last = (self._summary(run)[at] for at in ("selected", "last"))
        return {key.removeprefix("test/"): (selected.get(key, math.nan), value) for key, value in last.items()}

    def note(self, run: Path) -> str:
        """What a reader must know of the criterion."""
        return ""

    @staticmethod
    def _summary(run: Path) -> dict:
        return read_json(run / "summary.json")


class ByDeltaM:
    """Δm on validation data, at the epoch where it is best: early stopping by Δm, as in Elich et al.

    Args:
        runs: folders of the finished runs of one benchmark.
        baseline: as for `baselines.choose`.
        delta_m: as in `Protocol`.

    Raises:
        ConfigError: there is no such baseline, or the runs have no Δm on validation data.
    """

    def __init__(self, runs: Sequence[Path], baseline: str, delta_m: str):
        wanted = {run.resolve() for run in runs}
        # The data set's folder: the single-task runs are there too.
        found = load(sorted({run.parents[3] for run in runs})) if runs else Collection()
        self._of: dict[Path, tuple[Scores, Group, Run]] = {}
        for whole in benchmarks(found.runs, found.stopped):
            groups = [g for g in whole.groups if any(r.directory.resolve() in wanted for r in g.runs)]
            if not groups:
                continue
            benchmark = replace(whole, groups=groups, lost=[], delta_m=delta_m)
            baselines.choose(baseline, [benchmark], "delta_m")
            select.select("delta_m", [benchmark])
            scores = {arch: Scores(benchmark, arch) for arch in {g.arch for g in groups}}
            self._of |= {r.directory.resolve(): (scores[g.arch], g, r) for g in groups for r in g.runs}

    def title(self, run: Path) -> str:
        """The criterion in words."""
        return "validation Δm %"

    def value(self, run: Path) -> float:
        """The criterion of a finished run; NaN where it has none."""
        return self._gain(run, "delta_m", "val")

    def key(self, run: Path) -> float:
        """The larger, the better."""
        return self.value(run)

    def figures(self, run: Path) -> Figures:
        """The run's Δm and metrics on test data."""
        scores, _, one = self._of[run.resolve()]
        gains = self._gain(run, "delta_m", "test"), self._gain(run, "last", "test")
        return {"Δm %": gains, **{m: (one.value(m, "delta_m"), one.value(m)) for m in scores.metrics}}

    def note(self, run: Path) -> str:
        """The definition of Δm and the baseline, in words."""
        scores, *_ = self._of[run.resolve()]
        warning = scores.benchmark.common[scores.arch].warning if scores.benchmark.common else ""
        return f"{defined(scores)}, {pairing(scores)}. {warning}".strip()

    def _gain(self, run: Path, at: str, split: str) -> float:
        scores, group, one = self._of[run.resolve()]
        return scores.delta_m(group, at, split).get(one.seed, math.nan)


Judge = ByMetric | ByDeltaM


def check(rule: str, baseline: str, delta_m: str) -> None:
    """Refuse wrong words before anything is trained. Raises ConfigError."""
    for option, word, allowed in (("--by", rule, RULES), ("--delta-m", delta_m, DELTA_M)):
        if word not in allowed:
            raise ConfigError(f"{option} {word}: one of {', '.join(allowed)}{suggest(word, allowed)}")
    if baseline == baselines.OWN:
        raise ConfigError("--baseline own: the rate with the worst single-task runs would win; take best, or constants")
    baselines.check(baseline)
