"""Which run is this? A hash of everything that decides its numbers, and the directory and names that follow from it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl.config import source
from mtl.errors import ConfigError

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"  # in a wheel; in a checkout
TARGET = "_target_"

# What does not decide a run's numbers: paths, device, logging, what is looked at, where the images lie. The seed is
# named apart.
EXCLUDED = (
    "seed",
    "output_root",
    "logger",
    "microscope",
    "data.root",
    "data.download",
    "data.residency",
    "data.workers",
    "trainer.device",
    "study",
)

# Options that were added after the first release, each with the default that does what was done before. An option at
# this default is no part of the hash, so older runs keep their identity. "loss.mean@mtl.losses.GradNorm" is the option
# of that class alone.
ADDED: dict[str, Any] = {
    "loss.mean@mtl.losses.GradNorm": "arithmetic",
    "trainer.stages": [],
}

# Classes of ours that were moved or renamed: {path today: path under which they are hashed}.
MOVED: dict[str, str] = {
    "mtl.cli.cell.Study": "mtl.study.cell.Study",
    "mtl.cli.command.Grid": "mtl.config.cli.Grid",
    "mtl.engine.device.Execution": "mtl.engine.trainer.Trainer",
    "mtl.inspect.microscope.Microscope": "mtl.engine.microscope.Microscope",
}

LABEL = 39  # characters, so that a group (three labels and the digest) stays below W&B's limit of 128


@dataclass(frozen=True)
class Identity:
    """Names of one run.

    Attributes:
        data, arch, loss: the chosen config options.
        digest: 8 hex digits of the config's hash, the same for all seeds.
        seed: of the run.
    """

    data: str
    arch: str
    loss: str
    digest: str
    seed: int

    @property
    def group(self) -> str:
        """Everything but the seed: runs of one group are averaged."""
        return f"{self.data}/{self.arch}/{self.loss}/{self.digest}"

    @property
    def name(self) -> str:
        """Readable and unique, e.g. resnet56-dwa-s0-1a2b3c4d; also the W&B id."""
        return f"{self.arch}-{self.loss}-s{self.seed}-{self.digest}"

    def directory(self, output_root: str | Path) -> Path:
        """Where the run writes."""
        return Path(output_root) / self.group / f"seed{self.seed}"


def identify(config: Mapping[str, Any], choices: Mapping[str, str]) -> Identity:
    """The identity of a resolved, checked config.

    Args:
        config: plain Python objects.
        choices: the option chosen in each config group (`data`, `arch`, `loss`).

    Raises:
        ConfigError: the weights that the network starts from are not there.
    """
    content = decisive(config)
    data, arch, loss = (_label(group, content, choices) for group in ("data", "arch", "loss"))
    if (file := _loss_file(content)) is not None:
        # A user's own loss is what the file says, not where it lies.
        content["loss"]["file"] = hashlib.sha256(file.read_bytes()).hexdigest()
        loss = f"{loss}-{file.stem}"
    if isinstance(name := content["arch"].get("name"), str) and not own_arch(content):
        arch = f"{arch}-{name}"  # torchvision-resnet18
    if (file := weights_file(content)) is not None:
        content["arch"]["weights"] = hashlib.sha256(file.read_bytes()).hexdigest()
    if own := own_code(config):
        content["source"] = own
    text = json.dumps(canonical(_as_before(content)), sort_keys=True)
    return Identity(
        data=safe(data),
        arch=safe(arch),
        loss=safe(loss),
        digest=hashlib.sha256(text.encode()).hexdigest()[:8],
        seed=config["seed"],
    )


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` without the options that do not decide a run's numbers.

    The folder of a built-in data set does not decide them: its images are the same everywhere. Of a user's own data
    class nothing is known, so its folder and its `download` stay, the folder as an absolute path.
    """
    content = copy.deepcopy(dict(config))
    own_data = not _built_in(content.get("data"))
    for path in EXCLUDED:
        if own_data and path in ("data.root", "data.download"):
            continue
        *parents, key = path.split(".")
        node = content
        for parent in parents:
            node = node.get(parent, {})
        node.pop(key, None)
    if own_data and isinstance(root := content["data"].get("root"), str):
        content["data"]["root"] = os.path.realpath(root)
    return content


