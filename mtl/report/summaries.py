"""The tables of a comparison: figures, multi-task metrics, differences paired by seed, and what is missing."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mtl.errors import ConfigError, suggest
from mtl.report import multitask
from mtl.report.commands import single_task_command
from mtl.report.names import visible
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import SELECTIONS, Collection, Run
from mtl.report.scores import Scores
from mtl.report.statistics import RULE, deviation, holm, mean, paired, verdict
from mtl.report.tables import Entry, Table
from mtl.report.validate import FACTS
from mtl.tracking import flatten

# The protocol of the published numbers, where a run's config can tell it.
PUBLISHED = {
    "trainer.epochs": 200, "data.batch_size": 128, "data.limit_train": None, "data.limit_test": None,
    "data.val_fraction": 0.0,
}  # fmt: skip
NONE = Entry("–")
_WORDS = {
    "last": "the last epoch",
    "best": "the best test epoch of each metric (chosen on test data, so too good; no one network has them all)",
    "selected": "the one epoch that the first task's validation metric chose",
}


def title(scores: Scores, what: str, at: str | None = None) -> str:
    """Of a table."""
    return f"{scores.benchmark.name}, {scores.arch}: {what}" + (f", {SELECTIONS[at]}" if at else "")


def metrics_table(scores: Scores) -> Table:
    """Strategy x metric, all selections side by side; baselines and published figures below."""
    bench = scores.benchmark
    finished = [*scores.groups, *scores.baselines]
    sizes = [len(g.runs) for g in finished]
    columns = [(m, at) for m in bench.metrics for at in bench.selections]
    rows = [[Entry(g.label), _count(scores, g)] for g in [*finished, *scores.lost]]
    for metric, at in columns:
        fair = [scores.comparable(g, at) for g in scores.groups] + [False] * len(scores.baselines)
        values = [list(g.by_seed(metric, at).values()) for g in finished]
        cells = _spreads(values, sizes, fair, bench.metrics[metric], _decimals(finished, metric))
        for row, cell in zip(rows, cells + [NONE] * len(scores.lost), strict=True):
            row.append(cell)
    published, source = _published(scores, columns)
    note = (
        "Test set, mean ± sample standard deviation over n seeds. Columns: "
        f"{'; '.join(f'{at}: {_WORDS[at]}' for at in bench.selections)}. Marked: the best mean of a column among "
        "strategies that have as many seeds as most, failed in none and have finite values in all, which does not say "
        "that the difference is real."
    )
    parts = [note, _excuses(scores), source, _provenance(scores)]
    header = ["strategy", "n", *(f"{m}\n{at}" for m, at in columns)]
    return Table(title(scores, "test metrics"), " ".join(filter(None, parts)), header, rows + published)


def multi_task(scores: Scores, at: str) -> Table:
    """Δm, mean rank, average achievement, Pareto-optimal runs and wins, for one selection."""
    bench, ranks, optimal = scores.benchmark, scores.mean_ranks(at), scores.pareto(at)
    fair, sizes = [scores.comparable(g, at) for g in scores.groups], [len(g.runs) for g in scores.groups]
    deltas = _spreads([list(scores.delta_m(g, at).values()) for g in scores.groups], sizes, fair, True, 2)
    reached = _spreads([list(scores.achievement(g, at).values()) for g in scores.groups], sizes, fair, True, 2)
    won = [scores.wins(m, at) for m in bench.metrics]
    lowest = min((r for r in ranks.values() if not math.isnan(r)), default=None)
    rows = []
    for group, delta, share in zip(scores.groups, deltas, reached, strict=True):
        rank, front = ranks[group.label], sum(optimal[r.directory] for r in group.runs)
        row = [Entry(group.label), _count(scores, group), delta, share]
        row.append(NONE if math.isnan(rank) else Entry(f"{rank:.2f}", rank, rank == lowest))
        row.append(Entry(f"{front} of {len(group.runs)}", front) if bench.tasks else NONE)
        for by_label, seeds in won:
            n = by_label.get(group.label)
            row.append(NONE if n is None or not seeds else Entry(f"{n} of {seeds}", n))
        rows.append(row)
    note = (
        f"Figures of {_WORDS[at]}. Δm: mean relative gain over single-task learning (Maninis et al. 2019) in the main "
        f"metric of each task ({', '.join(bench.tasks.values())}), {_pairing(scores)}. Achievement: mean share of the "
        "single-task figure (Yun & Cho 2023); 100 is single-task learning. MR: mean rank over all metrics, of the "
        "means over seeds (Navon et al. 2022); ties shared, lower is better; a strategy with a failed seed or a value "
        f"that is not finite ranks last, one with fewer than {scores.usual} seeds not at all. Pareto: runs that none "
        f"of the {len(optimal)} runs on this architecture dominates in the main metrics. Wins: seeds in which the "
        "strategy is the best; ties count for each."
    )
    header = ["strategy", "n", "Δm %", "achievement %", "MR", "Pareto", *(f"wins\n{m}" for m in bench.metrics)]
    return Table(title(scores, "multi-task metrics", at), f"{note} {_excuses(scores)}".strip(), header, rows)


def optimizers(scores: Scores, at: str) -> Table | None:
    """Pareto-optimal runs per optimizer; None where all runs share one."""
    runs = [(r, g.optimizer) for g in scores.groups for r in g.runs]
    names = sorted({name for _, name in runs})
    if len(names) < 2:
        return None
    optimal, rows = scores.pareto(at), []
    for name in names:
        own = [r for r, optimizer in runs if optimizer == name]
        others = scores.points([r for r, optimizer in runs if optimizer != name], at)
        free = multitask.pareto_optimal(scores.points(own, at), scores.higher, others)
        counts = len(own), sum(optimal[r.directory] for r in own), int(free.sum())
        rows.append([Entry(name), *(Entry(str(c), c) for c in counts)])
    note = (
        f"Runs that no other run dominates in the tasks' main metrics, and runs that none with another optimizer does, "
        f"as in Elich et al., Examining Common Paradigms in Multi-Task Learning; figures of {_WORDS[at]}. An optimizer "
        "with more runs, or better tuned ones, has more chances."
    )
    header = ["optimizer", "runs", "Pareto-optimal", "not dominated\nby other optimizers"]
    return Table(title(scores, "Pareto-optimal runs per optimizer", at), note, header, rows)


def differences(scores: Scores, reference: str, at: str) -> Table | None:
    """Every strategy minus the reference, paired by seed; None where there is nothing to compare.

    Args:
        scores: of one benchmark and architecture.
        reference: as in `Scores.reference`.
        at: the selection.
    """
    compared = [
        (group, against, metric)
        for group in scores.groups
        if (against := scores.reference(group, reference))
        for metric in scores.metrics
    ]
    if not compared:
        return None
    pairs = []
    for group, against, metric in compared:
        ours, theirs = group.by_seed(metric, at), against.by_seed(metric, at)
        seeds = [s for s in ours if s in theirs]
        pairs.append(paired([ours[s] for s in seeds], [theirs[s] for s in seeds], scores.metrics[metric]))
    adjusted, rows = holm([d.p for d in pairs]), []
    digits = {metric: _decimals(scores.groups, metric) for metric in scores.metrics}
    for (group, against, metric), d, p in zip(compared, pairs, adjusted, strict=True):
        words = verdict(d, p, scores.metrics[metric])
        if failed := [f"{g.label}: {why}" for g in (group, against) if (why := _failed(g, metric, at))]:
            words = f"{words}; but {', '.join(failed)}"
        bounds = [d.mean, *(d.student or (math.nan, math.nan)), *(d.bootstrap or (math.nan, math.nan))]
        row = [Entry(group.label), Entry(metric), Entry(str(d.n), d.n)]
        row += [NONE if math.isnan(x) else Entry(_signed(x, digits[metric]), x) for x in bounds]
        row += [Entry(f"{d.wins}:{d.losses}"), NONE if math.isnan(p) else Entry(f"{p:.3f}", p), Entry(words)]
        rows.append(row)
    named = any(g.name == reference for g in scores.groups)
    alone = [g.label for g in scores.groups if g.name != reference and scores.reference(g, reference) is None] * named
    note = (
        f"Strategy minus {reference}, same seed{', same config but for the loss' if named else ''}; figures of "
        f"{_WORDS[at]}. 95 % intervals of the mean difference: Student's t, percentile bootstrap. {len(pairs)} "
        f"comparisons, {sum(not math.isnan(d.p) for d in pairs)} of them tested. {RULE}."
    )
    if alone:
        note += f" Not compared, as {reference} was not run with their config: {_some(alone)}."
    header = [
        "strategy", "metric", "n", "difference", "95 % t\nlow", "95 % t\nhigh", "bootstrap\nlow", "bootstrap\nhigh",
        "seeds\nbetter:worse", "p (Holm)", "verdict",
    ]  # fmt: skip
    return Table(title(scores, f"differences from {reference}", at), note, header, rows)


def per_run(benchmarks: Sequence[Protocol]) -> Table:
    """One row per finished run with all of its figures: what every other table is made of."""
    metrics = list(dict.fromkeys(m for b in benchmarks for m in b.metrics))
    columns = [(m, at) for m in metrics for at in SELECTIONS]
    rows = []
    for benchmark in benchmarks:
        for group in [*benchmark.groups, *benchmark.baselines]:
            for run in group.runs:
                words = [benchmark.name, group.arch, group.label, group.optimizer, str(run.seed)]
                numbers = [run.figure(m, at) for m, at in columns] + [run.fact(f) for f in FACTS]
                cells = [Entry("") if math.isnan(x) else Entry(str(x), x) for x in numbers]
                ends = [str(run.info.get("commit")), str(run.info.get("dirty")), visible(str(run.directory))]
                rows.append([*map(Entry, words), *cells, *map(Entry, ends)])
    header = ["benchmark", "arch", "strategy", "optimizer", "seed", *(f"{m}\n{at}" for m, at in columns), *FACTS]
    return Table("Runs", "Test set.", [*header, "commit", "dirty", "directory"], rows)


def missing(collection: Collection) -> Table | None:
    """Every run that is in no table, with its reason; None where there is none."""
    rows = [[Entry(visible(str(d))), Entry(why)] for d, why in [*collection.unfinished, *collection.damaged]]
    note = "Left out of all means; a strategy with failed or diverged runs is never marked as the best."
    title = f"{len(rows)} run{'s' if len(rows) > 1 else ''} without a result"
    return Table(title, note, ["directory", "reason"], rows) if rows else None


def doubtful(collection: Collection) -> Table | None:
    """Every run that counts although its files contradict each other; None where there is none."""
    rows = [[Entry(visible(str(d))), Entry(why)] for d, why in collection.doubtful]
    note = "They are in the tables, with the settings of config.yaml. Find out which file is right before you use them."
    title = f"{len(rows)} contradiction{'s' if len(rows) > 1 else ''} in runs that count"
    return Table(title, note, ["directory", "reason"], rows) if rows else None


def check_reference(name: str, benchmarks: Sequence[Protocol]) -> None:
    """Raises ConfigError unless some strategy is called `name`, by its label or its loss option."""
    known = list(dict.fromkeys(x for b in benchmarks for g in b.groups for x in (g.name, g.label)))
    if name not in known:
        raise ConfigError(f"--reference {name}: no such strategy here; one of {'; '.join(known)}{suggest(name, known)}")


def baseline_command(scores: Scores) -> str | None:
    """The command that trains the first missing baselines; None where none is missing."""
    for group in scores.groups:
        tasks = [t for t in scores.benchmark.tasks if scores.benchmark.baseline(group, t) is None]
        if tasks:
            command = group.any.info.get("command", "python train.py")
            return single_task_command(command, tasks, [r.seed for r in group.runs])
    return None


# -- notes ------------------------------------------------------------------------------------------------------------


def _excuses(scores: Scores) -> str:
    stopped = [
        f"{g.label}, seed {', '.join(f'{r.seed} {r.status}' for r in g.stopped)}"
        for g in [*scores.groups, *scores.baselines, *scores.lost]
        if g.stopped
    ]
    fewer = [f"{g.label} ({len(g.runs)})" for g in scores.groups if not scores.complete(g)]
    broken = [
        f"{g.label}, seed {r.seed} ({', '.join(f'{m} {_value(r, m)}' for m in bad)})"
        for g in scores.groups
        for r in g.runs
        if (bad := list(dict.fromkeys(m for at in scores.benchmark.selections for m in scores.broken(r, at))))
    ]
    unknown = [m for m in scores.metrics if m not in scores.known] if scores.groups else []
    parts = [f"Without a result: {_some(stopped)}; their means are over the other seeds."] if stopped else []
    if broken:
        parts.append(f"Not finite: {_some(broken)}; these means are over the other seeds, (n=…) says how many.")
    if unknown:
        parts.append(f"No run has a finite value of {', '.join(unknown)}.")
    if fewer:
        parts.append(f"Fewer than {scores.usual} seeds: {_some(fewer)}.")
    if scores.usual == 1:
        parts.append("One seed a strategy: nothing here tells a better strategy from a luckier one.")
    return " ".join(parts)


def _pairing(scores: Scores) -> str:
    same = averaged = 0
    without = []
    for group in scores.groups:
        baselines = [scores.benchmark.baseline(group, t) for t in scores.benchmark.tasks]
        if None in baselines:
            without.append(group.label)
            continue
        seeds = set.intersection(*({r.seed for r in b.runs} for b in baselines))
        both = sum(r.seed in seeds for r in group.runs)
        same, averaged = same + both, averaged + len(group.runs) - both
    parts = [
        f"against the baseline of the same seed ({same} runs)" if same else "",
        f"against the mean of the baselines where one lacks the seed ({averaged} runs)" if averaged else "",
        f"not where a task has no baseline with the same config ({_some(without)})" if without else "",
    ]
    return ", ".join(filter(None, parts)) or "without baselines"


def _provenance(scores: Scores) -> str:
    runs = [r for g in [*scores.groups, *scores.baselines] for r in g.runs]
    commits = Counter((r.info.get("commit") or "unknown")[:7] for r in runs)
    devices = sorted({r.info.get("hardware", {}).get("gpu") or "CPU" for r in runs})
    dirty = sum(bool(r.info.get("dirty")) for r in runs)
    text = f"{len(runs)} runs, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return text + (f" ({dirty} with uncommitted changes)" if dirty else "") + f", on {', '.join(devices)}."


def _published(scores: Scores, columns: Sequence[tuple[str, str]]) -> tuple[list[list[Entry]], str]:
    """Rows of published figures for this data set and architecture, and what to know of them."""
    with (Path(__file__).parent / "published.csv").open() as f:
        entries = [e for e in csv.DictReader(f) if e["arch"] == scores.arch] if scores.groups else []
    if not entries or entries[0]["data"] != scores.groups[0].any.info["data"]:
        return [], ""
    rows = []
    for name in dict.fromkeys(e["strategy"] for e in entries):
        mine = [e for e in entries if e["strategy"] == name]
        row = [Entry(f"published, not run here: {name}"), Entry(str(len(mine)), len(mine))]
        for metric, at in columns:
            values = [float(e["value"]) for e in mine if (e["metric"], at) == (metric, "best")]
            row += _spreads([values], [len(mine)], [False], True)
        rows.append(row)
    note = (
        "Published: the CIFAR-100 loss-combination benchmark, best fine-class test accuracy, 200 epochs on all 50,000 "
        "images with SGD, lr 0.1, cosine (batch size not stated); its PCGrad sees two scalar losses and is not the "
        "paper's gradient projection."
    )
    ours = flatten(scores.groups[0].any.config)
    differs = [f"{k} {ours.get(k)} instead of {v}" for k, v in PUBLISHED.items() if ours.get(k) != v]
    return rows, note + (f" Not comparable with the runs here: {', '.join(differs)}." if differs else "")


def _some(words: Sequence[str], most: int = 6) -> str:
    return "; ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


# -- cells ------------------------------------------------------------------------------------------------------------


def _count(scores: Scores, group: Group) -> Entry:
    states = Counter(r.status for r in group.stopped)
    text = ", ".join([str(len(group.runs)), *(f"{n} {state}" for state, n in states.items())])
    # Of a baseline, the other tasks' metrics are not broken but not there.
    broken = sum(any(scores.broken(r, at) for at in scores.benchmark.selections) for r in group.runs)
    return Entry(text + (f" ({broken} not finite)" if broken and group in scores.groups else ""), len(group.runs))


def _failed(group: Group, metric: str, at: str) -> str:
    states = Counter(r.status for r in group.failures)
    if broken := len(group.runs) - len(group.by_seed(metric, at)):
        states["not finite"] = broken
    return ", ".join(f"{n} of {len(group.runs) + len(group.failures)} seeds {state}" for state, n in states.items())


def _value(run: Run, metric: str) -> str:
    """What the last epoch has: "nan", "inf", or that its figure is finite and another selection's is not."""
    value = run.figure(metric)
    return "not in every selection" if math.isfinite(value) else str(value)


