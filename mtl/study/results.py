"""The tables of a comparison: figures, multi-task metrics, differences paired by seed, and what is missing."""

from __future__ import annotations

import csv
import math
import shlex
import statistics as stats
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mtl.config.errors import ConfigError, suggest
from mtl.metrics import multitask
from mtl.study.compare import Benchmark, Group, counterpart
from mtl.study.runs import SELECTIONS, Collection, Run
from mtl.study.statistics import RULE, holm, paired, verdict
from mtl.study.tables import Cell, Table
from mtl.tracking import flatten

# The protocol of the published numbers, where a run's config can tell it.
_PUBLISHED = {"trainer.epochs": 200, "data.batch_size": 128, "data.limit_train": None, "data.limit_test": None,
              "data.val_fraction": 0.0}  # fmt: skip
_WORDS = {
    "last": "the last epoch",
    "best": "the best test epoch of each metric (chosen on test data, so too good by selection; no single network has "
    "them all)",
    "selected": "the one epoch that the first task's validation metric chose",
}


class Comparison:
    """All tables of one benchmark on one architecture.

    Args:
        benchmark: of `mtl.study.compare`.
        arch: one of its architectures.

    Attributes:
        groups: its strategies, by mean rank; those without one last.
    """

    def __init__(self, benchmark: Benchmark, arch: str):
        self.benchmark, self.arch = benchmark, arch
        self.groups = sorted(benchmark.of(arch), key=lambda g: g.label)
        self.title = f"{benchmark.name}, {arch}"
        place = self.mean_ranks(benchmark.main)
        self.groups.sort(key=lambda g: (math.isnan(place[g.label]), place[g.label]))

    # -- figures ------------------------------------------------------------------------------------------------------

    @cached_property
    def usual(self) -> int:
        """The number of seeds that most strategies have been run with."""
        counts = Counter(len(g.runs) + len(g.failures) for g in self.groups)
        return max(counts, key=lambda n: (counts[n], n), default=0)

    def complete(self, group: Group) -> bool:
        """Whether a group has its share of seeds, with a result or without."""
        return len(group.runs) + len(group.failures) >= self.usual

    def mean(self, group: Group, metric: str, at: str) -> float:
        """Over the seeds that finished."""
        return stats.fmean(group.by_seed(metric, at).values()) if group.runs else math.nan

    def delta_m(self, group: Group, at: str) -> dict[int, float]:
        """{seed: Δm in %}; NaN without all baselines."""
        return {r.seed: self._against(group, r, at, multitask.delta_m) for r in group.runs}

    def achievement(self, group: Group, at: str) -> dict[int, float]:
        """{seed: average achievement in %}; NaN without all baselines."""
        return {r.seed: self._against(group, r, at, multitask.achievement) for r in group.runs}

    def _against(self, group: Group, run: Run, at: str, measure) -> float:
        """Against the baselines of the same seed where there is one, else against their mean."""
        values, potentials, higher = [], [], []
        for task, metric in self.benchmark.tasks.items():
            baseline = self.benchmark.baseline(group, task)
            if baseline is None:
                return math.nan
            known = baseline.by_seed(metric, at)
            values.append(run.figure(metric, at))
            potentials.append(known[run.seed] if run.seed in known else stats.fmean(known.values()))
            higher.append(self.benchmark.metrics[metric])
        return measure(values, potentials, higher)

    def mean_ranks(self, at: str) -> dict[str, float]:
        """{label: mean rank}, by the means over seeds; NaN for a strategy with fewer seeds than the others.

        A strategy that failed or diverged in a seed has no mean to be ranked by: it shares the last place.
        """
        ranked = [g for g in self.groups if self.complete(g)]
        higher = self.benchmark.metrics
        figures = [[math.nan if g.failures else self.mean(g, m, at) for m in higher] for g in ranked]
        found = multitask.mean_rank(figures, list(higher.values())) if ranked else []
        return dict.fromkeys((g.label for g in self.groups), math.nan) | dict(
            zip((g.label for g in ranked), map(float, found), strict=True)
        )

    def pareto(self, at: str) -> dict[Path, bool]:
        """Which runs are Pareto-optimal in the tasks' main metrics, all runs of this architecture pooled."""
        runs = [r for g in self.groups for r in g.runs]
        optimal = multitask.pareto_optimal(self._points(runs, at), self._higher) if runs else []
        return {r.directory: bool(o) for r, o in zip(runs, optimal, strict=True)}

    def _points(self, runs: Sequence[Run], at: str) -> list[list[float]]:
        return [[r.figure(m, at) for m in self.benchmark.tasks.values()] for r in runs]

    @property
    def _higher(self) -> list[bool]:
        return [self.benchmark.metrics[m] for m in self.benchmark.tasks.values()]

    def wins(self, metric: str, at: str) -> tuple[dict[str, int], int]:
        """In how many seeds each strategy is the best ({label: number}, ties count for each), and of how many.

        Seeds that every strategy with its share of seeds was run with.
        """
        rivals = [g for g in self.groups if self.complete(g)]
        seeds = set.intersection(*({r.seed for r in [*g.runs, *g.failures]} for g in rivals)) if rivals else set()
        won, sign = Counter({g.label: 0 for g in rivals}), 1 if self.benchmark.metrics[metric] else -1
        for seed in seeds:
            figures = {g.label: sign * v[seed] for g in rivals if seed in (v := g.by_seed(metric, at))}
            won.update(label for label, v in figures.items() if v == max(figures.values()))
        return dict(won), len(seeds)

    # -- tables -------------------------------------------------------------------------------------------------------

    def results(self) -> Table:
        """Strategy x metric, all selections side by side; baselines and published figures below."""
        bench = self.benchmark
        lost = [g for g in bench.lost if g.arch == self.arch]
        baselines = [b for b in bench.baselines if b.arch == self.arch]
        columns = [(m, at) for m in bench.metrics for at in bench.selections]
        body = [[Cell(g.label), _count(g)] for g in [*self.groups, *baselines, *lost]]
        for metric, at in columns:
            values = [list(g.by_seed(metric, at).values()) for g in [*self.groups, *baselines]]
            fair = [self.complete(g) and not g.failures for g in self.groups]
            cells = _spreads(values, fair + [False] * len(baselines), bench.metrics[metric])
            for row, cell in zip(body, cells + [Cell("–")] * len(lost), strict=True):
                row.append(cell)
        published, sources = self._published(columns)
        notes = [
            "Test set, mean ± sample standard deviation over n seeds. Columns: "
            + "; ".join(f"{at}: {_WORDS[at]}" for at in bench.selections)
            + ". Marked: the best mean of a column among strategies with as many seeds as most have and none failed; "
            "no claim that the difference is real.",
            self._excuses(),
            sources,
            self._provenance(),
        ]
        header = ["strategy", "n", *(f"{m}\n{at}" for m, at in columns)]
        return Table(f"{self.title}: test metrics", " ".join(filter(None, notes)), header, body + published)

    def multitask(self, at: str) -> Table:
        """Δm, mean rank, average achievement, Pareto-optimal runs and wins, for one selection."""
        bench, ranks, optimal = self.benchmark, self.mean_ranks(at), self.pareto(at)
        fair = [self.complete(g) and not g.failures for g in self.groups]
        deltas = _spreads([_known(self.delta_m(g, at)) for g in self.groups], fair, True)
        reached = _spreads([_known(self.achievement(g, at)) for g in self.groups], fair, True)
        won = {m: self.wins(m, at) for m in bench.metrics}
        lowest = min((r for r in ranks.values() if not math.isnan(r)), default=None)
        body = []
        for group, delta, share in zip(self.groups, deltas, reached, strict=True):
            rank, front = ranks[group.label], sum(optimal[r.directory] for r in group.runs)
            row = [Cell(group.label), _count(group), delta, share]
            row.append(Cell("–") if math.isnan(rank) else Cell(f"{rank:.2f}", rank, rank == lowest))
            row.append(Cell(f"{front} of {len(group.runs)}", front))
            for by_label, seeds in won.values():
                known = group.label in by_label and seeds
                row.append(Cell(f"{by_label[group.label]} of {seeds}", by_label[group.label]) if known else Cell("–"))
            body.append(row)
        note = (
            f"Figures of {_WORDS[at]}. Δm: mean relative gain over single-task learning (Maninis et al. 2019), by the "
            f"main metric of each task ({', '.join(bench.tasks.values())}), {self._pairing()}. Achievement: mean share of "
            "the single-task figure (Yun & Cho 2023); 100 is single-task learning. MR: mean rank over all metrics of the "
            "means over seeds (Navon et al. 2022; ties shared, lower is better; a strategy with a failed seed ranks "
            f"last, one with fewer than {self.usual} seeds not at all). Pareto: runs that none of the {len(optimal)} runs "
            "on this architecture dominates in the main metrics. Wins: seeds in which the strategy is the best (ties "
            "count for each)."
        )
        header = ["strategy", "n", "Δm %", "achievement %", "MR", "Pareto", *(f"wins\n{m}" for m in bench.metrics)]
        excuses = self._excuses()
        return Table(f"{self.title}: multi-task metrics, {SELECTIONS[at]}", f"{note} {excuses}".strip(), header, body)

    def optimizers(self, at: str) -> Table | None:
        """Pareto-optimal runs per optimizer; None where all runs share one."""
        runs = {r.directory: (r, g.optimizer) for g in self.groups for r in g.runs}
        names = sorted({o for _, o in runs.values()})
        if len(names) < 2:
            return None
        optimal, body = self.pareto(at), []
        for name in names:
            own = [r for r, o in runs.values() if o == name]
            others = self._points([r for r, o in runs.values() if o != name], at)
            free = multitask.pareto_optimal(self._points(own, at), self._higher, others)
            counts = len(own), sum(optimal[r.directory] for r in own), int(free.sum())
            body.append([Cell(name), *(Cell(str(c), c) for c in counts)])
        note = (
            f"Runs that no other run dominates in the tasks' main metrics, and runs that none with another optimizer "
            f"dominates, as in Elich et al., Examining Common Paradigms in Multi-Task Learning; figures of {_WORDS[at]}. "
            "An optimizer with more runs, or better tuned ones, has more chances."
        )
        header = ["optimizer", "runs", "Pareto-optimal", "not dominated\nby other optimizers"]
        return Table(f"{self.title}: Pareto-optimal runs per optimizer, {SELECTIONS[at]}", note, header, body)

    def differences(self, reference: str, at: str) -> Table | None:
        """Every strategy minus the reference, paired by seed; None where the reference was not run.

        Args:
            reference: the label of a group, or a loss option's name: then each strategy's reference is the run of that
                loss with its own optimizer, schedule and so on.
            at: the selection.
        """
        found = []
        for group in self.groups:
            against = self._reference(group, reference)
            if against is not None and against is not group and group.name != reference:
                found += [(group, against, m) for m in self.benchmark.metrics]
        if not found:
            return None
        pairs = []
        for group, against, metric in found:
            ours, theirs = group.by_seed(metric, at), against.by_seed(metric, at)
            seeds = [s for s in ours if s in theirs]
            higher = self.benchmark.metrics[metric]
            pairs.append(paired([ours[s] for s in seeds], [theirs[s] for s in seeds], higher))
        adjusted, body = holm([d.p for d in pairs]), []
        for (group, against, metric), d, p in zip(found, pairs, adjusted, strict=True):
            words = verdict(d, p, self.benchmark.metrics[metric])
            if group.failures or against.failures:
                who = group if group.failures else against
                words = f"{words}, where both finished; {who.label}: {_failed(who)}"
            bounds = [*(d.student or (math.nan, math.nan)), *(d.bootstrap or (math.nan, math.nan))]
            digits = _digits([d.mean, *bounds])
            row = [Cell(group.label), Cell(metric), Cell(str(d.n), d.n), _number(d.mean, digits, sign=True)]
            row += [_number(x, digits, sign=True) for x in bounds]
            row += [Cell(f"{d.wins}:{d.losses}"), Cell("–") if math.isnan(p) else Cell(f"{p:.3f}", p), Cell(words)]
            body.append(row)
        tested = sum(not math.isnan(d.p) for d in pairs)
        without = [g.label for g in self.groups if self._reference(g, reference) is None]
        notes = [
            f"Strategy minus {reference}, same seed, same config but for the loss; figures of {_WORDS[at]}. 95 % "
            f"intervals of the mean difference: Student's t, percentile bootstrap. {len(pairs)} comparisons, {tested} of "
            f"them tested. {RULE}.",
            f"No {reference} with the same config to compare with: {'; '.join(without)}." if without else "",
        ]
        header = ["strategy", "metric", "n", "difference", "t\nlow", "t\nhigh", "bootstrap\nlow", "bootstrap\nhigh",
                  "seeds\nbetter:worse", "p\n(Holm)", "verdict"]  # fmt: skip
        title = f"{self.title}: differences from {reference}, {SELECTIONS[at]}"
        return Table(title, " ".join(filter(None, notes)), header, body)

    def _reference(self, group: Group, name: str) -> Group | None:
        for other in self.groups:
            if other.label == name:
                return other
        return counterpart(group, [g for g in self.groups if g.name == name])

    # -- notes --------------------------------------------------------------------------------------------------------

    def _excuses(self) -> str:
        lost = [g for g in self.benchmark.lost if g.arch == self.arch]
        reasons = []
        for group in [*self.groups, *self.benchmark.baselines, *lost]:
            if group.arch == self.arch and group.stopped:
                reasons.append(f"{group.label}, seed {', '.join(f'{r.seed} {r.status}' for r in group.stopped)}")
        fewer = [f"{g.label} ({len(g.runs)})" for g in self.groups if not self.complete(g)]
        parts = []
        if reasons:
            parts.append(f"Without a result: {'; '.join(reasons)}; their strategies' means are over the other seeds.")
        if fewer:
            parts.append(f"Fewer than {self.usual} seeds: {', '.join(fewer)}.")
        return " ".join(parts)

    def _pairing(self) -> str:
        seeds = averaged = 0
        without = []
        for group in self.groups:
            baselines = [self.benchmark.baseline(group, t) for t in self.benchmark.tasks]
            if None in baselines:
                without.append(group.label)
                continue
            same = [all(r.seed in {x.seed for x in b.runs} for b in baselines) for r in group.runs]
            seeds, averaged = seeds + sum(same), averaged + len(same) - sum(same)
        parts = []
        if seeds:
            parts.append(f"against the baseline of the same seed ({seeds} runs)")
        if averaged:
            parts.append(f"against the baselines' mean where that seed is lacking ({averaged} runs)")
        if without:
            few = "; ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            parts.append(f"not where a task's baseline with the same config is missing ({few})")
        return ", ".join(parts) or "without baselines"

    def baseline_command(self) -> str | None:
        """The command that trains the first missing baselines; None where none is missing."""
        for group in self.groups:
            missing = [t for t in self.benchmark.tasks if self.benchmark.baseline(group, t) is None]
            if missing:
                words = shlex.split(group.any.info.get("command", "python train.py"))
                drop = ("loss=", "loss.", "step.", "seed=", "-m", "--multirun")
                kept = [w for w in words if not w.lstrip("+~").startswith(drop)]
                kept[2:2] = ["-m", "loss=single", f"loss.task={','.join(missing)}"]
                return shlex.join([*kept, f"seed={','.join(str(r.seed) for r in group.runs)}"])
        return None

    def _provenance(self) -> str:
        runs = [r for g in [*self.groups, *self.benchmark.baselines] if g.arch == self.arch for r in g.runs]
        commits = Counter((r.info.get("commit") or "unknown")[:7] for r in runs)
        devices = sorted({(r.info.get("hardware") or {}).get("gpu") or "CPU" for r in runs})
        dirty = sum(bool(r.info.get("dirty")) for r in runs)
        text = f"{len(runs)} runs, commit {', '.join(commits)}"
        text += f" ({dirty} with uncommitted changes)" if dirty else ""
        return f"{text}, on {', '.join(devices)}."

    def _published(self, columns: Sequence[tuple[str, str]]) -> tuple[list[list[Cell]], str]:
        """Rows of published figures for this data set and architecture, and what to know of them."""
        if not self.groups:
            return [], ""
        run = self.groups[0].runs[0]
        with (Path(__file__).parent / "published.csv").open() as f:
            entries = [e for e in csv.DictReader(f) if (e["data"], e["arch"]) == (run.info["data"], self.arch)]
        rows = []
        for name in dict.fromkeys(e["strategy"] for e in entries):
            mine = [e for e in entries if e["strategy"] == name]
            row = [Cell(f"published, not run here: {name}"), Cell(str(len(mine)), len(mine))]
            for metric, at in columns:
                values = [float(e["value"]) for e in mine if e["metric"] == metric and at == "best"]
                row += _spreads([values], [False], True)
            rows.append(row)
        if not rows:
            return [], ""
        ours = flatten(run.config)
        differs = [f"{k} {ours.get(k)} instead of {v}" for k, v in _PUBLISHED.items() if ours.get(k) != v]
        note = (
            "Published: the CIFAR-100 loss-combination benchmark, best fine-class test accuracy, 200 epochs on all "
            "50,000 images with SGD, lr 0.1, cosine (batch size not stated); its PCGrad sees two scalar losses and is "
            "not the paper's gradient projection."
        )
        return rows, note + (f" Not comparable with the runs here: {', '.join(differs)}." if differs else "")


