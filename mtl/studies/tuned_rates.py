"""Every method at its own learning rate: ten rates on validation data, then the best rate with three new seeds on test.

    python -m mtl.studies.tuned_rates equal pcgrad cagrad:c=0.2 experiment=cifar100 arch=resnet20
    python -m mtl.studies.tuned_rates equal pcgrad experiment=nyuv2_paradigms optimizer=adam,sgd --by delta_m \\
      --delta-m flat --baseline best

This is the comparison of Elich et al. (Examining Common Paradigms in Multi-Task Learning, 2023). Without it, a method
can win because its steps are longer. A word without "=" is a method of conf/loss; its settings follow a colon. Other
words are options of train.py for all runs, launchers included. Of several optimizers, each has rates of its own.

Stage 1 trains every method with every rate and one seed. It holds out `data.val_fraction` of the training data
(default: what the experiment says, else 0.1; nothing where the data set has validation data of its own). It chooses
the rate with the best validation metric: the first task's main metric at its best epoch. A diverged run loses. Stage
2 trains the chosen rate with fresh seeds. The validation data stay held out, because the rate was chosen for this
amount of training data. They also choose the epoch. Test data choose nothing.

With `--by delta_m` the rate, and the epoch of every run, have the best Δm on validation data instead. The baseline of
Δm is that of the report (`--baseline`): the single-task runs that are best on validation data, or constants. The grids
train single-task runs at every rate first; `study.baselines=none` takes those that were trained before.

Both stages are grids of train.py. Finished runs are read, not run again, so the same command goes on after any stop. A
method waits for the next call if one of its runs failed (divergence is no failure) or is being trained elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl.cli.explain import composed, translate
from mtl.cli.overrides import refuse_second
from mtl.cli.parts import fold, with_parts
from mtl.config.identity import CONF, identify
from mtl.config.program import child, program
from mtl.data.base import build_benchmark
from mtl.engine.build import check
from mtl.engine.directory import RunDirectory
from mtl.errors import ConfigError, UserError, suggest
from mtl.report import baselines
from mtl.studies.judges import ByDeltaM, ByMetric, Judge
from mtl.studies.judges import check as check_rule
from mtl.tracking.console import table

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# A method is a name, perhaps with settings after a colon. A word with "=" before any colon is an option of train.py.
METHOD = re.compile(r"\w+(:.*)?$")
SEVERAL = re.compile(r"optimizer=\w+(,\w+)+$")


@dataclass(frozen=True)
class Trial:
    """One run of the protocol: its learning rate, its seed, and its folder, which may not exist yet."""

    rate: float
    seed: int
    path: Path

    @property
    def status(self) -> str:
        return RunDirectory(self.path).run.get("status", "not run")

    @property
    def settled(self) -> bool:
        return self.status in ("finished", "diverged")


@dataclass(frozen=True)
class Method:
    """A strategy with its settings, and its runs in both stages.

    Args:
        spec: as typed, for example cagrad:c=0.2.
        options: options of train.py for all runs.
        optimizer: where several are compared.
    """

    spec: str
    options: tuple[str, ...]
    optimizer: str = ""

    @property
    def label(self) -> str:
        """What tells it from the other methods."""
        return f"{self.spec}, {self.optimizer}" if self.optimizer else self.spec

    @property
    def words(self) -> list[str]:
        name, _, settings = self.spec.partition(":")
        chosen = [f"optimizer={self.optimizer}"] if self.optimizer else []
        return [*chosen, *self.options, f"loss={name}", *(f"loss.{s}" for s in re.split(r",(?=\w+=)", settings) if s)]

    def runs(self, rates: Sequence[float], seeds: Sequence[int]) -> list[Trial]:
        """The runs of a grid; some may not exist yet.

        Raises:
            ConfigError: the config is wrong.
        """
        return [
            Trial(rate, seed, identify(plain, choices).directory(plain["output_root"]))
            for rate, seed, plain, choices in self._configs(itertools.product(rates, seeds))
        ]

    def validates(self) -> bool:
        """Whether there is validation data: held out by `data.val_fraction`, or of the data set's own.

        Raises:
            UserError: the config is wrong, or the data set cannot be loaded.
        """
        ((*_, plain, _),) = self._configs([(1.0, 0)])  # neither the rate nor the seed matters
        return bool(plain["data"].get("val_fraction")) or "val" in build_benchmark(plain["data"]).splits()

    def _configs(self, pairs: Iterable[tuple[float, int]]) -> Iterator[tuple[float, int, dict[str, Any], dict]]:
        """For each (rate, seed) these two, the checked config, and the options chosen.

        Raises:
            ConfigError: the config is wrong.
        """
        try:
            config = composed(lambda words: compose("config", words, return_hydra_config=True), fold(self.words))
            choices = dict(config.hydra.runtime.choices)
            OmegaConf.set_struct(config, False)
            hydra = config.pop("hydra")
            for rate, seed in pairs:
                config.optimizer.lr, config.seed = rate, seed
                plain = with_parts(OmegaConf.to_container(config, resolve=True), hydra)
                check(plain)
                yield rate, seed, plain, choices
        except (OmegaConfBaseException, HydraException) as error:
            raise translate(error) from error

    def command(self, runs: Sequence[Trial]) -> list[str]:
        """The arguments of train.py for `runs`, which form a grid."""
        rates, seeds = (
            ",".join(map(str, dict.fromkeys(v))) for v in zip(*((r.rate, r.seed) for r in runs), strict=True)
        )
        return ["-m", *self.words, f"optimizer.lr={rates}", f"seed={seeds}"]

    def choose(self, runs: Sequence[Trial], judge: Judge) -> Trial:
        """The finished run that is best on validation data. Among equal runs, the one with the smallest rate."""
        finished = [run for run in runs if run.status == "finished"]
        if not finished:
            raise UserError(f"{self.label}: diverged at every rate; try smaller ones with --rates")
        # A value that is not finite can never win.
        return max(finished, key=lambda r: (key if math.isfinite(key := judge.key(r.path)) else -math.inf, -r.rate))


def grid(words: Sequence[str]) -> int:
    """Run train.py as a grid; return its exit code."""
    process = subprocess.Popen([*child(), *words])
    # This process waits while the grid notes where it stopped. A terminal sends Ctrl-C to both, so it is ignored here.
    # SIGTERM comes to this process alone, so it is passed on.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def protocol(
    methods: Sequence[Method],
    rates: Sequence[float],
    chooser: int,
    seeds: Sequence[int],
    judged: Callable[[Sequence[Path]], Judge] = lambda _: ByMetric(),
) -> int:
    """Run both stages and print the table; return the exit code.

    Args:
        methods: the methods to compare.
        rates: learning rates of stage 1.
        chooser: seed of stage 1.
        seeds: seeds of stage 2.
        judged: makes what chooses the rate, from the folders of finished runs.

    Raises:
        ConfigError: a config is wrong, and nothing was run; or the runs of stage 1, which stay, have no baseline.
    """
    searches = {method: method.runs(rates, [chooser]) for method in methods}
    chosen: dict[Method, Trial] = {}
    finals: dict[Method, list[Trial]] = {}
    waiting: list[str] = []
    for method, runs in searches.items():
        if (code := _complete(f"stage 1, {method.label}", method, runs, waiting)) is not None:
            return code
    judge = judged(_finished(searches.values()))
    for method, runs in searches.items():
        if not all(run.settled for run in runs):
            continue
        try:
            chosen[method] = method.choose(runs, judge)
        except UserError as error:
            waiting.append(str(error))
            continue
        finals[method] = method.runs([chosen[method].rate], seeds)
        if (code := _complete(f"stage 2, {method.label}", method, finals[method], waiting)) is not None:
            return code
    if finals:
        judge = judged(_finished([*searches.values(), *finals.values()]))
        print(_report(searches, chosen, finals, judge))
    for line in waiting:
        print(f"error: {line}", file=sys.stderr)
    return 1 if waiting else 0


def _finished(grids: Iterable[Sequence[Trial]]) -> list[Path]:
    """The folders of the finished runs of some grids."""
    return [run.path for runs in grids for run in runs if run.status == "finished"]


def _complete(title: str, method: Method, runs: Sequence[Trial], waiting: list[str]) -> int | None:
    """Run the missing runs of a grid, and add a line to `waiting` if some are still missing afterwards.

    Returns:
        the exit code if the user stopped the grid; otherwise None.
    """
    if missing := [run for run in runs if not run.settled]:
        print(f"\n{title}: {len(missing)} of {len(runs)} runs to go", flush=True)
        code = grid(method.command(missing))
        # The exit codes of Ctrl-C and SIGTERM: the user wants to stop, so the other methods are not started.
        if code in (130, 143):
            print("stopped; the same command goes on from here")
            return code
    if missing := [run for run in runs if not run.settled]:
        states = ", ".join(f"rate {r.rate:g} seed {r.seed} {r.status}" for r in missing)
        waiting.append(f"{title}: {states}; the same command tries again")
    return None


def _report(
    searches: dict[Method, list[Trial]], chosen: dict[Method, Trial], finals: dict[Method, list[Trial]], judge: Judge
) -> str:
    first = next(iter(chosen.values())).path
    by, figures = judge.title(first), {}
    for method, runs in finals.items():
        figures[method] = [judge.figures(r.path) for r in runs if r.status == "finished"]
    keys = list(dict.fromkeys(k for runs in figures.values() for run in runs for k in run))
    header = ["strategy", "rate", "diverged", by, "seeds", *(h for key in keys for h in (key, "(last)"))]
    body, notes = [], []
    for method, found in figures.items():
        best, rates = chosen[method], [run.rate for run in searches[method]]
        diverged = sum(run.status == "diverged" for run in searches[method])
        row = [method.label, f"{best.rate:g}", str(diverged), f"{judge.value(best.path):.4g}", str(len(found))]
        for key in keys:
            row += [_spread([run[key][at] for run in found if key in run]) for at in (0, 1)]
        body.append(row)
        # A rate at the end of the range tells that the range was too small.
        if len(rates) > 1 and best.rate in (rates[0], rates[-1]):
            end = "smallest" if best.rate == rates[0] else "largest"
            notes.append(f"{method.label}: {best.rate:g} is the {end} rate tried; the best may lie beyond it (--rates)")
    commands = [shlex.join([*program(), *method.command(runs)]) for method, runs in finals.items()]
    title = f"\ntest set at the epoch with the best {by} and at the last epoch, mean ± std over seeds; rate by {by}\n"
    said = textwrap.fill(judge.note(first), 120)
    lines = [title + table(header, body), *filter(None, [said]), *notes, "", *commands]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return "–"
    mean = statistics.fmean(values)
    digits = 2 if abs(mean) >= 10 else 4
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _numbers(kind: type) -> Callable[[str], list]:
    def numbers(text: str) -> list:
        return sorted({kind(word) for word in text.split(",")})

    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mtl.studies.tuned_rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="METHOD|KEY=VALUE", help="methods, and options of train.py")
    parser.add_argument(
        "--rates", type=_numbers(float), default=RATES, metavar="R,R,…", help="learning rates; default: ten, 0.001 to 1"
    )
    parser.add_argument("--chooser", type=int, default=0, metavar="SEED", help="seed of stage 1; default: 0")
    parser.add_argument(
        "--seeds", type=_numbers(int), default=[1, 2, 3], metavar="S,S,…", help="of stage 2; default: 1,2,3"
    )
    parser.add_argument(
        "--by",
        default="metric",
        metavar="metric|delta_m",
        help="what chooses the rate on validation data; default: metric",
    )
    parser.add_argument(
        "--delta-m", default="main", metavar="main|flat|task", help="definition of Δm, as in the report"
    )
    parser.add_argument(
        "--baseline",
        default=baselines.BEST,
        metavar="best|best-overall|NAME|FILE",
        help="of Δm, as in the report; default: best",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own methods: DIR/loss/NAME.yaml")
    options = parser.parse_intermixed_args(arguments)
    try:
        specs, changes = [], []
        for word in options.words:
            (specs if METHOD.match(word) else changes).append(word)
        folders = [CONF]
        if options.config_dir is not None:
            if not options.config_dir.is_dir():
                raise ConfigError(f"--config-dir {options.config_dir}: is not a folder")
            folders.append(options.config_dir.absolute())
            changes.append(f"hydra.searchpath=[{folders[-1]}]")  # what --config-dir does, as an option of each run
        known = sorted(file.stem for folder in folders for file in (folder / "loss").glob("*.yaml"))
        for name in (spec.partition(":")[0] for spec in specs):
            if name not in known:
                raise ConfigError(f"{name}: no such method; one of {', '.join(known)}{suggest(name, known)}")
            refuse_second("loss", name, folders)
        if not specs:
            raise ConfigError("no method; e.g. python -m mtl.studies.tuned_rates equal pcgrad")
        for key, option in (("loss", "METHOD"), ("optimizer.lr", "--rates"), ("seed", "--seeds and --chooser")):
            if any(word.lstrip("+").partition("=")[0] == key for word in changes):
                raise ConfigError(f"{key}: the protocol sets it; use {option}")
        if options.chooser in options.seeds:
            raise ConfigError(
                f"--seeds: {options.chooser} chose the rate (--chooser); the seeds of stage 2 must be fresh ones"
            )
        check_rule(options.by, options.baseline, options.delta_m)
        by_delta_m = options.by == "delta_m"
        for name in ("baseline", "delta_m"):
            if not by_delta_m and getattr(options, name) != parser.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')}: Δm does not choose the rate here; add --by delta_m")
        own = options.baseline in (baselines.BEST, baselines.OVERALL)
        if by_delta_m and own and not any("study.baselines=" in w for w in changes):
            changes.append("study.baselines=auto")
        several = next((word for word in changes if SEVERAL.match(word)), "optimizer=")
        changes = [word for word in changes if word != several]
        if several != "optimizer=" and (second := next((w for w in changes if w.startswith("optimizer=")), "")):
            raise ConfigError(f"optimizer: given twice, {several} and {second}; leave one away")
        optimizers = dict.fromkeys(several.partition("=")[2].split(","))
        methods = [Method(spec, tuple(changes), o) for spec in dict.fromkeys(specs) for o in optimizers]
        judged = (
            (lambda runs: ByDeltaM(runs, options.baseline, options.delta_m)) if by_delta_m else (lambda _: ByMetric())
        )
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            named = any(word.lstrip("+").startswith("data.val_fraction=") for word in changes)
            if not methods[0].validates():
                if named:
                    raise ConfigError("data.val_fraction=0: the rate is chosen on validation data; try 0.1")
                methods = [replace(m, options=(*m.options, "data.val_fraction=0.1")) for m in methods]
            return protocol(methods, options.rates, options.chooser, options.seeds, judged)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
