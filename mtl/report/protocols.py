"""Which runs may be compared: benchmarks, groups of seeds, and each group's single-task baselines."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mtl.config.identity import as_before, canonical, decisive, owner
from mtl.report.runs import ALWAYS, Run
from mtl.report.statistics import mean
from mtl.report.validate import SINGLE
from mtl.tracking import flatten

_PROTOCOL = ("data", "trainer")  # the nodes that make a benchmark
_NETWORK = ("arch", "sharing")  # the nodes that make a network
_SPELLED = {"epochs": "{} epochs", "limit_test": "{:,} test {noun}s", "batch_size": "batch {}"}
_LONGEST = 60  # characters of a value in a label
DELTA_M = ("main", "flat", "task")  # definitions of Δm
_EVERY = -1  # stands for every seed


@dataclass
class Group:
    """Runs that differ only in the seed.

    Attributes:
        label: unique in its benchmark and arch: the loss option's name and, where several configs share that name, what
            differs: "dwa, temperature 1", "equal, adatask", "equal, lr 0.01".
        arch: the same for the architecture.
        runs: the finished ones, sorted by seed.
        optimizer: the option's name.
        stopped: runs of this group that failed, diverged or have not finished; their values are missing in `runs`.
    """

    label: str
    arch: str
    runs: list[Run]
    optimizer: str
    stopped: list[Run] = field(default_factory=list)

    @property
    def any(self) -> Run:
        """One of the runs: for what they all share."""
        return (self.runs or self.stopped)[0]

    @property
    def name(self) -> str:
        """The loss option's name."""
        return self.any.info["loss"]

    @property
    def task(self) -> str | None:
        """The task of a single-task baseline."""
        loss = self.any.config["loss"]
        return loss.get("task") if loss["_target_"] == SINGLE else None

    @cached_property
    def setting(self) -> str:
        """The config without the loss and the switches of its step, as a key."""
        return _key({k: v for k, v in _decisive(self.any).items() if k not in ("loss", "step")})

    @property
    def open(self) -> list[Run]:
        """Runs that have not finished and have epochs to show."""
        return [r for r in self.stopped if r.open]

    @property
    def failures(self) -> list[Run]:
        """Runs that ended without a result, of their own fault: they count against the strategy."""
        return [r for r in self.stopped if r.status in ("diverged", "failed")]

    def by_seed(self, metric: str, at: str, split: str = "test") -> dict[int, float]:
        """{seed: value} of the finished runs whose value is a finite number; arguments as for `Run.value`."""
        return {r.seed: value for r in self.runs if math.isfinite(value := r.value(metric, at, split))}


@dataclass(frozen=True)
class Shared:
    """The baseline of one task where all strategies share it: one value for each metric, whatever the seed.

    Attributes:
        group: the mean over its seeds counts; None for constants.
        constants: {metric: value}, the same on test and validation data and in every selection.
        tried: the number of groups that the group was chosen from.
    """

    group: Group | None = None
    constants: Mapping[str, float] = field(default_factory=dict)
    tried: int = 1

    def by_seed(self, metric: str, at: str, split: str = "test") -> dict[int, float]:
        """One value under a seed that no run has; empty where there is none."""
        if self.group:
            values = list(self.group.by_seed(metric, at, split).values())
        else:
            values = [self.constants[metric]] if metric in self.constants else []
        return {_EVERY: mean(values)} if values else {}


@dataclass(frozen=True)
class Common:
    """The baselines that all strategies on an architecture share: see `mtl.report.baselines`.

    Attributes:
        origin: what they are and where they come from.
        tasks: {task: its baseline}; a task that was not trained alone is not there.
        warning: why the strategies' numbers and these do not compare; empty if nothing speaks against it.
    """

    origin: str
    tasks: Mapping[str, Shared]
    warning: str = ""

    @property
    def words(self) -> str:
        """The origin with the groups that were chosen."""
        groups = [f"{task}: {shared.group.label} on {shared.group.arch}"
                  for task, shared in self.tasks.items() if shared.group]  # fmt: skip
        return self.origin + (f" ({'; '.join(groups)})" if groups else "")


