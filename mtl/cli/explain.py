"""Errors of Hydra, OmegaConf and the launchers in one line each, with the cure: what a slip on the command line gets.

A key that a config file leaves out, but its class has, is no error: see `with_known_keys`.
"""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl.cli import launchers
from mtl.config.identity import CONF
from mtl.config.program import program
from mtl.errors import ConfigError, UserError, one_line, suggest

T = TypeVar("T")
TARGET = "_target_"
GROUPS = (
    "arch", "sharing", "data", "loss", "optimizer", "schedule", "step", "microscope", "trainer", "logger", "study",
    "experiment",
)  # fmt: skip
MOST = 5  # names that a refusal lists; --help lists all

# What other tools call our keys, and what needs no key here: {word: the rest of the line}.
RESUMES = "needs no option: the same command again goes on where it was stopped"
SYNONYMS = {
    **dict.fromkeys(("model", "net", "network", "backbone", "architecture"), "did you mean arch={value}?"),
    **dict.fromkeys(("dataset", "datamodule", "benchmark"), "did you mean data={value}?"),
    **dict.fromkeys(("method", "strategy", "weighting", "criterion"), "did you mean loss={value}?"),
    **dict.fromkeys(("optim", "opt"), "did you mean optimizer={value}?"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule"), "did you mean schedule={value}?"),
    **dict.fromkeys(("tensorboard", "tracker"), "did you mean logger=tensorboard, wandb or none?"),
    "wandb": "did you mean logger=wandb, or logger=none for no W&B?",
    **dict.fromkeys(("resume", "resume_from", "restart"), f"resuming {RESUMES}"),
    **dict.fromkeys(("checkpoint", "ckpt", "ckpt_path"), f"resuming {RESUMES}; checkpoints are in the run's folder"),
    **dict.fromkeys(("epoch", "n_epochs", "num_epochs", "max_epochs"), "did you mean trainer.epochs={value}?"),
    **dict.fromkeys(("learning_rate", "base_lr"), "did you mean optimizer.lr={value}?"),
    **dict.fromkeys(("wd", "decay"), "did you mean optimizer.weight_decay={value}?"),
    **dict.fromkeys(("bs", "batch", "batchsize"), "did you mean data.batch_size={value}?"),
    **dict.fromkeys(("gpu", "cuda", "accelerator"), "did you mean trainer.device=cuda?"),
    **dict.fromkeys(("output", "output_dir", "out", "save_dir"), "did you mean output_root={value}?"),
    **dict.fromkeys(("amp", "fp16", "bf16", "half"), "did you mean trainer.precision=bf16?"),
    **dict.fromkeys(("random_seed", "seeds"), "did you mean seed={value}?"),
}


def translate(error: Exception, words: Sequence[str] | None = None) -> UserError:
    """Hydra's, OmegaConf's and the launchers' errors of many lines, in one line each.

    Args:
        words: of the command line; None for this process's own.
    """
    words = sys.argv[1:] if words is None else words
    if known := launchers.explain(error):
        return known
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        return _no_such_option(str(error.missing_cfg_file), error.options)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if text.startswith("Ambiguous value for argument"):
        override = text.partition("'")[2].partition("'\n")[0]
        command = shlex.join([*program(), "-m", *words])
        return ConfigError(f"{override}: several values make a grid, which needs -m: {command}")
    if text.startswith("Config group override must be"):
        return _no_option_name(text, words)
    if isinstance(error, HydraException) and "does not support sweep type" in text:
        word = next((w for w in words if "interval(" in w), "interval()")
        return ConfigError(
            f"{word}: a grid needs values to choose from, such as {_key(word)}=0.01,0.1; an interval needs a search: "
            "hydra/sweeper=tpe"
        )
    if isinstance(getattr(cause, "parent_node", None), DictConfig) and " not in " in str(cause):
        return _unknown_key(cause)
    return ConfigError(one_line(cause))


def _no_such_option(file: str, options: Sequence[str]) -> ConfigError:
    """The nearest options first. A long list is cut: the user can see it in the help."""
    group, _, option = file.rpartition("/")
    near = _suggest(option, options)
    if not near and (close := [o for o in options if option.lower() in o or o in option.lower()][:MOST]):
        near = f"; did you mean {' or '.join(close)}?"
    if len(options) <= 2 * MOST:
        listed = f"{group} is one of {', '.join(options)}"
    else:
        listed = f"{shlex.join(program())} --help lists all {len(options)}"
        if not near:
            listed = f"{group} is one of {', '.join(options[:MOST])}, …; {listed}"
    return ConfigError(f"{group}={option}: no such option{near}{' ' if near else '; '}{listed}")


def _suggest(word: str, allowed: Sequence[str]) -> str:
    """Like `mtl.errors.suggest`, and PCGrad or pc-grad is pcgrad."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in allowed}
    same = plain.get(re.sub(r"[^a-z0-9]", "", word.lower()))
    return f"; did you mean {same}?" if same else suggest(word.lower(), allowed)


def _unreadable(override: str) -> ConfigError:
    advice = "write it without spaces around = and quote values that hold spaces, commas or ~"
    return ConfigError(f"{override!r} is not KEY=VALUE; {advice}")


def refuse_unquoted(words: Sequence[str]) -> None:
    """Check that the shell has not taken a mapping or a list apart, since what is left may look like a value.

    Bash makes two words of `loss.weights={a:1,b:2}`, and four of `loss.weights={a: 1, b: 2}`.

    Raises:
        ConfigError: it has; the line says the word with quotes.
    """
    for i, word in enumerate(words):
        key, equals, value = word.partition("=")
        same = [w.partition("=")[2] for w in words if w.partition("=")[0] == key]
        if equals and len(same) > 1 and all(re.fullmatch(r"[\w-]+:[^,:]+", v) for v in same):
            value = "{" + ", ".join(v.replace(":", ": ") for v in same) + "}"
        elif equals and value[:1] in ("{", "[") and _open(value):
            for following in words[i + 1 :]:
                value += f" {following}"
                if not _open(value):
                    break
            else:
                continue
        else:
            continue
        raise ConfigError(f"{key}: the shell has taken the value apart; quote the word: '{key}={value}'")


def _open(value: str) -> bool:
    """Whether a bracket is not closed."""
    return any(value.count(a) > value.count(b) for a, b in ("{}", "[]"))


def _no_option_name(text: str, words: Sequence[str]) -> ConfigError:
    names = {_key(word) for word in words}
    group = next((g for g in GROUPS if g in names), "a config group")
    return ConfigError(f"{group}: must be the name of one of its options, see --help ({one_line(text)})")


def _unknown_key(cause: OmegaConfBaseException) -> ConfigError:
    """The user means a key of that name one level deeper (lr: optimizer.lr), or the most similar key of this level."""
    node, key = cause.parent_node, str(cause.full_key)
    listed = sorted(str(k) for k in node if k not in (TARGET, "hydra"))
    word, nodes = key.rpartition(".")[2], OmegaConf.to_container(node, resolve=False)
    of_class, open_ended = _arguments(node, key)
    allowed = sorted({*listed, *of_class})
    deeper = [f"{name}.{word}" for name in listed if isinstance(nodes[name], dict) and word in nodes[name]]
    value = _value(key)
    if in_parts := _in_parts(nodes.get("parts"), word):
        nearest = f"; did you mean {in_parts}?"
    elif deeper:
        nearest = f"; did you mean {' or '.join(deeper)}?"
    elif "." not in key and word.lower() in SYNONYMS:
        nearest = f"; {SYNONYMS[word.lower()].format(value=value)}"
    else:
        nearest = _suggest(word, allowed)
    if open_ended and not deeper:
        nearest += f"; the class takes further arguments by **: write +{key}={value}"
    return ConfigError(f"{key}: unknown key; allowed: {', '.join(allowed) or 'none'}{nearest}")


def _in_parts(parts: Any, word: str) -> str:
    """The keys of that name of a union's parts, and the environment variable that sets all; empty if there is none.

    Args:
        parts: as in the config, so far without the options that the parts name.
    """
    keys, variables = [], set()
    for part, own in parts.items() if isinstance(parts, dict) else ():
        file = CONF / "data" / f"{part}.yaml"
        option = yaml.safe_load(file.read_text()) if file.is_file() else {}
        if word in {*option, *(own or ())}:
            keys.append(f"data.parts.{part}.{word}")
            variables.update(re.findall(r"\$\{oc\.env:(\w+)", str(option.get(word))))
    named = [f"the environment variable {one} for all parts" for one in sorted(variables)]
    return " and ".join(keys) + "".join(f", or {one}" for one in named)


# -- keys that a config file leaves out -------------------------------------------------------------------------------


def with_known_keys(words: Sequence[str], error: Exception) -> list[str] | None:
    """The overrides, with ++ before the key that Hydra has just refused, if the class of its node has such an argument.

    A user's own `data/mine.yaml` needs only the keys that differ from the class's defaults. Hydra alone would then
    refuse `data.limit_train=100`, because the file does not list it. A grid `arch=segnet,unet arch.width=8` is first
    composed without its lists, so with the default arch, which may have no width. Each cell checks the key itself.

    Args:
        words: the overrides.
        error: Hydra's.

    Returns:
        None if this is another error, or if neither the class nor a listed option has such a key: a typo.
    """
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    node = getattr(cause, "parent_node", None)
    if not isinstance(node, DictConfig) or " not in " not in str(cause) or "." not in str(cause.full_key):
        return None
    place = str(cause.full_key).rpartition(".")[0]
    known = {f"{place}.{name}" for name in _arguments(node, cause.full_key, words)[0] if name not in node}
    known |= {f"{place}.{name}" for name in _listed(place, words) if name not in node}
    found = [f"++{word}" if "=" in word and word.partition("=")[0] in known else word for word in words]
    return found if found != list(words) else None


def _listed(place: str, words: Sequence[str]) -> set[str]:
    """The keys of our options of a group that a grid lists: of `loss=cagrad,famo` those of both files."""
    names = {name.strip() for w in words if _key(w) == place for name in w.partition("=")[2].split(",") if "," in w}
    files = [file for name in names if (file := CONF / place / f"{name}.yaml").is_file()]
    return {key for file in files if isinstance(node := yaml.safe_load(file.read_text()), dict) for key in node}


def composed(compose: Callable[[list[str]], T], words: Sequence[str]) -> T:
    """`compose(words)`, with the keys that a config file leaves out and its class has.

    Raises:
        ConfigError: Hydra refuses the words.
    """
    try:
        return compose(list(words))
    except (OmegaConfBaseException, HydraException) as error:
        if (mended := with_known_keys(words, error)) is None:
            raise translate(error) from error
    return composed(compose, mended)


def _arguments(node: DictConfig, key: str, words: Sequence[str] = ()) -> tuple[list[str], bool]:
    """The names of the arguments of a node's class, and whether it has ** for more. Nothing for one of our own files.

    Our files list all arguments of our classes, so nothing is imported: a typo is answered at once.
    """
    place = key.rpartition(".")[0]
    typed = [w.partition("=")[2] for w in (*words, *sys.argv[1:]) if _key(w) == f"{place}.{TARGET}"]
    target = typed[-1] if typed else OmegaConf.to_container(node, resolve=False).get(TARGET)
    if not isinstance(target, str) or _complete(place, target, node):
        return [], False
    from mtl.config import schema  # late: pydantic takes a while, and torch is needed for such a class anyway
    from mtl.engine.build import NODES

    try:
        parameters = inspect.signature(schema.locate(target, place)).parameters.values()
    except (UserError, TypeError, ValueError):  # it is reported when the run is built
        return [], False
    kinds, supplied = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY), NODES.get(place, ())
    named = [p.name for p in parameters if p.kind in kinds and p.name not in supplied]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _complete(place: str, target: str, node: DictConfig) -> bool:
    """Whether one of our files describes this class, and the node has all of that file's keys."""
    if target.partition(".")[0] != "mtl":
        return False
    for file in (CONF / place).glob("*.yaml"):
        listed = yaml.safe_load(file.read_text())
        if isinstance(listed, dict) and listed.get(TARGET) == target and listed.keys() <= node.keys():
            return True
    return False


def _key(word: str) -> str:
    return re.split(r"[=@]", word.lstrip("+~"))[0]


def _value(key: str) -> str:
    """The value that was typed for `key`."""
    return next((w.partition("=")[2] for w in sys.argv[1:] if _key(w) == key), "VALUE")
