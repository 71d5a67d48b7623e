"""A finished run's checkpoint on its data, or on changed data: `python -m mtl.evaluate RUN [data.KEY=VALUE …]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from mtl.cli.explain import translate
from mtl.config.identity import safe
from mtl.data.batches import EvaluationBatches
from mtl.data.check import has_labels
from mtl.engine.directory import now, provenance
from mtl.engine.files import write_json, writing
from mtl.engine.loaded import EPOCHS, LoadedRun, load
from mtl.errors import ConfigError, UserError, suggest
from mtl.random import seeded
from mtl.tracking.console import legible, table

HEADER = ["run", "epoch", "task", "samples", "loss", "metrics"]


@dataclass(frozen=True)
class Evaluation:
    """Figures of one run on one split.

    Attributes:
        run: as loaded.
        split: of the data.
        samples: in the split.
        figures: {"test/fine_loss": …, "test/fine_accuracy": …}; NaN where no sample has a label.
        unlabelled: names of the tasks of which no sample has a label.
    """

    run: LoadedRun
    split: str
    samples: int
    figures: dict[str, float]
    unlabelled: Sequence[str] = ()

    @property
    def lines(self) -> list[list[str]]:
        """A line of the table for each task."""
        lines = []
        for task in self.run.tasks:
            scores = [(s, self.figures[f"{self.split}/{task.name}_{s.name}"]) for s in task.scores]
            shown = ", ".join(f"{score.name} {_number(value, score.unit)}" for score, value in scores)
            loss = _number(self.figures[f"{self.split}/{task.name}_loss"])
            lines.append([self.run.name, str(self.run.epoch), task.name, str(self.samples), loss, shown])
        return lines

    def write(self, name: str, changes: Mapping[str, Any]) -> Path:
        """Write RUN/evaluations/<name>.json; return its path.

        Raises:
            WriteError: it cannot be written.
        """
        file = self.run.directory / "evaluations" / f"{name}.json"
        content = {"run": self.run.name, "epoch": self.run.epoch, "split": self.split, "samples": self.samples,
                   "data": dict(changes), "figures": self.figures, "made": now(),
                   **provenance(self.run.learner.device)}  # fmt: skip
        with writing(file):
            file.parent.mkdir(exist_ok=True)
        write_json(file, content)
        return file


def evaluate(
    run: str | Path, changes: Mapping[str, Any], epoch: str = "best", split: str = "test", device: str = "auto"
) -> Evaluation:
    """Losses and metrics of a run's checkpoint.

    Args:
        run: folder of the run.
        changes: options of its data that are to be others than in training, by key.
        epoch: "best" or "last".
        split: "train", "val" or "test"; no split is augmented.
        device: as trainer.device.

    Raises:
        UserError: there is no such run or split, or the data is missing or does not fit the run.
    """
    loaded = load(run, epoch, device, changes)
    with seeded(loaded.learner.seed, "load"):
        splits = loaded.benchmark.splits()
    if split not in splits:
        raise ConfigError(f"--split {split}: the data has {', '.join(splits)}{suggest(split, splits)}")
    batches = EvaluationBatches(splits[split], loaded.benchmark, loaded.learner.device)
    lacking = [task.name for task in loaded.tasks if not has_labels(splits[split], task)]
    return Evaluation(loaded, split, len(splits[split]), loaded.learner.evaluate(batches, split), lacking)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mtl.evaluate", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("words", nargs="+", metavar="RUN or data.KEY=VALUE",
                        help="folders of runs, and options of the data that are changed")  # fmt: skip
    parser.add_argument("--epoch", choices=EPOCHS, default="best", help="which checkpoint; default: %(default)s")
    parser.add_argument("--split", default="test", help="train, val or test; default: %(default)s")
    parser.add_argument("--device", default="auto", help="as trainer.device; default: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    legible()
    try:
        runs, words = divide(options.words)
        changes = read_changes(words)
        name = safe("-".join([options.split, options.epoch, *(word.removeprefix("data.") for word in words)]))
        lines, files, lacking = [], [], []
        try:
            for run in runs:
                found = evaluate(run, changes, options.epoch, options.split, options.device)
                lines += found.lines
                lacking += [name for name in found.unlabelled if name not in lacking]
                files.append(found.write(name, changes))
        finally:  # of several runs, those that came before a wrong one
            if lines:
                print(table(HEADER, lines))
            for file in files:
                print(file)
            if lacking:
                print(f"WARNING: no {options.split} sample has a label of {', '.join(lacking)}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def divide(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Folders of runs, and options of the data.

    Raises:
        ConfigError: there is no folder, or an option is not one of the data.
    """
    changes = [w for w in words if "=" in w and not Path(w).exists()]
    runs = [w for w in words if w not in changes]
    if wrong := [w for w in changes if not w.startswith("data.")]:
        raise ConfigError(f"{wrong[0]}: only options of the data can be changed, as data.KEY=VALUE")
    if not runs:
        raise ConfigError("the folder of a run is missing: python -m mtl.evaluate RUN [data.KEY=VALUE …]")
    return runs, changes


def read_changes(words: Sequence[str]) -> dict[str, Any]:
    """{key of the data node: value} of words like data.limit_test=100.

    Raises:
        ConfigError: a word is not KEY=VALUE, or holds several values.
    """
    changes = {}
    for word in words:
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
        except Exception as error:  # Hydra's grammar
            raise translate(error, words) from error
        if override.is_sweep_override():
            raise ConfigError(f"{word}: one value is needed; call the command once for each")
        changes[override.key_or_group.removeprefix("data.")] = override.value()
    return changes


def _number(value: float, unit: str = "") -> str:
    return f"{value:.4g}{unit}" if value == value else "–"


if __name__ == "__main__":
    sys.exit(main())