def _spreads(
    columns: Sequence[Sequence[float]],
    sizes: Sequence[int],
    fair: Sequence[bool],
    higher: bool,
    digits: int | None = None,
) -> list[Entry]:
    """One column: mean ± standard deviation, the best mean of the fair ones marked.

    Args:
        columns: finite values of each row.
        sizes: how many values each row has elsewhere; a cell of fewer says so.
    """
    means = [mean(values) for values in columns]
    digits = _digits(means) if digits is None else digits
    ranked = [m for m, f in zip(means, fair, strict=True) if f and math.isfinite(m)]
    top = (max if higher else min)(ranked) if len(ranked) > 1 else None
    cells = []
    for values, size, average, f in zip(columns, sizes, means, fair, strict=True):
        spread, count = deviation(values), len(values) if len(values) < size else None
        text = _fixed(average, digits) + ("" if spread is None else f" ± {_fixed(spread, digits)}")
        text += "" if count is None else f" (n={count})"
        cells.append(Entry(text, average, f and average == top, spread, count) if values else NONE)
    return cells


def _decimals(groups: Sequence[Group], metric: str) -> int:
    """The same for all selections of a metric."""
    return _digits([v for g in groups for v in g.by_seed(metric, "last").values()])


def _digits(values: Sequence[float]) -> int:
    """Decimals for figures of this size."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0)
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.3e}"


def _signed(value: float, digits: int) -> str:
    return ("+" if value >= 0 else "") + _fixed(value, digits)
