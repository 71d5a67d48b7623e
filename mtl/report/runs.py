"""Finished runs, read back from their directories: no torch, no network, and nothing half-written gets through."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.config.identity import today
from mtl.errors import ConfigError
from mtl.report import validate
from mtl.report.files import Unreadable, read_json, read_rows, read_yaml
from mtl.report.names import visible
from mtl.report.validate import number
from mtl.tracking import flatten

SELECTIONS = {
    "last": "last epoch", "best": "best epoch", "selected": "chosen on validation data",
    "last10": "mean of the last ten epochs", "delta_m": "chosen by Δm on validation data",
}  # fmt: skip
ALWAYS = ("last", "best", "selected")  # the others are shown on request: see `mtl.report.select`
LAST = 10  # epochs of "last10"
_KEPT = ("test/", "val/", "weights/", "grad/", "micro/tasks/")  # the keys that figures and selections take
FILES = ("run.json", "config.yaml", "metrics.jsonl", "summary.json")
UNFINISHED = ("running", "interrupted")  # the status of a run that may go on
_PRUNED = ("wandb", "multirun")  # of an output tree: no runs in there


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        directory: where it wrote.
        info: run.json.
        config: config.yaml.
        summary: summary.json; empty for a run that did not finish.
        curves: {"test/fine_accuracy": (E,) one value per epoch, NaN where there is none, …}: the part of
            metrics.jsonl that figures and selections take. Of a run that has not finished, the epochs so far; empty for
            a run that failed.
        chosen: {selection: epoch, from 1}, for the selections that `mtl.report.select` computes.
    """

    directory: Path
    info: dict[str, Any]
    config: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, NDArray] = field(default_factory=dict, repr=False, compare=False)
    chosen: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> list[dict[str, float]]:
        """metrics.jsonl, one row per epoch: read anew at every use, since thousands of runs' rows fill the memory."""
        return _rows(self.directory)

    @property
    def seed(self) -> int:
        return self.info["seed"]

    @property
    def status(self) -> str:
        return self.info["status"]

    @property
    def error(self) -> str:
        """Why it did not finish, on one line."""
        return self.info.get("error") or ""

    def value(self, metric: str, at: str = "last", split: str = "test") -> float:
        """A metric.

        Args:
            metric: such as "fine_accuracy".
            at: "last" epoch; "best" epoch of this very metric on test data; "selected", at the one epoch that the
                validation data chose; "last10", the mean of the last ten; or "delta_m", at the epoch in `chosen`.
            split: "test", or "val": validation data. Test data choose nothing there: "best" is "selected".

        Returns:
            NaN where the run has no such metric; infinite values stay.
        """
        if split == "val":
            return self._validated(metric, at)
        if at not in ALWAYS:
            curve = self.curves.get(f"test/{metric}", np.array([]))
            if at == "last10":
                return float(curve[-LAST:].mean()) if len(curve) >= LAST else math.nan
            return float(curve[self.chosen[at] - 1]) if len(curve) and at in self.chosen else math.nan
        value = (self.summary.get(at) or {}).get(f"test/{metric}")
        return number(value["value"] if isinstance(value, dict) else value)

    def _validated(self, metric: str, at: str) -> float:
        """`value` on validation data."""
        curve = self.curves.get(f"val/{metric}", np.array([]))
        epoch = len(curve) if at == "last" else self.chosen.get(at) or (self.summary.get("selected") or {}).get("epoch")
        if at == "last10":
            return float(curve[-LAST:].mean()) if len(curve) >= LAST else math.nan
        return float(curve[epoch - 1]) if len(curve) and epoch else math.nan

    def fact(self, name: str) -> float:
        """One of `validate.FACTS`; NaN where the run does not know it."""
        return number(self.summary.get(name))

    @property
    def gpu(self) -> bool:
        """Whether it was trained on a GPU."""
        return bool(self.info.get("hardware", {}).get("gpu"))

    @property
    def noun(self) -> str:
        """What a sample of its data is called."""
        inputs = self.info.get("inputs")
        return "sample" if isinstance(inputs, dict) and inputs and "image" not in inputs else "image"

    @property
    def open(self) -> bool:
        """Whether it has not finished, and may still do so, and has epochs to show."""
        return self.status in UNFINISHED and bool(self.curves)

    @cached_property
    def metrics(self) -> dict[str, bool | None]:
        """{"fine_accuracy": higher is better, …}, in the order of the tasks, the main metric of each first.

        Only the summary knows which is better: None for a run that has not finished.
        """
        if not self.summary:
            tests = [k.removeprefix("test/") for k in self.curves if k.startswith("test/")]
            return dict.fromkeys(k for k in tests if not k.endswith("_loss"))
        higher = self.summary.get("higher_is_better")
        if higher is None:  # written before runs noted it: the best epoch tells
            higher = {}
            for key, best in self.summary["best"].items():
                curve = self.curves[key][np.isfinite(self.curves[key])]
                higher[key] = not len(curve) or bool(number(best["value"]) >= curve.max())
        return {k.removeprefix("test/"): v for k, v in higher.items()}

    @cached_property
    def tasks(self) -> dict[str, str]:
        """The main metric of each task that the run trained: {"fine": "fine_accuracy", …}."""
        if noted := self.summary.get("tasks"):
            return {task: metrics[0] for task, metrics in noted.items()}
        # Older runs do not say whose a metric is. Every task has a loss, and of the tasks age and age_group the metric
        # age_group_mae belongs to the longer name.
        losses = [k.removeprefix("test/") for k in self.curves if re.fullmatch("test/.*_loss", k)]
        names = [k.removesuffix("_loss") for k in losses if k not in self.metrics]
        found: dict[str, str] = {}
        for metric in self.metrics:
            if owners := [n for n in names if metric.startswith(f"{n}_")]:
                found.setdefault(max(owners, key=len), metric)
        return {n: found[n] for n in names if n in found}


