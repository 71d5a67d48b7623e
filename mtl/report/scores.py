"""The values of a comparison: one benchmark on one architecture, strategy by strategy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from mtl.report import multitask
from mtl.report.overall import MANY, Kind, kinds
from mtl.report.protocols import Group, Protocol, counterpart
from mtl.report.runs import Run
from mtl.report.statistics import mean


class Scores:
    """What the tables and figures of one benchmark on one architecture are made of.

    A strategy that failed or diverged in a seed, or ended with a value that is not finite, has no mean that could be
    compared: what it shows is the mean over the other seeds. It is never the best and ranks last.

    Args:
        benchmark: of `mtl.report.protocols`.
        arch: one of its architectures.

    Attributes:
        groups: its strategies, by mean rank; those without one last.
        baselines: its single-task groups, in the order of the tasks.
        lost: its groups without a finished run.
    """

    def __init__(self, benchmark: Protocol, arch: str):
        self.benchmark, self.arch = benchmark, arch
        order = {task: i for i, task in enumerate(benchmark.tasks)}
        baselines = [b for b in benchmark.baselines if b.arch == arch]
        self.baselines = sorted(baselines, key=lambda b: (order.get(b.task, len(order)), b.label))
        self.lost = [g for g in benchmark.lost if g.arch == arch]
        self.groups = benchmark.of(arch)
        place = self.mean_ranks(benchmark.main)
        self.groups.sort(key=lambda g: (math.isnan(place[g.label]), place[g.label], g.label))

    @cached_property
    def usual(self) -> int:
        """The number of seeds that most strategies have been run with."""
        counts = Counter(len(g.runs) + len(g.failures) for g in self.groups)
        return max(counts, key=lambda n: (counts[n], n), default=0)

    def complete(self, group: Group) -> bool:
        """Whether a strategy has as many seeds as most, with a result or without."""
        return len(group.runs) + len(group.failures) >= self.usual

    def comparable(self, group: Group, at: str) -> bool:
        """Whether its mean may be the best: all its seeds are there, none failed, and all have finite values."""
        whole = not any(self.broken(r, "last") or self.broken(r, at) for r in group.runs)
        return self.complete(group) and not group.failures and whole

    def broken(self, run: Run, at: str) -> list[str]:
        """Metrics that lack a finite value in some run, but not in all runs."""
        return [m for m in self.known if not math.isfinite(run.value(m, at))]

    @cached_property
    def known(self) -> dict[str, bool]:
        """{metric: higher is better}, for each metric that is finite in the last epoch of some run."""
        runs = [r for g in self.groups for r in g.runs]
        return {m: up for m, up in self.metrics.items() if any(math.isfinite(r.value(m)) for r in runs)}

    @property
    def crowded(self) -> bool:
        """Whether there are too many tasks to show each in a column."""
        return len(self.benchmark.tasks) > MANY

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """{"mean accuracy of 40 tasks": …}: the summary that replaces the single tasks if there are many."""
        return kinds(self.benchmark)

    @cached_property
    def compared(self) -> dict[str, bool]:
        """{metric: higher is better} that strategies are compared in: the test metrics, or the means of many."""
        return {name: kind.higher for name, kind in self.kinds.items()} if self.crowded else self.metrics

    def by_seed(self, group: Group, metric: str, at: str) -> dict[int, float]:
        """{seed: finite value} of a test metric or of a mean over tasks."""
        if metric in self.metrics or metric not in self.kinds:
            return group.by_seed(metric, at)
        each = [group.by_seed(m, at) for m in self.kinds[metric].metrics]
        return {seed: mean([e[seed] for e in each]) for seed in each[0] if all(seed in e for e in each)}

    def alone(self, group: Group, metric: str, at: str) -> float:
        """What single-task learning with the strategy's config reaches, as a mean over seeds; NaN if it was not run."""
        parts = self.kinds[metric].metrics if metric not in self.metrics and metric in self.kinds else [metric]
        found = [self.benchmark.baseline(group, self.owner.get(m, "")) for m in parts]
        return (
            math.nan
            if None in found
            else mean([mean(b.by_seed(m, at).values()) for b, m in zip(found, parts, strict=True)])
        )

    @cached_property
    def owner(self) -> dict[str, str]:
        """{metric: its task}."""
        found = {metric: task for task, metric in self.benchmark.tasks.items()}
        for run in (g.runs[0] for g in [*self.groups, *self.baselines]):
            for task, metrics in (run.summary.get("tasks") or {}).items():
                found |= {m: task for m in metrics if m not in found}
        for metric in self.metrics:
            if metric not in found and (names := [t for t in self.benchmark.tasks if metric.startswith(f"{t}_")]):
                found[metric] = max(names, key=len)
        return found

    def delta_m(self, group: Group, at: str, split: str = "test") -> dict[int, float]:
        """{seed: Δm in %}, as `Protocol.delta_m` defines it; without the seeds that lack a metric or a baseline."""
        return self._against_baselines(group, at, self.gain, self.gained, split)

    @cached_property
    def gained(self) -> list[str]:
        """The metrics that Δm is taken over."""
        return self.mains if self.benchmark.delta_m == "main" else [m for m in self.metrics if m in self.owner]

    @property
    def gain(self) -> Callable[..., float]:
        """`multitask.delta_m` of `gained`, as `Protocol.delta_m` defines it."""
        by_task = self.benchmark.delta_m == "task"
        return partial(multitask.delta_m, tasks=[self.owner[m] for m in self.gained] if by_task else None)

    def potentials(self, run: Run, group: Group, metrics: Sequence[str], at: str, split: str = "test") -> list[float]:
        """What single-task learning has in each metric: of the run's seed where there is one, else the mean over seeds.

        Empty where a task has no baseline; NaN where its baseline lacks the metric.
        """
        found = [self.benchmark.baseline(group, self.owner[m]) for m in metrics]
        if None in found:
            return []
        known = [baseline.by_seed(m, at, split) for baseline, m in zip(found, metrics, strict=True)]
        return [k[run.seed] if run.seed in k else mean(k.values()) for k in known]

    def achievement(self, group: Group, at: str, metric: str | None = None) -> dict[int, float]:
        """{seed: achievement in %}, likewise: the average over the tasks, or that of the task with this main metric."""
        return self._against_baselines(group, at, multitask.achievement, [metric] if metric else self.mains)

    def _against_baselines(
        self, group: Group, at: str, measure: Callable[..., float], metrics: Sequence[str], split: str = "test"
    ) -> dict[int, float]:
        higher, scores = [self.metrics[m] for m in metrics], {}
        for run in group.runs:
            if potentials := self.potentials(run, group, metrics, at, split):
                scores[run.seed] = measure([run.value(m, at, split) for m in metrics], potentials, higher)
        return {seed: score for seed, score in scores.items() if not math.isnan(score)}

    def mean_ranks(self, at: str) -> dict[str, float]:
        """{label: mean rank}, by the means over seeds; NaN for a strategy with fewer seeds than most, or no rival.

        Over the metrics in `known`.
        """
        ranks = dict.fromkeys((g.label for g in self.groups), math.nan)
        ranked = [g for g in self.groups if self.complete(g)]
        if len(ranked) > 1:
            figures = [
                [mean(g.by_seed(m, at).values()) if self.comparable(g, at) else math.nan for m in self.known]
                for g in ranked
            ]
            found = multitask.mean_rank(figures, list(self.known.values()))
            ranks |= zip((g.label for g in ranked), map(float, found), strict=True)
        return ranks

    def pareto(self, at: str) -> dict[Path, bool]:
        """{directory: Pareto-optimal in the tasks' main metrics}, all runs of this architecture pooled."""
        runs = [r for g in self.groups for r in g.runs]
        optimal = multitask.pareto_optimal(self.points(runs, at), self.higher) if runs else []
        return {r.directory: bool(o) for r, o in zip(runs, optimal, strict=True)}

    def points(self, runs: Sequence[Run], at: str) -> list[list[float]]:
        """(N, T) the main metric of each task."""
        return [[r.value(m, at) for m in self.mains] for r in runs]

    @property
    def mains(self) -> list[str]:
        """(T,) the main metric of each task."""
        return list(self.benchmark.tasks.values())

    @property
    def metrics(self) -> dict[str, bool]:
        """{metric: higher is better}."""
        return self.benchmark.metrics

    @property
    def higher(self) -> list[bool]:
        """(T,) whether higher is better for the main metric of each task."""
        return [self.metrics[m] for m in self.mains]

    def wins(self, metric: str, at: str) -> tuple[dict[str, int], int]:
        """({label: seeds in which it is the best}, number of seeds); ties count for each.

        Only seeds that all strategies with the usual number of seeds share count. Empty if fewer than two strategies
        qualify.
        """
        rivals = [g for g in self.groups if self.complete(g)]
        if len(rivals) < 2:
            return {}, 0
        seeds = set.intersection(*({r.seed for r in [*g.runs, *g.failures]} for g in rivals))
        figures = {g.label: g.by_seed(metric, at) for g in rivals}
        won, best = Counter({label: 0 for label in figures}), max if self.metrics[metric] else min
        for seed in seeds:
            top = best((f[seed] for f in figures.values() if seed in f), default=None)
            won.update(label for label, f in figures.items() if f.get(seed) == top is not None)
        return dict(won), len(seeds)

    def reference(self, group: Group, name: str) -> Group | None:
        """What a strategy is compared with: the group with that label, or, where `name` is a loss option's, the run of
        that loss with the strategy's own optimizer, schedule and so on; None where there is none or it is the same."""
        named = [g for g in self.groups if g.name == name]
        if group.name == name or group.label == name:
            return None
        return counterpart(group, named) if named else next((g for g in self.groups if g.label == name), None)
