"""Command-line arguments: parse them, build the command that repeats a cell, and run a saved config again."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from mtl.config.identity import CONF, TARGET, today
from mtl.config.program import divide, program
from mtl.errors import ConfigError, one_line

# Every saved config has these nodes. A hand-written primary config has all of them only with a defaults list.
SAVED = ("data", "arch", "loss", "optimizer", "schedule", "trainer")
AUTO = "auto"


def parse(words: list[str]) -> argparse.Namespace:
    """Hydra's flags and overrides, in any order.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    parser = get_args_parser()

    def refuse(message: str):
        word = message.rpartition(": ")[2].split()[0]
        if message.startswith("unrecognized arguments") and word.startswith("--"):
            key = word.removeprefix("--").partition("=")[0]
            raise ConfigError(f"{word}: no such flag; options are written without dashes: {key}=VALUE")
        raise ConfigError(one_line(message))

    parser.error = refuse
    arguments = parser.parse_intermixed_args(words)
    if arguments.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun: not supported; a run again: --config-dir outputs/…/seed0 --config-name config"
        )
    return arguments


def spelled(arguments: argparse.Namespace) -> list[str]:
    """The arguments as a list, flags first: Hydra loses overrides that follow a flag in the middle."""
    flags = []
    for action in get_args_parser()._actions:
        value = getattr(arguments, action.dest, None)
        if action.option_strings and value not in (None, False):
            flags.append(action.option_strings[0] if value is True else f"{action.option_strings[0]}={value}")
    return [*flags, *arguments.overrides]


def repeat(hydra: DictConfig, words: list[str]) -> str:
    """The command that runs one cell, wherever its config files came from.

    Args:
        hydra: Hydra's config of the cell.
        words: its overrides, as typed.
    """
    flags = []
    for source in hydra.runtime.config_sources:
        if source.provider == "main" and source["schema"] != "file":  # pkg://…
            flags.append(f"--config-path={source['schema']}://{source.path}")
        elif source.provider == "main" and Path(source.path).resolve() != CONF.resolve():
            flags.append(f"--config-path={os.path.abspath(source.path)}")  # relative paths would start at train.py
        if source.provider == "command-line":
            flags.append(f"--config-dir={_short(source.path)}")
    if (name := hydra.job.config_name) not in (None, "config"):
        flags.append(f"--config-name={name}")
    kept = [w for w in hydra.overrides.hydra if w.lstrip("+~").startswith(("hydra.searchpath", "hydra.job."))]
    return shlex.join([*program(), *flags, *kept, *words])


def refuse_hidden(hydra: DictConfig) -> None:
    """Check that no chosen option has a second file with other content, which Hydra would ignore.

    Hydra takes the first file that it finds: ours, then hydra.searchpath's, then --config-dir's.

    Raises:
        ConfigError: there is one; the line names both files.
    """
    sources = [s for s in hydra.runtime.config_sources if s["schema"] == "file" and s.provider != "hydra"]
    if not sources or Path(sources[0].path).resolve() != CONF.resolve():  # the user has chosen the order
        return
    for group, option in hydra.runtime.choices.items():
        if isinstance(option, str):
            refuse_second(group, option, [Path(s.path) for s in sources])


def refuse_second(group: str, option: str, folders: Sequence[Path]) -> None:
    """Raises:
    ConfigError: an option has two files with different content in `folders`, where only the first one counts.
    """
    files = [f for folder in folders if (f := folder / group / f"{option.removesuffix('.yaml')}.yaml").is_file()]
    for base in _bases(files[0]) if files else ():
        refuse_second(group, base, folders)
    for file in files[1:]:
        if file.read_bytes() != files[0].read_bytes():
            raise ConfigError(
                f"{group}={option}: {_short(str(files[0]))} hides {_short(str(file))}, since Hydra takes the first "
                "file of a name; rename yours"
            )


def _bases(file: Path) -> list[str]:
    """The options of its own group that a config file builds on."""
    try:
        listed = yaml.safe_load(file.read_text()).get("defaults", [])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):  # Hydra has read the file, or will report it
        return []
    return [x for x in listed if isinstance(x, str) and re.fullmatch(r"(?!_self_|.*/)\S+", x) and x != file.stem]


