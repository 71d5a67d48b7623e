"""A summary of many tasks: their mean, by kinds of metrics."""

from __future__ import annotations

from dataclasses import dataclass

from mtl.report.protocols import Protocol

MANY = 6  # tasks: with more, a table with a column for each is too wide for a page


@dataclass(frozen=True)
class Kind:
    """Main metrics of the same kind, whose values have one unit.

    Attributes:
        word: "accuracy".
        higher: is better.
        metrics: their names.
    """

    word: str
    higher: bool
    metrics: list[str]


def kinds(benchmark: Protocol) -> dict[str, Kind]:
    """{"mean accuracy of 40 tasks": …}; a metric that is alone of its kind keeps its own name."""
    found: dict[tuple[str, str, bool], list[str]] = {}
    for task, metric in benchmark.tasks.items():
        if metric in benchmark.metrics:
            key = metric.removeprefix(f"{task}_"), benchmark.units.get(metric, ""), benchmark.metrics[metric]
            found.setdefault(key, []).append(metric)
    words = [word for word, *_ in found]
    named = {}
    for (word, unit, higher), metrics in found.items():
        shown = f"{word} ({unit})" if words.count(word) > 1 and unit else word
        named[f"mean {shown} of {len(metrics)} tasks" if len(metrics) > 1 else metrics[0]] = Kind(
            shown, higher, metrics
        )
    return named
