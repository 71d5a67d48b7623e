"""The notes under the tables, about the runs behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mtl.report.cells import value
from mtl.report.scores import Scores
from mtl.tracking.console import count


def excuses(scores: Scores) -> str:
    """Gaps of the strategies: runs without a result, values that are not finite, missing seeds."""
    stopped = [
        f"{g.label}, seed {', '.join(f'{r.seed} {r.status}' for r in g.stopped)}"
        for g in [*scores.groups, *scores.baselines, *scores.lost]
        if g.stopped
    ]
    fewer = [f"{g.label} ({len(g.runs)})" for g in scores.groups if not scores.complete(g)]
    broken = [
        f"{g.label}, seed {r.seed} ({', '.join(f'{m} {value(r, m)}' for m in bad)})"
        for g in scores.groups
        for r in g.runs
        if (bad := list(dict.fromkeys(m for at in scores.benchmark.selections for m in scores.broken(r, at))))
    ]
    unknown = [m for m in scores.metrics if m not in scores.known] if scores.groups else []
    rest = "; their means are over the other seeds" if scores.groups else ""
    parts = [f"Without a result: {some(stopped)}{rest}."] if stopped else []
    if broken:
        parts.append(f"Not finite: {some(broken)}; these means are over the other seeds, with their number (n=…).")
    if unknown:
        why = "A test split without labels has none, nor has F1 of a class that no test sample has."
        parts.append(f"No run has a finite value of {some(unknown, sep=', ')}. {why}")
    if fewer:
        parts.append(f"Fewer than {scores.usual} seeds: {some(fewer)}.")
    if early := _early(scores):
        parts.append(f"Stopped early, by trainer.patience: {some(early)}.")
    if scores.usual == 1:
        parts.append("One seed a strategy: nothing here tells a better strategy from a luckier one.")
    return " ".join(parts)


def _early(scores: Scores) -> list[str]:
    """For each group with a run that stopped early, the numbers of epochs of its runs."""
    found = []
    for group in [*scores.groups, *scores.baselines]:
        if any(r.info.get("stopped_early") for r in group.runs):
            least, *_, most = sorted(2 * [r.summary["epochs"] for r in group.runs])
            found.append(f"{group.label} after {count(most, 'epoch')}" if least == most else
                         f"{group.label} after {least} to {most} epochs")  # fmt: skip
    return found


def pairing(scores: Scores, full: bool = True) -> str:
    """The baselines that the runs of a strategy are compared with, and where they come from.

    Args:
        full: with the groups that were chosen as the common baseline.
    """
    if scores.benchmark.common:
        common = scores.benchmark.common[scores.arch]
        return f"against {common.words if full else common.origin}" if common.tasks else "without baselines"
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
        f"against the own single-task run with the same config and the same seed ({count(same, 'run')})"
        if same
        else "",
        f"against the mean of own single-task runs where one lacks the seed ({count(averaged, 'run')})"
        if averaged
        else "",
        f"not where a task has no baseline with the same config ({some(without)})" if without else "",
    ]
    return ", ".join(filter(None, parts)) or "without baselines"


def nothing(scores: Scores, at: str) -> str:
    """The metrics whose baseline is 0: no gain is relative to it."""
    zero = [
        metric
        for metric in scores.gained
        if any(0 in scores.potentials(r, g, [metric], at) for g in scores.groups for r in g.runs)
    ]
    return f"No Δm where a baseline is 0: {some(zero, sep=', ')}." if zero else ""


def provenance(scores: Scores) -> str:
    """The number of runs, their commits and their machines."""
    runs = [r for g in [*scores.groups, *scores.baselines] for r in g.runs]
    if not runs:
        return ""
    commits = Counter((r.info.get("commit") or "unknown")[:7] for r in runs)
    devices = sorted({r.info.get("hardware", {}).get("gpu") or "CPU" for r in runs})
    dirty = sum(bool(r.info.get("dirty")) for r in runs)
    text = f"{count(len(runs), 'run')}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return text + (f" ({dirty} with uncommitted changes)" if dirty else "") + f", on {', '.join(devices)}."


def some(words: Sequence[str], most: int = 6, sep: str = "; ") -> str:
    """The first few of a list, and how many more there are."""
    return sep.join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
