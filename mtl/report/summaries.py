"""The tables of a comparison: metrics, multi-task metrics, differences paired by seed, cost, missing runs."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mtl.errors import ConfigError, suggest
from mtl.report import multitask
from mtl.report.cells import NONE, count, decimals, failed, fixed, signed, spreads
from mtl.report.commands import single_task_command
from mtl.report.names import visible
from mtl.report.notes import excuses, nothing, pairing, provenance, some
from mtl.report.overall import Kind
from mtl.report.protocols import Group, Protocol
from mtl.report.runs import ALWAYS, SELECTIONS, Collection, Run, step_time
from mtl.report.scores import Scores
from mtl.report.statistics import holm, mean, paired, verdict
from mtl.report.tables import Entry, Table
from mtl.report.validate import FACTS
from mtl.tracking import flatten

# The protocol of the published numbers, where a run's config can tell it.
PUBLISHED = {
    "trainer.epochs": 200, "data.batch_size": 128, "data.limit_train": None, "data.limit_test": None,
    "data.val_fraction": 0.0, "trainer.patience": None,
}  # fmt: skip
_DELTA = {
    "main": "over the main metric of each task",
    "flat": "over all metrics alike (flat)",
    "task": "over all metrics, after a mean over each task's metrics (by task)",
}


def table_of(
    scores: Scores, kind: str, what: str, note: str, header: list[str], rows: list[list[Entry]],
    terms: tuple[str, ...], at: str | None = None,
) -> Table:  # fmt: skip
    """A table of this benchmark and architecture, with its title and its place in the page."""
    title = f"{scores.benchmark.name}, {scores.arch}: {what}" + (f", {SELECTIONS[at]}" if at else "")
    secondary = at is not None and at != scores.benchmark.main
    return Table(title, note, header, rows, terms, (scores.benchmark.name, scores.arch), kind, secondary)


def _column(scores: Scores, finished: Sequence[Group], metric: str, at: str) -> list[Entry]:
    """One metric of the strategies, and of the baselines after them."""
    baselines = len(finished) - len(scores.groups)
    fair = [scores.comparable(g, at) for g in scores.groups] + [False] * baselines
    alone = [scores.alone(g, metric, at) for g in scores.groups] + [math.nan] * baselines
    values = [list(scores.by_seed(g, metric, at).values()) for g in finished]
    sizes = [len(g.runs) for g in finished]
    return spreads(values, sizes, fair, scores.compared[metric], decimals(scores, metric), alone)


def extremes(scores: Scores, group: Group, kind: Kind, at: str) -> tuple[Entry, Entry]:
    """The best and the worst task of a strategy, by the means over seeds."""
    means = {m: mean(group.by_seed(m, at).values()) for m in kind.metrics}
    known = sorted((m for m in means if math.isfinite(means[m])), key=lambda m: means[m], reverse=kind.higher)
    if not known:
        return NONE, NONE
    best, worst = (
        Entry(f"{fixed(means[m], decimals(scores, m))} {scores.owner[m]}", means[m]) for m in (known[0], known[-1])
    )
    return best, worst


def _alone_row(scores: Scores, columns: Sequence[tuple[str, str]], width: int) -> list[Entry]:
    """Single-task learning of many tasks in one row: the means of the baselines."""
    found = [
        next((x for g in scores.groups if not math.isnan(x := scores.alone(g, m, at))), math.nan) for m, at in columns
    ]
    cells = [
        NONE if math.isnan(x) else Entry(fixed(x, decimals(scores, m)), x)
        for (m, _), x in zip(columns, found, strict=True)
    ]
    seeds = min(len(b.runs) for b in scores.baselines)
    row = [Entry(f"single-task ({len(scores.baselines)} networks)"), Entry(str(seeds), seeds), *cells]
    return row + [NONE] * (width - len(row))


def metrics_table(scores: Scores) -> Table:
    """Strategy x metric, all selections side by side; baselines and published values below.

    Of more than MANY tasks: their mean, and the best and the worst of them.
    """
    bench = scores.benchmark
    finished = [*scores.groups, *([] if scores.crowded else scores.baselines)]
    rows = [[Entry(g.label), count(scores, g)] for g in [*finished, *scores.lost]]
    below = [NONE] * len(scores.lost)
    header = ["strategy", "n"]
    columns = [(m, at) for m in scores.compared for at in bench.selections]
    for metric, at in columns:
        header.append(f"{metric}\n{at}")
        for row, cell in zip(rows, _column(scores, finished, metric, at) + below, strict=True):
            row.append(cell)
    for kind in scores.kinds.values() if scores.crowded else ():
        if len(kind.metrics) > 1:
            ends = [extremes(scores, g, kind, bench.main) for g in finished]
            header += [f"best task's {kind.word}\n{bench.main}", f"worst task's {kind.word}\n{bench.main}"]
            for row, pair in zip(rows, ends + [(NONE, NONE)] * len(scores.lost), strict=True):
                row += pair
    if scores.crowded and scores.baselines and scores.groups:
        rows.append(_alone_row(scores, columns, len(header)))
    published, source = _published(scores, columns)
    note = f"Test set, mean ± sample standard deviation over n seeds. {excuses(scores)}"
    if scores.crowded:
        note += " The tables of tasks show each task."
    note = " ".join(filter(None, [note.strip(), source, provenance(scores)]))
    published = [row + [NONE] * (len(header) - len(row)) for row in published]
    terms = (*bench.selections, "±", "*", *(("†",) if any(c.beats for r in rows for c in r) else ()))
    terms += ("mean over tasks",) if scores.crowded else ()
    return table_of(scores, "metrics", "test metrics", note, header, rows + published, terms)


def tasks_table(scores: Scores, at: str) -> Table | None:
    """Metric x strategy, for more than MANY tasks; None for fewer."""
    if not scores.crowded:
        return None
    digits = {m: decimals(scores, m) for m in scores.metrics}
    rows = []
    for metric, higher in scores.metrics.items():
        values = [list(g.by_seed(metric, at).values()) for g in scores.groups]
        fair = [scores.comparable(g, at) for g in scores.groups]
        alone = [scores.alone(g, metric, at) for g in scores.groups]
        cells = spreads(values, [len(g.runs) for g in scores.groups], fair, higher, digits[metric], alone)
        single = next((x for x in alone if not math.isnan(x)), math.nan)
        rows.append(
            [Entry(metric), *cells, NONE if math.isnan(single) else Entry(fixed(single, digits[metric]), single)]
        )
    header = ["metric", *(g.label for g in scores.groups), "single-task"]
    note = "Mean ± sample standard deviation over seeds. Single-task: the mean of the baselines with the first config."
    found = table_of(scores, "tasks", "all tasks", note, header, rows, (at, "±", "*", "†"), at)
    found.folded = True
    return found


def multi_task(scores: Scores, at: str) -> Table:
    """Δm, mean rank, average achievement, Pareto-optimal runs and wins, for one selection."""
    bench, ranks, optimal = scores.benchmark, scores.mean_ranks(at), scores.pareto(at)
    fair, sizes = [scores.comparable(g, at) for g in scores.groups], [len(g.runs) for g in scores.groups]
    gains = [list(scores.delta_m(g, at).values()) for g in scores.groups]
    deltas = spreads(gains, sizes, fair, True, 2, alone=[0.0] * len(gains))  # Δm of single-task learning
    # The average over the tasks, then each task by itself. Of many tasks, the average alone.
    mains = [None, *(scores.mains if len(scores.mains) > 1 and not scores.crowded else ())]
    reached = [
        spreads([list(scores.achievement(g, at, m).values()) for g in scores.groups], sizes, fair, True, 2)
        for m in mains
    ]
    won = {m: scores.wins(m, at) for m in bench.metrics}
    if scores.crowded and won:
        every = Counter()
        for by_label, _ in won.values():
            every.update(by_label)
        won = {"all metrics": (dict(every), sum(seeds for _, seeds in won.values()))}
    lowest = min((r for r in ranks.values() if not math.isnan(r)), default=None)
    rows = []
    for group, delta, *shares in zip(scores.groups, deltas, *reached, strict=True):
        rank, front = ranks[group.label], sum(optimal[r.directory] for r in group.runs)
        row = [Entry(group.label), count(scores, group), delta, *shares]
        row.append(NONE if math.isnan(rank) else Entry(f"{rank:.2f}", rank, rank == lowest))
        row.append(Entry(f"{front} of {len(group.runs)}", front) if bench.tasks else NONE)
        for by_label, seeds in won.values():
            n = by_label.get(group.label)
            row.append(NONE if n is None or not seeds else Entry(f"{n} of {seeds}", n))
        rows.append(row)
    parts = [
        f"{defined(scores)}, {pairing(scores)}.",
        bench.common[scores.arch].warning if bench.common else "",
        nothing(scores, at),
        f"Achievement takes the main metrics. Pareto: among {len(optimal)} run{'s' * (len(optimal) != 1)}.",
        excuses(scores),
    ]
    note = " ".join(filter(None, parts))
    each = [f"achievement %\n{scores.owner[m]}" for m in mains[1:]]
    header = ["strategy", "n", "Δm %", "achievement %", *each, "MR", "Pareto", *(f"wins\n{m}" for m in won)]
    terms = (at, "±", "*", "Δm", "achievement", "MR", "Pareto", "wins")
    return table_of(scores, "multi-task", "multi-task metrics", note, header, rows, terms, at)


def defined(scores: Scores) -> str:
    """The definition of Δm: "Δm is taken over the main metric of each task (fine_accuracy, coarse_accuracy)"."""
    names = f"{len(scores.gained)} metrics" if scores.crowded else ", ".join(scores.gained)
    return f"Δm is taken {_DELTA[scores.benchmark.delta_m]} ({names})"


def optimizers(scores: Scores, at: str) -> Table | None:
    """Pareto-optimal runs per optimizer; None where all runs share one."""
    runs = [(r, g.optimizer) for g in scores.groups for r in g.runs]
    names = sorted({name for _, name in runs})
    if len(names) < 2:
        return None
    optimal, rows = scores.pareto(at), []
    rivals = names if len(names) > 2 else []  # of two optimizers, all others are the other one
    for name in names:
        own = [r for r, optimizer in runs if optimizer == name]

        def free(*others: str, own=own) -> int:
            """Its runs that no run with another optimizer dominates."""
            points = scores.points([r for r, optimizer in runs if optimizer in others], at)
            return int(multitask.pareto_optimal(scores.points(own, at), scores.higher, points).sum())

        counts = len(own), sum(optimal[r.directory] for r in own), free(*(n for n in names if n != name))
        row = [Entry(name), *(Entry(str(c), c) for c in counts)]
        rows.append([*row, *(NONE if n == name else Entry(str(c := free(n)), c) for n in rivals)])
    note = (
        "Runs that no other run dominates in the tasks' main metrics, and runs that none with another optimizer does, "
        "as in Elich et al., Examining Common Paradigms in Multi-Task Learning. An optimizer with more runs, or better "
        "tuned ones, has more chances."
    )
    header = ["optimizer", "runs", "Pareto-optimal", "not dominated\nby other optimizers"]
    header += [f"not dominated\nby {name}" for name in rivals]
    return table_of(scores, "optimizers", "Pareto-optimal runs per optimizer", note, header, rows, (at, "Pareto"), at)


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
        for metric in scores.compared
    ]
    if not compared:
        return None
    pairs = []
    for group, against, metric in compared:
        ours, theirs = scores.by_seed(group, metric, at), scores.by_seed(against, metric, at)
        seeds = [s for s in ours if s in theirs]
        pairs.append(paired([ours[s] for s in seeds], [theirs[s] for s in seeds], scores.compared[metric]))
    adjusted, rows = holm([d.p for d in pairs]), []
    digits = {metric: decimals(scores, metric) for metric in scores.compared}
    for (group, against, metric), d, p in zip(compared, pairs, adjusted, strict=True):
        words = verdict(d, p, scores.compared[metric])
        if lacks := [f"{g.label}: {why}" for g in (group, against) if (why := failed(scores, g, metric, at))]:
            words = f"{words}; but {', '.join(lacks)}"
        bounds = [d.mean, *(d.student or (math.nan, math.nan)), *(d.bootstrap or (math.nan, math.nan))]
        row = [Entry(group.label), Entry(metric), Entry(str(d.n), d.n)]
        row += [NONE if math.isnan(x) else Entry(signed(x, digits[metric]), x) for x in bounds]
        row += [Entry(f"{d.wins}:{d.losses}"), NONE if math.isnan(p) else Entry(f"{p:.3f}", p), Entry(words)]
        rows.append(row)
    named = any(g.name == reference for g in scores.groups)
    alone = [g.label for g in scores.groups if g.name != reference and scores.reference(g, reference) is None] * named
    note = (
        f"Strategy minus {reference}, same seed{', same config except for the loss' if named else ''}. {len(pairs)} "
        f"comparisons, {sum(not math.isnan(d.p) for d in pairs)} of them tested."
    )
    if alone:
        note += f" Not compared, as {reference} was not run with their config: {some(alone)}."
    header = [
        "strategy", "metric", "n", "difference", "95 % t\nlow", "95 % t\nhigh", "bootstrap\nlow", "bootstrap\nhigh",
        "seeds\nbetter:worse", "p (Holm)", "verdict",
    ]  # fmt: skip
    return table_of(
        scores, "differences", f"differences from {reference}", note, header, rows, (at, "95 %", "verdict"), at
    )


def cost(scores: Scores) -> Table | None:
    """Images (or samples) per second, step time and peak memory of each strategy; None if no run knows any of them."""
    groups = [*scores.groups, *scores.baselines]
    noun = groups[0].any.noun if groups else "image"
    columns: dict[str, Callable[[Run], float]] = {
        f"{noun}s/s": lambda r: r.fact("images_per_second"),
        "ms/step": step_time,
        "peak GiB\nGPU": lambda r: r.fact("peak_memory_gib") if r.gpu else math.nan,
        "peak GiB\nprocess": lambda r: math.nan if r.gpu else r.fact("peak_memory_gib"),
        "hours": lambda r: r.fact("seconds") / 3600,
        "parameters\nmillion": lambda r: r.fact("parameters") / 1e6,
    }
    rows, header = [[Entry(g.label), Entry(str(len(g.runs)), len(g.runs))] for g in groups], ["strategy", "n"]
    for name, fact in columns.items():
        values = [[x for r in g.runs if math.isfinite(x := fact(r))] for g in groups]
        if any(values):
            header.append(name)
            for row, cell in zip(rows, spreads(values, [len(g.runs) for g in groups], [False] * len(groups), True),
                                 strict=True):  # fmt: skip
                row.append(cell)
    if len(header) == 2:
        return None
    note = (
        f"Mean ± sample standard deviation over seeds. {noun.title()}s per second and step time are measured in "
        "training, with data loading and without evaluation. A busy machine makes both worse. Peak memory of a GPU: "
        "all tensors. Peak memory of a CPU run: the resident memory of the whole process, with Python and the data."
    )
    return table_of(scores, "cost", "speed and memory", note, header, rows, ("±",))


def per_run(benchmarks: Sequence[Protocol]) -> Table:
    """One row per finished run with all of its values. Every other table is made from these."""
    metrics = list(dict.fromkeys(m for b in benchmarks for m in b.metrics))
    shown = [at for at in SELECTIONS if at in ALWAYS or any(b.select == at for b in benchmarks)]
    columns = [(m, at) for m in metrics for at in shown]
    rows = []
    for benchmark in benchmarks:
        scores = {arch: Scores(benchmark, arch) for arch in benchmark.archs}
        for group in [*benchmark.groups, *benchmark.baselines]:
            gains = _gains(scores[group.arch], group)
            for run in group.runs:
                words = [benchmark.name, group.arch, group.label, group.optimizer, str(run.seed)]
                numbers = [run.value(m, at) for m, at in columns] + [run.fact(f) for f in FACTS]
                numbers += [gain.get(run.seed, math.nan) for gain in gains]
                cells = [Entry("") if math.isnan(x) else Entry(str(x), x) for x in numbers]
                notes = [benchmark.main, benchmark.delta_m, _origin(benchmark, group)] if any(gains) else [""] * 3
                ends = [*notes, str(run.info.get("commit")), str(run.info.get("dirty")), visible(str(run.directory))]
                rows.append([*map(Entry, words), *cells, *map(Entry, ends)])
    header = ["benchmark", "arch", "strategy", "optimizer", "seed", *(f"{m}\n{at}" for m, at in columns), *FACTS]
    header += ["Δm %", "validation Δm %", "epoch of Δm", "metrics of Δm", "baseline of Δm"]
    return Table("Runs", "Test set.", [*header, "commit", "dirty", "directory"], rows)


def _gains(scores: Scores, group: Group) -> list[dict[int, float]]:
    """Δm of each seed on test and on validation data; a single-task run has none."""
    return [scores.delta_m(group, scores.benchmark.main, s) if group.task is None else {} for s in ("test", "val")]


def _origin(benchmark: Protocol, group: Group) -> str:
    """The origin of the baseline, in words."""
    return benchmark.common[group.arch].words if benchmark.common else "own single-task runs with the same config"


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


def _published(scores: Scores, columns: Sequence[tuple[str, str]]) -> tuple[list[list[Entry]], str]:
    """Rows of published values for this data set and architecture, and a note about them."""
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
            row += spreads([values], [len(mine)], [False], True)
        rows.append(row)
    note = (
        "Published: the CIFAR-100 loss-combination benchmark, best fine-class test accuracy, 200 epochs on all 50,000 "
        "images with SGD, lr 0.1, cosine (batch size not stated); its PCGrad sees two scalar losses and is not the "
        "paper's gradient projection."
    )
    ours = flatten(scores.groups[0].any.config)
    differs = [f"{k} {ours.get(k)} instead of {v}" for k, v in PUBLISHED.items() if ours.get(k) != v]
    return rows, note + (f" Not comparable with the runs here: {', '.join(differs)}." if differs else "")