def own_code(config: Mapping[str, Any]) -> dict[str, str]:
    """{module: sha256} of the user's own modules that decide a run's numbers; without `loss.file` itself."""
    content = decisive(config)
    file = _loss_file(content)
    return source.digests([name for _, name in _targets(content)], [] if file is None else [file])


def own_parts(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What decides a run's numbers and is not in its config.yaml, for each node that names a user's own class.

    Returns:
        such as {"data": {"my_data": "1a2b3c4d", "root": "/home/me/data"}, "arch": {"my_net": "5e6f7a8b"}}: the start of
        the sha256 of each own module, and the folder of own data as an absolute path.
    """
    content, found = decisive(config), {}
    for name, node in content.items():
        own = source.digests([target for _, target in _targets(node)], [])
        found[name] = {module: digest[:8] for module, digest in own.items()}
    if not _built_in(content.get("data")) and isinstance(root := content["data"].get("root"), str):
        found["data"]["root"] = root
    return {name: own for name, own in found.items() if own}


def safe(label: str) -> str:
    """`label` as a directory and as a part of a W&B name: letters, digits and ._+-, at most 39 of them.

    A label that has to be changed gets the start of its hash, so that no two labels become the same.
    """
    if re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._+-]{{0,{LABEL - 1}}}", label):
        return label
    mended = re.sub(r"[^A-Za-z0-9_+-]+", "_", label).lstrip("+-")[: LABEL - 9]
    return f"{mended or '_'}-{hashlib.sha256(label.encode(errors='surrogatepass')).hexdigest()[:8]}"


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a saved config in which our classes have the names of today, whatever they were when it was saved."""
    content, names = copy.deepcopy(dict(config)), {old: new for new, old in MOVED.items()}
    for node, name in _targets(content):
        node[TARGET] = names.get(name, name)
    return content


def _as_before(content: dict[str, Any]) -> dict[str, Any]:
    """`content` in the words of the first release: classes by their first path, without later options at default."""
    for node, name in _targets(content):
        node[TARGET] = MOVED.get(name, name)
    for place, default in ADDED.items():
        path, _, owner = place.partition("@")
        *parents, key = path.split(".")
        node: Any = content
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and key in node and node[key] == default and owner in ("", node.get(TARGET)):
            del node[key]
    return content


def _targets(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every node of a config that names a class, and the name."""
    if isinstance(value, dict):
        if isinstance(value.get(TARGET), str):
            yield value, value[TARGET]
        for child in value.values():
            yield from _targets(child)
    elif isinstance(value, list):
        for child in value:
            yield from _targets(child)


def _built_in(node: Any) -> bool:
    return not isinstance(node, Mapping) or str(node.get(TARGET)).partition(".")[0] == "mtl"


def _loss_file(content: Mapping[str, Any]) -> Path | None:
    file = content["loss"].get("file")
    return Path(file) if isinstance(file, str) and Path(file).is_file() else None


def own_arch(config: Mapping[str, Any]) -> bool:
    """Whether the network is a user's own class."""
    return not _built_in(config.get("arch"))


def weights_file(config: Mapping[str, Any]) -> Path | None:
    """The file with the weights that a network of ours starts from; None where they have a name, or there are none.

    Raises:
        ConfigError: there is no such file, or the folder is that of no run.
    """
    weights = config["arch"].get("weights")
    if not isinstance(weights, str) or own_arch(config):
        return None
    path = Path(weights)
    files = [path / "best.pt", path / "last.pt"] if path.is_dir() else [path]
    if found := [file for file in files if file.is_file()]:
        return found[0]
    if re.fullmatch(r"\w+", weights) and not path.is_dir():  # a name of torchvision's, such as DEFAULT
        return None
    wrong = "neither best.pt nor last.pt is in it" if path.is_dir() else "no such file or folder"
    raise ConfigError(f"arch.weights={weights}: {wrong}")


def _label(group: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """The chosen option's name; the class's own where another class was put into that option's place, or none was."""
    target, option = config[group][TARGET], choices.get(group)
    own = target.rpartition(".")[2].lower()
    if not option:
        return own
    file = CONF / group / f"{option}.yaml"
    if file.is_file() and f"_target_: {target}" not in file.read_text().splitlines():
        return own
    return option


def canonical(value: Any) -> Any:
    """2.0 as 2: a default spelled out in another way is the same run."""
    if isinstance(value, Mapping):
        return {k: canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