@dataclass
class Collection:
    """The runs that `load` has found.

    Attributes:
        runs: the finished ones, sorted by directory.
        unfinished: (directory, status and error) of runs that are running, were interrupted, failed or diverged.
        damaged: (directory, reason) of directories that cannot be read, whose files contradict each other, or that
            hold a second copy of a run.
        stopped: the runs of `unfinished`, without a summary: they count against their strategy.
        doubtful: (directory, contradiction) of runs that count although two of their files disagree on the config.
    """

    runs: list[Run] = field(default_factory=list)
    unfinished: list[tuple[Path, str]] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    stopped: list[Run] = field(default_factory=list)
    doubtful: list[tuple[Path, str]] = field(default_factory=list)


def load(paths: Sequence[str | Path]) -> Collection:
    """All runs below `paths`. Each path is an output tree, or the directory of one run.

    Raises:
        ConfigError: a path does not exist.
    """
    for path in paths:
        if not os.path.isdir(path):
            raise ConfigError(f"{path}: {'is no folder' if os.path.lexists(path) else 'no such folder'}")
    found = Collection()
    directories: dict[Path, Path] = {}
    for path in paths:
        directories |= {d.resolve(): d for d in _directories(Path(path), found.damaged)}
    runs = []
    for directory in sorted(directories.values()):
        try:
            runs.append(_read(directory))
        except Unreadable as reason:
            found.damaged.append((directory, visible(str(reason))))
    for run in _without_copies(_without_edited(runs, found), found):
        if run.status == "finished":
            found.runs.append(run)
        else:
            found.stopped.append(run)
            found.unfinished.append((run.directory, _why(run)))
    return found


def fingerprint(paths: Sequence[str | Path]) -> dict[str, tuple[int, int]]:
    """{file: (time of change, size)} of all files of runs: it differs once a run has written something."""
    found = {}
    for path in paths:
        for directory in _directories(Path(path), []):
            for name in FILES:
                with suppress(OSError):
                    state = os.stat(directory / name)
                    found[str(directory / name)] = state.st_mtime_ns, state.st_size
    return found


