"""The words of the report's tables, each defined once."""

from __future__ import annotations

from collections.abc import Iterable

from mtl.report.statistics import FEW, FEWEST, LEVEL, RESAMPLES

TERMS = {
    "last": "The value of the last epoch.",
    "best": "The value of the best test epoch of each metric. It was chosen on test data, so it is too good. No one "
    "network has all of these values.",
    "selected": "The value of the one epoch that validation data chose: by the first task's metric, or by the mean "
    "over tasks.",
    "last10": "The mean of the values of the last ten epochs.",
    "delta_m": "The value of the one epoch whose validation metrics have the best Δm. A single-task run has the epoch "
    "that its own validation metric chose.",
    "±": "Sample standard deviation over seeds.",
    "*": "The best mean among the multi-task strategies, or bold. It does not say that the difference is real. "
    "Strategies with fewer seeds than most, a failed seed or a value that is not finite are left out.",
    "†": "The mean is better than the baseline, single-task learning. The note under Δm names the baseline.",
    "mean over tasks": "Mean of the tasks' main metrics, of tasks with the same kind of metric.",
    "Δm": "Mean relative gain over single-task learning, in percent (Maninis et al. 2019). Above 0 is better. "
    "Many papers print the opposite sign.",
    "achievement": "Mean share of the single-task value, in percent (Yun & Cho 2023). 100 is single-task learning.",
    "MR": "Mean rank over all metrics, of the means over seeds (Navon et al. 2022). Lower is better, and equals share "
    "a rank. A strategy with a failed seed or a value that is not finite ranks last; one with fewer seeds than most "
    "has no rank.",
    "Pareto": "Runs that no other run on this architecture dominates in the tasks' main metrics.",
    "wins": "Seeds in which the strategy is the best. Equals count for each.",
    "95 %": "Intervals of the mean difference: Student's t, and the percentile bootstrap. The bootstrap "
    f"({RESAMPLES:,} resamples, fixed seed) is no evidence for so few seeds. With 3, 5, 10 and 20 seeds its intervals "
    "held the true mean of normal samples in 74, 84, 89 and 92 % of cases (cf. Colas et al. 2018).",
    "verdict": f"Better or worse: Student's t interval excludes 0, and the paired t test stays below {1 - LEVEL:.2f} "
    "after Holm's correction (1979) for all comparisons of the table. Perhaps: only the interval excludes 0. Too few "
    f"to tell: fewer than {FEWEST} seeds, or fewer than {FEW} where the interval holds 0.",
}  # fmt: skip


def define(terms: Iterable[str]) -> str:
    """The definitions of some terms in one paragraph."""
    return " ".join(f"{term}: {TERMS[term][0].lower()}{TERMS[term][1:]}" for term in terms)


def used(terms: Iterable[str]) -> dict[str, str]:
    """{term: definition} of some terms, in the glossary's order."""
    wanted = set(terms)
    return {term: text for term, text in TERMS.items() if term in wanted}