def check_reference(name: str, benchmarks: Sequence[Benchmark]) -> None:
    """Raises ConfigError unless some strategy is called `name`, by its label or its loss option."""
    known = list(dict.fromkeys(x for b in benchmarks for g in b.groups for x in (g.name, g.label)))
    if name not in known:
        raise ConfigError(f"--reference {name}: no such strategy here; one of {'; '.join(known)}{suggest(name, known)}")


def missing(collection: Collection) -> Table | None:
    """Every run that is in no table, with its reason; None where there is none."""
    rows = [[Cell(str(d)), Cell(reason)] for d, reason in [*collection.unfinished, *collection.damaged]]
    note = "Left out of all means; a strategy with failed or diverged runs is never marked as the best."
    return Table(f"{len(rows)} runs without a result", note, ["directory", "reason"], rows) if rows else None


def _count(group: Group) -> Cell:
    states = Counter(r.status for r in group.stopped)
    return Cell("".join([str(len(group.runs)), *(f", {n} {s}" for s, n in states.items())]), len(group.runs))


def _failed(group: Group) -> str:
    states = Counter(r.status for r in group.failures)
    return ", ".join(f"{n} of {len(group.runs) + len(group.failures)} seeds {s}" for s, n in states.items())


def _known(values: dict[int, float]) -> list[float]:
    return [v for v in values.values() if not math.isnan(v)]


def _spreads(columns: Sequence[Sequence[float]], fair: Sequence[bool], higher: bool) -> list[Cell]:
    """One column: mean ± standard deviation, the best mean of the fair ones marked."""
    columns = [[v for v in values if not math.isnan(v)] for values in columns]
    means = [stats.fmean(values) if values else math.nan for values in columns]
    digits = _digits(means)
    ranked = [m for m, f in zip(means, fair, strict=True) if f and not math.isnan(m)]
    top = (max if higher else min)(ranked, default=None)
    cells = []
    for values, mean, marked in zip(columns, means, fair, strict=True):
        if not values:
            cells.append(Cell("–"))
            continue
        spread = stats.stdev(values) if len(values) > 1 else None
        text = f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
        cells.append(Cell(text, mean, marked and mean == top and len(ranked) > 1, spread))
    return cells


def _digits(values: Sequence[float]) -> int:
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0)
    return 2 if largest >= 1 else 4


def _number(value: float, digits: int, sign: bool = False) -> Cell:
    return Cell("–") if math.isnan(value) else Cell(f"{value:{'+' if sign else ''}.{digits}f}", value)