def _without_edited(runs: Sequence[Run], found: Collection) -> list[Run]:
    """Note each config that does not give its digest. If another seed has the digest's config, that one counts."""
    genuine = {id(r): validate.genuine(r.info, r.config) for r in runs}
    originals = {r.info["group"]: r for r in reversed(runs) if genuine[id(r)]}
    kept = []
    for run in runs:
        original = originals.get(run.info["group"])
        if genuine[id(run)] is False and original:
            there, here = (flatten({**r.config, "seed": None, "output_root": None}) for r in (original, run))
            keys = [k for k in {**there, **here} if here.get(k, "missing") != there.get(k, "missing")]
            words = ", ".join(f"{k} {here.get(k, 'missing')} instead of {there.get(k, 'missing')}" for k in keys[:3])
            reason = f"contradiction: config.yaml differs from seed {original.seed} of the same group: {words}"
            found.damaged.append((run.directory, reason))
            continue
        said = validate.doubts(run.info, run.config, run.summary.get("epochs"))
        if genuine[id(run)] is False and originals and not said:
            said = [f"config.yaml does not give the digest {run.info['digest']} of run.json: one of them was changed"]
        found.doubtful += [(run.directory, f"contradiction: {text}") for text in said]
        kept.append(run)
    return kept


def _without_copies(runs: Sequence[Run], found: Collection) -> list[Run]:
    """Of several directories with the same run one counts, a finished one if there is one."""
    copies: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        copies.setdefault((run.info["group"], run.seed), []).append(run)
    kept = []
    for same in copies.values():
        first, *others = sorted(same, key=lambda r: r.status != "finished")
        reason = visible(f"a second copy of {first.directory}, which is the one that counts")
        found.damaged += [(r.directory, reason) for r in others]
        kept.append(first)
    return kept


def _why(run: Run) -> str:
    if run.status == "running":  # or killed without a chance to say so
        return f"running since {run.info.get('started') or 'an unknown time'}"
    return f"{run.status}: {run.error}" if run.error else run.status


def _directories(root: Path, unreadable: list[tuple[Path, str]]) -> Iterator[Path]:
    """Directories of runs; those that cannot be read are added to `unreadable`."""
    left = [root]
    while left:
        here = left.pop()
        try:
            with os.scandir(here) as entries:
                found = {e.name: e.is_dir(follow_symlinks=False) for e in entries}
        except OSError as error:
            unreadable.append((here, f"cannot be read: {error.strerror}"))
            continue
        numbered = re.fullmatch(r"seed\d+", here.name) and not all(found.values())
        if "run.json" in found or "metrics.jsonl" in found or numbered:
            yield here
        else:
            left += [here / n for n, folder in found.items() if folder and n not in _PRUNED and not n.startswith(".")]


def _read(directory: Path) -> Run:
    info = read_json(directory / "run.json")
    validate.check_info(directory, info)
    config = today(read_yaml(directory / "config.yaml"))
    validate.check_config(config, info)
    if info["status"] in UNFINISHED:
        return Run(directory, info, config, {}, _curves(_rows_so_far(directory)))
    if info["status"] != "finished":
        return Run(directory, info, config, {})
    summary, rows = read_json(directory / "summary.json"), _rows(directory)
    validate.check_summary(summary, rows)
    return Run(directory, info, config, summary, _curves(rows))


def _rows(directory: Path) -> list[dict[str, float]]:
    rows = enumerate(read_rows(directory / "metrics.jsonl"), start=1)
    return [validate.check_row(row, place) for place, row in rows]


def _rows_so_far(directory: Path) -> list[dict[str, float]]:
    """The rows of a run that may be writing one right now."""
    found: list[dict[str, float]] = []
    with suppress(Unreadable):
        for place, row in enumerate(read_rows(directory / "metrics.jsonl"), start=1):
            found.append(validate.check_row(row, place))
    return found


def _curves(rows: Sequence[Mapping[str, float]]) -> dict[str, NDArray]:
    keys = [k for k in dict.fromkeys(chain.from_iterable(rows)) if k.startswith(_KEPT)]
    return {visible(k): np.array([number(r.get(k)) for r in rows]) for k in keys}


def step_time(run: Run) -> float:
    """Milliseconds per training step; NaN where the run does not know it."""
    rate, batch = run.fact("images_per_second"), run.config["data"].get("batch_size")
    return 1000 * batch / rate if isinstance(batch, int) and 0 < rate < math.inf else math.nan
