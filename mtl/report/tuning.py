"""The tables of a study that tunes: the baseline that all strategies share, and each strategy at its best rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtl.report import multitask
from mtl.report.baselines import shared_seeds
from mtl.report.cells import NONE, decimals, fixed, spreads
from mtl.report.notes import pairing, some
from mtl.report.protocols import Group, rateless
from mtl.report.runs import SELECTIONS
from mtl.report.scores import Scores
from mtl.report.statistics import mean
from mtl.report.summaries import defined, table_of
from mtl.report.tables import Entry, Table


@dataclass(frozen=True)
class Family:
    """Groups that differ in the learning rate alone.

    Attributes:
        groups: {rate: its group}, the smallest rate first; a group without a finished run is among them.
        gains: {rate: Δm on validation data}, the mean over the seeds that all rates have; without the rates that lost
            such a seed.
    """

    groups: dict[float, Group]
    gains: dict[float, float]

    @property
    def best(self) -> float | None:
        """The rate with the best Δm on validation data; of equal ones the smallest. None where no rate has one."""
        return max(self.gains, key=lambda rate: self.gains[rate], default=None)

    @property
    def diverged(self) -> int:
        """Rates with a run that failed or diverged."""
        return sum(bool(g.failures) for g in self.groups.values())

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate may lie beyond those that were tried."""
        rates = list(self.groups)
        return len(rates) > 1 and self.best in (rates[0], rates[-1])


def families(scores: Scores) -> list[Family]:
    """The strategies of an architecture by what they share apart from the rate. Test data choose nothing."""
    found: dict[str, dict[float, Group]] = {}
    for group in [*scores.groups, *(g for g in scores.lost if g.task is None)]:
        rate = group.any.config["optimizer"].get("lr")
        if isinstance(rate, (int, float)) and (group.runs or group.failures):
            found.setdefault(rateless(group.any), {})[rate] = group
    return [_family(scores, dict(sorted(groups.items()))) for groups in found.values()]


def _family(scores: Scores, groups: dict[float, Group]) -> Family:
    seeds, gains = shared_seeds(list(groups.values())), {}
    for rate, group in groups.items():
        by_seed = scores.delta_m(group, scores.benchmark.main, "val")
        known = [gain for seed, gain in by_seed.items() if seed in seeds]
        tried = [r for r in [*group.runs, *group.failures] if r.seed in seeds]
        if known and len(known) == len(tried):  # a seed that diverged has no Δm
            gains[rate] = mean(known)
    return Family(groups, gains)


def tuned(scores: Scores) -> Table | None:
    """Each strategy at the rate with the best Δm on validation data.

    None where no strategy was run at several rates, there is no Δm on validation data, or each rate has a baseline of
    its own: then the rate would win whose single-task runs are worst.
    """
    if not scores.benchmark.common:
        return None
    every = families(scores)
    chosen = [f for f in every if f.best is not None]
    if not chosen or not any(len(f.groups) > 1 for f in every):
        return None
    chosen.sort(key=lambda f: -f.gains[f.best])
    at, groups = scores.benchmark.main, [f.groups[f.best] for f in chosen]
    columns = list(scores.compared) if scores.crowded else scores.mains
    sizes, fair = [len(g.runs) for g in groups], [scores.comparable(g, at) for g in groups]
    gains = spreads([list(scores.delta_m(g, at).values()) for g in groups], sizes, fair, True, 2, [0.0] * len(groups))
    values = [
        spreads([list(scores.by_seed(g, m, at).values()) for g in groups], sizes, fair, scores.compared[m],
                decimals(scores, m), [scores.alone(g, m, at) for g in groups])
        for m in columns
    ]  # fmt: skip
    front = _front(scores, groups, at)
    rows = []
    for i, (family, group) in enumerate(zip(chosen, groups, strict=True)):
        gain, tried = family.gains[family.best], len(family.groups)
        row = [Entry(group.label), Entry(f"{family.best:g}", family.best), Entry(str(tried), tried)]
        row += [
            Entry(str(family.diverged), family.diverged),
            Entry(f"{gain:.2f}", gain),
            Entry(str(sizes[i]), sizes[i]),
        ]
        rows.append([*row, *(column[i] for column in values), gains[i], Entry(f"{front[i]} of {sizes[i]}", front[i])])
    header = ["strategy", "rate", "rates tried", "with a failed\nor diverged run", "validation\nΔm %", "n",
              *columns, "Δm %", "Pareto"]  # fmt: skip
    note = (
        f"The rate with the best Δm on validation data ({SELECTIONS[_validation(at)]}), over the seeds that all rates "
        "of the strategy have; over all seeds where they share none. The other columns are test data. "
        f"{defined(scores)}, {pairing(scores, full=False)}. Pareto: among the runs of this table."
    )
    if edge := [f"{f.groups[f.best].label}" for f in chosen if f.at_the_edge]:
        note += f" At the edge of the rates that were tried, so the best may lie beyond: {some(edge)}."
    if lost := [f.groups[min(f.groups)].label for f in every if f.best is None]:
        note += f" Without a rate that has a Δm on validation data: {some(lost)}."
    terms = (at, "±", "*", *(("†",) if any(c.beats for r in rows for c in r) else ()), "Δm", "Pareto")
    return table_of(scores, "tuned", "each strategy at its best rate", note, header, rows, terms, at)


def baseline(scores: Scores) -> Table | None:
    """The baseline that all strategies share, metric by metric; None where each has its own."""
    if not scores.benchmark.common or not scores.groups:
        return None
    at, common, rows = scores.benchmark.main, scores.benchmark.common[scores.arch], []
    for metric, task in ((m, scores.owner.get(m, "")) for m in scores.metrics):
        shared = common.tasks.get(task)
        if shared is None:
            continue
        test, held = (mean(shared.by_seed(metric, at, split).values()) for split in ("test", "val"))
        if math.isnan(test):
            continue
        group = shared.group
        row = [Entry(task), Entry(metric), Entry(fixed(test, decimals(scores, metric)), test)]
        if group is None:
            row += [NONE, NONE, Entry("constant"), NONE]
        else:
            row += [
                NONE if math.isnan(held) else Entry(fixed(held, decimals(scores, metric)), held),
                Entry(str(len(group.runs)), len(group.runs)),
                Entry(group.label + f" on {group.arch}" * (group.arch != scores.arch)),
                Entry(str(shared.tried), shared.tried),
            ]
        rows.append(row)
    header = ["task", "metric", "baseline", "on validation data", "n", "single-task runs", "of so many tried"]
    note = f"{defined(scores)}, {pairing(scores)}. {common.warning}".strip()
    return table_of(scores, "baseline", "the baseline of all strategies", note, header, rows, (at, "Δm"), at)


def _validation(at: str) -> str:
    """The selection on validation data: the best test epoch chooses nothing there."""
    return "selected" if at == "best" else at


def _front(scores: Scores, groups: Sequence[Group], at: str) -> list[int]:
    """The Pareto-optimal runs of each group, among the runs of all of them."""
    runs = [r for g in groups for r in g.runs]
    optimal = iter(multitask.pareto_optimal(scores.points(runs, at), scores.higher))
    return [sum(bool(next(optimal)) for _ in g.runs) for g in groups]