def _short(path: str) -> str:
    """Relative to the current folder, if the path lies inside of it."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd().resolve()) else path


# -- a saved config ---------------------------------------------------------------------------------------------------


def unfold(arguments: argparse.Namespace) -> argparse.Namespace:
    """Replace flags that name the saved config.yaml of a run by the overrides that describe the same run.

    Hydra alone would ignore the file: `--config-dir outputs/…/seed0 --config-name config` finds conf/config.yaml first.

    Raises:
        ConfigError: the file cannot be read, or Hydra would take another file of that name.
    """
    found = _saved(arguments)
    if found is None:
        return arguments
    file, config = found
    run = _json(file.with_name("run.json"))
    # The command that made the run names the folder of its own options.
    made = parse(divide(shlex.split(str(run.get("command", ""))))[1])
    if made.config_dir is None and any(p.is_dir() and (CONF / p.name).is_dir() for p in file.parent.iterdir()):
        made.config_dir = str(file.parent)
    searched = [w for w in made.overrides if w.startswith("hydra.")]
    chosen = [f"{group}={option}" for group, option in _choices(config, run).items()]
    before = _compose(made, [*searched, *chosen])
    typed = {_key(word) for word in made.overrides} if run else {"loss"}
    chosen += _differences(before, config, typed)
    taken = [_key(word) for word in arguments.overrides]
    chosen = [w for w in chosen if not any(_key(w) == t or _key(w).startswith(f"{t}.") for t in taken)]
    flags = {k: getattr(made, k) for k in ("config_path", "config_name", "config_dir")}
    return argparse.Namespace(**{**vars(arguments), **flags, "overrides": [*searched, *chosen, *arguments.overrides]})


def _saved(arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """The saved config that the flags name, and its content."""
    folder, name = arguments.config_path or arguments.config_dir, (arguments.config_name or "config")
    if folder is None:
        return None
    file = Path(folder, f"{name.removesuffix('.yaml')}.yaml")
    of_a_run = file.with_name("run.json").exists()
    if not of_a_run and (arguments.config_name is None or not file.is_file()):
        return None
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {one_line(error)}") from error
    whole = isinstance(config, dict) and all(isinstance(config.get(n), dict) and TARGET in config[n] for n in SAVED)
    if whole and "defaults" not in config:
        return file, today(config)
    if of_a_run:
        raise ConfigError(f"{file}: is no longer the whole config of a run")
    if arguments.config_path is None and (CONF / file.name).is_file():
        raise ConfigError(f"--config-name {name}: conf/ has a {file.name}, too, which hides {file}; rename yours")
    return None


def _choices(config: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    """The option of every group: from run.json, or else our option that is most similar to the node."""
    known = run.get("choices") if isinstance(run.get("choices"), dict) else {}
    groups = {group: node for group, node in config.items() if isinstance(node, dict) and (CONF / group).is_dir()}
    return {group: known.get(group) or _nearest(group, node) for group, node in groups.items()}


def _nearest(group: str, node: Mapping[str, Any]) -> str:
    files = sorted((CONF / group).glob("*.yaml"))
    options = {f.stem: OmegaConf.to_container(OmegaConf.load(f), resolve=True) for f in files}

    def unlike(name: str) -> tuple[bool, int]:
        return options[name].get(TARGET) != node[TARGET], sum(node.get(k) != v for k, v in options[name].items())

    return min(options, key=unlike)


def _compose(made: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """The resolved config for these overrides alone."""
    folder = [f"hydra.searchpath=[file://{os.path.abspath(made.config_dir)}]"] if made.config_dir else []
    with initialize_config_dir(version_base="1.3", config_dir=os.path.abspath(made.config_path or CONF)):
        config = compose(made.config_name or "config", [*folder, *words])
    return OmegaConf.to_container(config, resolve=True)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], typed: set[str], path: str = "") -> list[str]:
    """Overrides that turn one config into another. `auto` stays where the run has replaced it by results."""
    words = []
    for key, value in after.items():
        place, old = f"{path}{key}", before.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.keys() | old.keys():
            words += _differences(old, value, typed, f"{place}.")
        elif (key not in before or old != value) and (old != AUTO or isinstance(value, str) or place in typed):
            words.append(f"{'' if key in before else '++'}{place}={spell(value)}")
    # A node that is newer than the saved config keeps its default.
    return words + ([f"~{path}{key}" for key in before if key not in after] if path else [])


def spell(value: Any) -> str:
    """`value` in Hydra's grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{spell(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(spell, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"[A-Za-z_/.][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    quoted = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", quoted) + "'"


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _key(word: str) -> str:
    return re.split(r"[=@]", word.lstrip("+~"))[0]