@dataclass
class Protocol:
    """Groups under one protocol: the same data, number of epochs and precision.

    Attributes:
        name: "cifar100"; with what differs if there are several: "cifar100, 8 epochs, 3,600 images".
        metrics: test metrics, {"fine_accuracy": higher is better, …}; None for better before any run has finished.
        groups: multi-task strategies with at least one finished run.
        baselines: single-task learning, one group per arch and task (and optimizer).
        tasks: the main metric of each task, {"fine": "fine_accuracy", …}.
        lost: groups without a finished run.
        delta_m: which metrics Δm takes: "main" (the main one of each task), "flat" (all alike) or "task" (all,
            after a mean over each task's metrics).
        select: the selection that conclusions rest on, of `SELECTIONS`; None for the usual one.
        common: {arch: the baselines that its strategies share}; empty where each is held against the single-task runs
            with its own config.
        units: {"mu_mae": "D", …}, of the metrics that have one.
    """

    name: str
    metrics: dict[str, bool | None]
    groups: list[Group]
    baselines: list[Group]
    tasks: dict[str, str] = field(default_factory=dict)
    lost: list[Group] = field(default_factory=list)
    delta_m: str = "main"
    select: str | None = None
    common: Mapping[str, Common] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def archs(self) -> list[str]:
        return list(dict.fromkeys(g.arch for g in [*self.groups, *self.baselines, *self.lost]))

    def of(self, arch: str) -> list[Group]:
        """The strategies on one architecture."""
        return [g for g in self.groups if g.arch == arch]

    @property
    def selections(self) -> list[str]:
        """How epochs were selected, of `SELECTIONS`; "selected" only where every strategy's runs have it."""
        asked = [] if self.select in (None, *ALWAYS) else [self.select]
        return [s for s in ALWAYS if s != "selected" or self._validated] + asked

    @cached_property
    def _validated(self) -> bool:
        return bool(self.groups) and all(r.summary.get("selected") for g in self.groups for r in g.runs)

    @property
    def main(self) -> str:
        """The selection that conclusions rest on: by validation data if there is any, else the last epoch."""
        return self.select or ("selected" if self._validated else "last")

    def baseline(self, group: Group, task: str) -> Group | Shared | None:
        """What `group` is held against in `task`: the group trained on it alone with the same config except for the
        loss, or what all strategies share."""
        if self.common:
            return self.common[group.arch].tasks.get(task)
        return counterpart(group, [b for b in self.baselines if b.task == task])


def benchmarks(runs: Iterable[Run], stopped: Iterable[Run] = ()) -> list[Protocol]:
    """Sort runs into benchmarks and groups.

    Runs belong to one benchmark if their data and trainer nodes are equal, apart from options that decide no number
    (paths, device, workers). They belong to one group if their identities are equal, apart from the seed.

    Args:
        runs: finished.
        stopped: runs that ended early, `Collection.stopped`.
    """
    members: dict[str, Group] = {}
    for run in sorted([*runs, *stopped], key=lambda r: (r.info["group"], r.seed)):
        group = members.setdefault(run.info["group"], Group("", run.info["arch"], [], _option(run, "optimizer")))
        (group.runs if run.status == "finished" else group.stopped).append(run)
    protocols: dict[Hashable, list[Group]] = {}
    for group in members.values():
        protocols.setdefault(_key({n: _decisive(group.any)[n] for n in _PROTOCOL}), []).append(group)
    names = _labels([groups[0] for groups in protocols.values()], "data", _PROTOCOL)
    return sorted(
        (_benchmark(n, groups) for n, groups in zip(names, protocols.values(), strict=True)), key=lambda b: b.name
    )


def _benchmark(name: str, groups: list[Group]) -> Protocol:
    for group, arch in zip(groups, _labels(groups, "arch", _NETWORK), strict=True):
        group.arch = arch
    for arch in {g.arch for g in groups}:
        here = [g for g in groups if g.arch == arch]
        rest = tuple(k for k in _decisive(here[0].any) if k not in (*_PROTOCOL, *_NETWORK))
        for group, label in zip(here, _labels(here, "loss", rest), strict=True):
            group.label = label
    groups.sort(key=lambda g: (g.arch, g.label))
    finished = [g for g in groups if g.runs]
    strategies = [g for g in finished if g.task is None]
    metrics: dict[str, bool | None] = {}
    tasks: dict[str, str] = {}
    for group in strategies or finished:
        metrics |= group.runs[0].metrics
    if not finished:
        metrics |= {k: v for g in groups for r in g.open for k, v in r.metrics.items()}
    units: dict[str, str] = {}
    for group in strategies[:1] or finished:
        tasks |= group.runs[0].tasks
        units |= group.runs[0].summary.get("units") or {}
    # A metric that no run has is left out, such as F1 of a class without a test image.
    ran = [run for group in strategies for run in group.runs]
    lacking = [task for task, metric in tasks.items() if ran and all(math.isnan(r.value(metric)) for r in ran)]
    tasks = {task: metric for task, metric in tasks.items() if task not in lacking or len(lacking) == len(tasks)}
    return Protocol(
        name, metrics, strategies, [g for g in finished if g.task], tasks, [g for g in groups if not g.runs],
        units=units,
    )  # fmt: skip


def counterpart(group: Group, candidates: Sequence[Group]) -> Group | None:
    """The candidate with the same architecture and the same config as `group`, except for the loss.

    The switches in `step` say how the tasks' gradients are combined, so they go with the loss; a candidate that agrees
    in them too is preferred.
    """
    fitting = [c for c in candidates if c.arch == group.arch and c.setting == group.setting]
    step = _key(group.any.config.get("step"))
    exact = [c for c in fitting if _key(c.any.config.get("step")) == step]
    return next(iter(exact or fitting), None)


