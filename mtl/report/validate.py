"""Checks the files of a run once, when they are read. After that the report can trust them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtl.config.identity import Identity, canonical, identify
from mtl.errors import UserError
from mtl.report.files import LARGEST, Unreadable
from mtl.tracking import flatten

FACTS = ("parameters", "macs", "seconds", "images_per_second", "peak_memory_gib")
SINGLE = "mtl.losses.Single"

Kind = tuple[str, Callable[[Any], bool]]  # in words, and the test


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not (abs(value) > LARGEST and isinstance(value, int))


def _or_null(kind: Kind) -> Kind:
    return f"{kind[0]} or null", lambda v: v is None or kind[1](v)


def _mapping_of(kind: Kind) -> Kind:
    test = lambda v: isinstance(v, dict) and all(isinstance(k, str) and kind[1](x) for k, x in v.items())  # noqa: E731
    return f"a mapping with {kind[0]} for each name", test


def _splits(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(shlex.split(value))
    except ValueError:  # an open quote
        return False


TEXT: Kind = ("a text", lambda v: isinstance(v, str))
NAME: Kind = ("a name", lambda v: isinstance(v, str) and bool(v.strip()))
NAMES: Kind = ("a list of names", lambda v: isinstance(v, list) and bool(v) and all(isinstance(x, str) for x in v))
COUNT: Kind = ("a whole number", lambda v: type(v) is int and 0 <= v < LARGEST)
POSITIVE: Kind = ("a whole number above 0", lambda v: COUNT[1](v) and v > 0)
NUMBER: Kind = ("a number or null", lambda v: v is None or _is_number(v))  # null stands for a number that is not finite
RATE: Kind = ("a number from 0", lambda v: _is_number(v) and 0 <= v < math.inf)
SHARE: Kind = ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v < 1)
FLAG: Kind = ("true or false", lambda v: isinstance(v, bool))
MAPPING: Kind = ("a mapping", lambda v: isinstance(v, dict))
COMMAND: Kind = ("a command line", _splits)
VALUES = _mapping_of(NUMBER)

# Keys that the files must hold, and keys that they may hold: runs of older versions lack some.
_RUN = {**dict.fromkeys(("data", "arch", "loss", "digest", "group", "status"), NAME), "seed": COUNT}
_RUN_MAY = {
    "name": NAME, "choices": _mapping_of(_or_null(TEXT)), "command": COMMAND, "commit": _or_null(TEXT),
    "dirty": _or_null(FLAG), "error": _or_null(TEXT), "started": _or_null(TEXT), "finished": _or_null(TEXT),
    "versions": _mapping_of(_or_null(TEXT)), "hardware": MAPPING, "hardware.gpu": _or_null(TEXT),
    "hardware.cpu": _or_null(TEXT), "hardware.threads": COUNT, "own": _mapping_of(_mapping_of(TEXT)),
    "stopped_early": POSITIVE,
}  # fmt: skip
_CONFIG = {
    **dict.fromkeys(("data", "arch", "loss", "optimizer", "trainer"), MAPPING),
    **dict.fromkeys(("data._target_", "arch._target_", "loss._target_", "optimizer._target_"), NAME),
    "trainer.epochs": POSITIVE, "seed": COUNT, "output_root": NAME,
}  # fmt: skip
_CONFIG_MAY = {
    **dict.fromkeys(("sharing", "schedule", "step", "microscope", "logger", "study"), MAPPING),
    **dict.fromkeys(("sharing._target_", "schedule._target_", "step._target_", "trainer._target_"), NAME),
}
# Rules of this project's and torch's classes. A user's own class may give these names another meaning.
_OURS_MAY = {
    "data.batch_size": _or_null(POSITIVE), "data.limit_train": _or_null(POSITIVE),  # null: a union's, of its parts
    "data.limit_test": _or_null(POSITIVE), "data.val_fraction": SHARE, "optimizer.lr": RATE,
}  # fmt: skip
_SUMMARY = {"epochs": POSITIVE, "last": VALUES, "best": _mapping_of(MAPPING)}
_SUMMARY_MAY = {
    "higher_is_better": _mapping_of(FLAG), "selected": _or_null(MAPPING), "tasks": _mapping_of(NAMES), "status": NAME,
    "units": _mapping_of(NAME),
    **dict.fromkeys(FACTS, NUMBER),
}  # fmt: skip


def check_info(directory: Path, info: Mapping[str, Any]) -> None:
    """run.json by itself, and against its place. Raises Unreadable."""
    _check("run.json", info, _RUN, _RUN_MAY)
    names = Identity(*(info[k] for k in ("data", "arch", "loss", "digest", "seed")))
    if info["group"] != names.group:
        raise Unreadable(
            f"contradiction in run.json: group is {info['group']}, data, arch, loss, digest: {names.group}"
        )
    if info.get("name", names.name) != names.name:
        raise Unreadable(f"contradiction in run.json: name is {info['name']}, its other fields say {names.name}")
    place = directory.resolve()
    if (number := re.fullmatch(r"seed(\d+)", place.name)) and int(number[1]) != info["seed"]:
        raise Unreadable(f"contradiction: the folder is {place.name}, run.json says seed {info['seed']}")
    parts = Path(info["group"]).parts
    found = place.parent.parts[-len(parts) :]
    # A folder that somebody has moved or renamed says nothing; one with a digest is as train.py made it.
    if re.fullmatch("[0-9a-f]{8}", place.parent.name) and found != parts:
        raise Unreadable(f"contradiction: the folder is {'/'.join(found)}, run.json says {info['group']}")


def check_config(config: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """config.yaml by itself, and its seed against run.json. Raises Unreadable."""
    _check("config.yaml", config, _CONFIG, _CONFIG_MAY)
    for node in ("data", "optimizer"):
        if config[node]["_target_"].startswith(("mtl.", "torch.")):
            _check("config.yaml", config, {}, {k: v for k, v in _OURS_MAY.items() if k.startswith(f"{node}.")})
    if config["loss"]["_target_"] == SINGLE:
        _check("config.yaml", config, {"loss.task": NAME}, {})
    if config["seed"] != info["seed"]:
        raise Unreadable(f"contradiction: config.yaml says seed {config['seed']}, run.json says seed {info['seed']}")


def check_row(row: Any, number: int) -> dict[str, float]:
    """The row of epoch `number` (from 1) of metrics.jsonl. Raises Unreadable."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int or row["epoch"] != number:
        raise Unreadable(f"metrics.jsonl: line {number} is not the row of epoch {number}")
    if wrong := [k for k, v in row.items() if type(v) is not float and not NUMBER[1](v)]:
        raise Unreadable(f"metrics.jsonl: {wrong[0]} of epoch {number} is {row[wrong[0]]!r:.40}, must be {NUMBER[0]}")
    return row


