"""Three sentences about the runs: which strategy leads, whether the lead holds, and which runs are missing."""

from __future__ import annotations

import math
from collections import Counter

from mtl.report.names import minus
from mtl.report.notes import some
from mtl.report.protocols import Group
from mtl.report.scores import Scores
from mtl.report.statistics import FEW, FEWEST, holm, mean, paired, verdict
from mtl.report.summaries import defined, differences

TEST = "under the paired t test with Holm's correction"


def findings(scores: Scores, reference: str) -> list[str]:
    """The sentences.

    Args:
        reference: strategy that the others are compared with where there is no Δm.
    """
    if not scores.groups:
        return [_nothing(scores)]
    at = scores.benchmark.main
    rivals = {g.label: g for g in scores.groups if scores.comparable(g, at)}
    gains = {label: gain for label, g in rivals.items() if (gain := scores.delta_m(g, at))}
    said = _by_gain(gains) if gains else _by_rank(scores, rivals, reference)
    if gains and scores.benchmark.common:
        common = scores.benchmark.common[scores.arch]
        said.append(f"{defined(scores)}, against {common.origin}.{' ' * bool(common.warning)}{common.warning}")
    return [*said, _missing(scores, bool(gains))]


def _nothing(scores: Scores) -> str:
    if scores.baselines:
        return "Only single-task baselines have finished, so there is nothing to compare yet."
    states = Counter(r.status for g in scores.lost for r in g.stopped)
    return f"No run has finished yet ({', '.join(f'{n} {state}' for state, n in states.items())})."


def _by_gain(gains: dict[str, dict[int, float]]) -> list[str]:
    """The leader by Δm, and the others that it is really better than."""
    means = {label: mean(gain.values()) for label, gain in gains.items()}
    first, *others = sorted(means, key=lambda label: -means[label])
    if not others:
        return [f"Only {first} can be held against single-task learning: Δm is {_percent(means[first])}."]
    above = sum(m > 0 for m in means.values())
    better = "no strategy is" if not above else f"{above} of them {'is' if above == 1 else 'are'}"
    better = "all of them are" if above == len(means) else better
    leads = f"By Δm, {first} is the best of {len(means)} strategies ({_percent(means[first])}); {better} better than "
    leads += "single-task learning on average."
    pairs = []
    for label in others:
        seeds = [s for s in gains[first] if s in gains[label]]
        pairs.append(paired([gains[first][s] for s in seeds], [gains[label][s] for s in seeds], True))
    adjusted = holm([d.p for d in pairs])
    words = [verdict(d, p, True) for d, p in zip(pairs, adjusted, strict=True)]
    holds = words.count("better")
    if len(others) == 1:
        held = "holds" if holds else "does not hold"
        why = "" if holds else f" ({words[0].replace(':', ',')})"
        return [leads, f"Its lead over {others[0]} {held} {TEST}{why}."]
    if holds == len(others):
        return [leads, f"Its lead holds against all {len(others)} others {TEST}."]
    nearest = next(i for i, word in enumerate(words) if word != "better")
    among = f"{holds} of the {len(others)} others" if holds else "none of the others"
    return [leads, f"Its lead holds against {among} {TEST} ({others[nearest]}: {words[nearest].replace(':', ',')})."]


def _by_rank(scores: Scores, rivals: dict[str, Group], reference: str) -> list[str]:
    """The leader by mean rank, and the differences that hold."""
    at = scores.benchmark.main
    ranks = {label: r for label, r in scores.mean_ranks(at).items() if label in rivals and not math.isnan(r)}
    if not ranks:
        leads = "There are no two strategies to rank."
    else:
        first = min(ranks, key=lambda label: ranks[label])
        tied = [label for label in ranks if ranks[label] == ranks[first]]
        leads = f"By mean rank over the metrics, {some(tied, sep=', ')} {'is' if len(tied) == 1 else 'are'} the best "
        leads += f"of {len(ranks)} strategies (MR {ranks[first]:.2f})."
    table = differences(scores, reference, at)
    if table is None:
        return [leads, f"Nothing was compared with {reference}: no other strategy shares its config."]
    found = [(row[0].text, row[-1].text) for row in table.rows]
    hold = list(dict.fromkeys(label for label, word in found if word.startswith(("better", "worse"))))
    count = sum(word.startswith(("better", "worse")) for _, word in found)
    names = f" ({some(hold, sep=', ')})" if hold else ""
    return [leads, f"{count} of {len(found)} differences from {reference} hold {TEST}{names}."]


def _missing(scores: Scores, known: bool) -> str:
    """Runs that are missing for a firm conclusion."""
    parts = []
    lacking = [
        g.label for g in scores.groups if any(scores.benchmark.baseline(g, t) is None for t in scores.benchmark.tasks)
    ]
    if lacking and not known:
        parts.append("single-task baselines, so there is no Δm")
    elif lacking:
        parts.append(f"single-task baselines of {some(lacking, 3, ', ')}")
    states = Counter(r.status for g in [*scores.groups, *scores.baselines, *scores.lost] for r in g.stopped)
    parts += [f"{n} {'run that is' if n == 1 else 'runs that are'} {state}" if state in ("running", "interrupted")
              else f"{n} {'run' if n == 1 else 'runs'} that {state}" for state, n in states.items()]  # fmt: skip
    if fewer := [g.label for g in scores.groups if not scores.complete(g)]:
        parts.append(f"seeds of {some(fewer, 3, ', ')}")
    seeds = "one seed is" if scores.usual == 1 else f"{scores.usual} seeds are"
    few = f"{seeds} few, and {'no' if scores.usual < FEWEST else 'only a large'} difference can be told from chance"
    if scores.usual >= FEW:
        few = f"every comparison rests on {scores.usual} seeds"
    return f"Missing: {'; '.join(parts)}; {few}." if parts else f"No run is missing; {few}."


def _percent(value: float) -> str:
    return minus(f"{value:+.2f} %")