def _decisive(run: Run) -> dict[str, Any]:
    """The config without options that decide no number, and with the run's note on own code."""
    content = as_before(decisive(run.config))  # a run from before an option was added equals one at its default
    for node, noted in (run.info.get("own") or {}).items():
        for key, digest in noted.items() if isinstance(content.get(node), dict) else ():
            place, name = owner(content[node], key) or (content[node], key)
            place[name] = digest
    return content


def _key(content: Any) -> str:
    return json.dumps(canonical(content), sort_keys=True, default=str)


def rateless(run: Run) -> str:
    """What a run shares with those that differ from it in the learning rate and the seed alone, as a key."""
    content = _decisive(run)
    return _key({**content, "optimizer": {k: v for k, v in content["optimizer"].items() if k != "lr"}})


def _option(run: Run, node: str) -> str:
    """The name of the option that was chosen for a node."""
    name = run.info.get("choices", {}).get(node)
    target = run.config.get(node, {}).get("_target_", "")
    return run.info[node] if node in ("data", "arch", "loss") else name or target.rpartition(".")[2].lower() or "none"


def _labels(groups: Sequence[Group], named: str, nodes: Sequence[str]) -> list[str]:
    """One label per group: the option chosen for the node `named`, and what differs in `nodes` where several share it.

    Groups with equal nodes get equal labels, except for losses, which need different labels: there the run's digest
    decides. Where the words leave two nodes alike (a long value is cut), a digest of the node does.
    """
    configs = [{n: c[n] for n in nodes if n in c} for c in (_decisive(g.any) for g in groups)]
    labels = [_option(g.any, named) for g in groups]
    for name in set(labels):
        same = [i for i, label in enumerate(labels) if label == name]
        if len({_key(configs[i]) for i in same}) > 1:
            for i, words in zip(same, _differences([groups[i] for i in same], [configs[i] for i in same]), strict=True):
                labels[i] = ", ".join([name, *words])
    if named == "loss":
        tags, twice = [g.any.info["digest"] for g in groups], {x for x in labels if labels.count(x) > 1}
    else:
        keys = [_key(c) for c in configs]
        tags = [hashlib.sha256(k.encode()).hexdigest()[:8] for k in keys]
        twice = {x for x in labels if len({k for k, y in zip(keys, labels, strict=True) if x == y}) > 1}
    labels = [f"{x}, {tag}" if x in twice else x for x, tag in zip(labels, tags, strict=True)]
    return labels


def _differences(groups: Sequence[Group], configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What tells each config from the others, in words."""
    words: list[list[str]] = [[] for _ in configs]
    for node in dict.fromkeys(n for c in configs for n in c):
        values = [c.get(node, {}) for c in configs]
        if not all(isinstance(v, Mapping) for v in values):
            if len(set(map(_key, values))) > 1:
                for w, v in zip(words, values, strict=True):
                    w.append(f"{node} {v}")
            continue
        targets = [v.get("_target_") for v in values]
        if len(set(targets)) > 1:
            for w, g in zip(words, groups, strict=True):
                w.append(_option(g.any, node))
        flat = [flatten(v) for v in values]
        for target in dict.fromkeys(targets):
            same = [i for i, t in enumerate(targets) if t == target]
            for key in dict.fromkeys(k for i in same for k in flat[i]):
                if len({_key(flat[i].get(key)) for i in same}) > 1:
                    for i in same:
                        if word := _spell(key, flat[i].get(key), flat[i], groups[i].any.noun):
                            words[i].append(word)
    return words


def _spell(key: str, value: Any, node: Mapping[str, Any], noun: str) -> str:
    """A key and its value as a reader would say it; nothing for a default that was left open.

    Args:
        noun: what a sample is called.
    """
    leaf, value = key.rpartition(".")[2], canonical(value)
    if leaf == "task":
        return str(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return leaf if value else f"no {leaf}"
    if isinstance(value, int) and leaf == "limit_train":
        share = node.get("val_fraction", 0)
        held_out = round(value * share) if isinstance(share, (int, float)) and 0 <= share < 1 else 0
        return f"{value - held_out:,} {noun}s"
    if isinstance(value, int):
        words = _SPELLED.get(leaf, leaf + " {}").format(value, noun=noun)
        return words.removesuffix("s") if value == 1 and leaf in _SPELLED else words
    if isinstance(value, float):
        return f"{leaf} {value:g}"
    text = str(value)
    if len(text) > _LONGEST:  # two paths differ at their ends
        text = f"…{text[-_LONGEST:]}" if text.startswith("/") else f"{text[:_LONGEST]}…"
    return f"{leaf} {text}"