def check_summary(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """summary.json by itself, and against the rows of metrics.jsonl. Raises Unreadable."""
    _check("summary.json", summary, _SUMMARY, _SUMMARY_MAY)
    epochs, last, best = summary["epochs"], summary["last"], summary["best"]
    if len(rows) != epochs:
        raise Unreadable(f"contradiction: metrics.jsonl has {len(rows)} rows, summary.json says {epochs} epochs")
    if summary.get("status", "finished") != "finished":
        raise Unreadable(f"contradiction: run.json says finished, summary.json says {summary['status']}")
    if not last or not all(k.startswith("test/") for k in last):
        raise Unreadable("summary.json: last holds no test metrics")
    if set(best) != set(last) or set(summary.get("higher_is_better", last)) != set(last):
        raise Unreadable("summary.json names different metrics for the last and the best epoch")
    listed = [m for metrics in summary.get("tasks", {}).values() for m in metrics]
    if listed and {f"test/{m}" for m in listed} != set(last):
        raise Unreadable("summary.json: tasks and last name different metrics")
    quoted = [(key, value, epochs) for key, value in last.items()]
    if lacking := [key for key, entry in best.items() if "value" not in entry]:
        raise Unreadable(f"summary.json: best lacks the value of {lacking[0]}")
    quoted += [(key, entry["value"], entry.get("epoch")) for key, entry in best.items()]
    if chosen := summary.get("selected"):
        quoted += [(key, chosen.get(key), chosen.get("epoch")) for key in last]
    for key, value, epoch in quoted:
        _check_quoted(key, value, epoch, rows)
    for key, entry in best.items():
        _check_best(key, number(entry["value"]), summary.get("higher_is_better", {}).get(key), rows)


def _check_quoted(key: str, value: Any, epoch: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A value of the summary stands in the row of its epoch."""
    if not NUMBER[1](value):
        raise Unreadable(f"summary.json: {key} is {value!r:.40}, must be {NUMBER[0]}")
    if epoch is None and not math.isfinite(number(value)):
        return  # no epoch has a best value
    if type(epoch) is not int or not 1 <= epoch <= len(rows):
        raise Unreadable(f"summary.json: the epoch of {key} is {epoch!r:.40}, must be 1 to {len(rows)}")
    if key not in rows[epoch - 1]:
        raise Unreadable(f"metrics.jsonl: the row of epoch {epoch} lacks {key}")
    found, said = number(rows[epoch - 1][key]), number(value)
    if found != said and not (math.isnan(found) and math.isnan(said)):
        raise Unreadable(f"contradiction: {key} of epoch {epoch} is {found} in metrics.jsonl, {said} in summary.json")


def _check_best(key: str, best: float, higher: bool | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """No row is better than a finite best. Runs of older versions do not say whether higher is better."""
    values = np.array([number(row.get(key)) for row in rows])
    finite = values[np.isfinite(values)]
    if not len(finite) or not math.isfinite(best):
        return
    ends = {True: [finite.max()], False: [finite.min()], None: [finite.max(), finite.min()]}[higher]
    if best not in ends:
        epoch = int(np.flatnonzero(values == ends[0])[0]) + 1
        raise Unreadable(
            f"contradiction: {key} is {ends[0]} in epoch {epoch} of metrics.jsonl, summary.json says {best} is the best"
        )


def doubts(info: Mapping[str, Any], config: Mapping[str, Any], rows: int | None) -> list[str]:
    """Contradictions that leave open which file is right: config.yaml against the command and against the epochs.

    Args:
        info, config: checked.
        rows: of metrics.jsonl, for a run that finished.
    """
    found = []
    early = config["trainer"].get("patience") is not None and rows == info.get("stopped_early")
    if rows is not None and config["trainer"]["epochs"] != rows and not early:
        found.append(f"config.yaml says trainer.epochs {config['trainer']['epochs']}, the run trained {rows}")
    flat = flatten(config)
    for key, typed in _typed(info.get("command", "")).items():
        held = flat.get(key)
        if isinstance(held, (bool, int, float)) and isinstance(typed, (bool, int, float)) and _differ(held, typed):
            found.append(f"config.yaml says {key} {held}, the command in run.json {key}={typed}")
    return found


def genuine(info: Mapping[str, Any], config: Mapping[str, Any]) -> bool | None:
    """Whether the config gives the digest in run.json; None where config.yaml alone cannot tell.

    A user's own code is part of the digest, and single-task results that a loss was filled with (AMTL) are not.
    """
    nodes = [v for v in config.values() if isinstance(v, Mapping)]
    targets = [str(v["_target_"]) for v in nodes if "_target_" in v]
    filled = any(isinstance(v, Mapping) for v in config["loss"].values())
    if filled or config["loss"].get("file") or not all(t.startswith(("mtl.", "torch.")) for t in targets):
        return None
    try:
        return identify(config, info).digest == info["digest"]
    except (OSError, ValueError, UserError):  # a name that no file can have, or a file that is gone
        return None


def number(value: Any) -> float:
    """A checked number; NaN for null."""
    return math.nan if value is None else float(value)


def _typed(command: str) -> dict[str, Any]:
    """{"optimizer.lr": 0.1, …}: the plain values that a command sets."""
    found = {}
    for word in shlex.split(command):
        key, equals, value = word.lstrip("+").partition("=")
        if equals and re.fullmatch(r"[\w.]+", key) and re.fullmatch(r"[\w.+-]+", value):
            number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.IGNORECASE)
            found[key] = float(value) if number else {"true": True, "false": False}.get(value.lower(), value)
    return found


def _differ(a: Any, b: Any) -> bool:
    return canonical(a) != canonical(b)


def _check(file: str, content: Mapping[str, Any], needed: Mapping[str, Kind], may: Mapping[str, Kind]) -> None:
    for path, (words, test) in {**needed, **may}.items():
        node: Any = content
        *parents, key = path.split(".")
        for parent in parents:
            node = node.get(parent) if isinstance(node, Mapping) else None
        if not isinstance(node, Mapping) or key not in node:
            if path in needed:
                raise Unreadable(f"{file} lacks {path}")
        elif not test(node[key]):
            raise Unreadable(f"{file}: {path} is {node[key]!r:.40}, must be {words}")
