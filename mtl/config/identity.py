"""The identity of a run: a hash of everything that decides its numbers, and the folder and names made from it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mtl.config import source
from mtl.config.variants import variant
from mtl.errors import ConfigError

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"  # in a wheel; in a checkout
TARGET = "_target_"
HARD = "mtl.archs.model.HardSharing"  # the sharing scheme of the first release

# Options that do not change a run's numbers: paths, device, logging, observation, the place of the images. They are
# left out of the hash. The seed is left out too, because it has its own part in the folder and the name.
EXCLUDED = (
    "seed",
    "output_root",
    "logger",
    "microscope",
    "data.root",
    "data.download",
    "data.cache",
    "data.residency",
    "data.workers",
    "trainer.device",
    "trainer.pictures",
    "study",
)

# Options that were added after the first release, with the default that keeps the old behaviour. An option at this
# default is left out of the hash, so older runs keep their identity. "loss.mean@mtl.losses.GradNorm" is the option of
# that class only.
ADDED: dict[str, Any] = {
    "loss.mean@mtl.losses.GradNorm": "arithmetic",
    "trainer.stages": [],
    "data.eval_batch_size": 500,
    "trainer.backbone_lr_factor": 1.0,
    "data.reduction": "pooled",
    "sharing": {"_target_": HARD},
    "data.label_fraction": 1.0,
    "step.chunks": 1,
    "step.parallel": 1,
    "trainer.patience": None,
}

# Classes of mtl that were moved or renamed: {today's path: the path that goes into the hash}.
MOVED: dict[str, str] = {
    "mtl.cli.cell.Study": "mtl.study.cell.Study",
    "mtl.cli.command.Grid": "mtl.config.cli.Grid",
    "mtl.engine.device.Execution": "mtl.engine.trainer.Trainer",
    "mtl.inspect.microscope.Microscope": "mtl.engine.microscope.Microscope",
    "mtl.optim.schedules.StepDecay": "mtl.optim.schedules.Step",
}

# Options of our own data sets that name a file of the user's: its content decides the numbers, not its path.
FILES = ("file", "test_file")

LABEL = 39  # characters; a W&B group has three labels and the digest, and W&B allows 128


@dataclass(frozen=True)
class Identity:
    """The names of one run.

    Attributes:
        data, arch, loss: the chosen config options. Another sharing scheme than hard is part of `arch`: resnet20-mmoe.
        digest: 8 hex digits of the config's hash; the same for all seeds.
        seed: the run's seed.
        variant: what differs from the chosen loss option, such as "ink" of loss=single or "c0.2" of loss=cagrad. It
            is for people, and no part of a path or an id.
    """

    data: str
    arch: str
    loss: str
    digest: str
    seed: int
    variant: str = ""

    @property
    def group(self) -> str:
        """Everything except the seed. The report averages the runs of a group."""
        return f"{self.data}/{self.arch}/{self.loss}/{self.digest}"

    @property
    def name(self) -> str:
        """A readable and unique name, such as resnet56-dwa-s0-1a2b3c4d. It is also the W&B id."""
        return f"{self.arch}-{self.loss}-s{self.seed}-{self.digest}"

    @property
    def title(self) -> str:
        """The name for people, such as resnet20-single-ink-s0-1a2b3c4d."""
        return "-".join(filter(None, [self.arch, self.loss, self.variant, f"s{self.seed}", self.digest]))

    def directory(self, output_root: str | Path) -> Path:
        """The folder into which the run writes."""
        return Path(output_root) / self.group / f"seed{self.seed}"


def identify(config: Mapping[str, Any], choices: Mapping[str, str]) -> Identity:
    """The identity of a resolved, checked config.

    Args:
        config: plain Python objects.
        choices: the option chosen in each config group (`data`, `arch`, `sharing`, `loss`).

    Raises:
        ConfigError: the weights that the network starts from are not there.
    """
    content = decisive(config)
    data, arch, loss = (_label(group, content, choices) for group in ("data", "arch", "loss"))
    if (file := _loss_file(content)) is not None:
        # The content of a user's own loss file decides the numbers, not its path.
        content["loss"]["file"] = hashlib.sha256(file.read_bytes()).hexdigest()
        loss = f"{loss}-{file.stem}"
    if isinstance(name := content["arch"].get("name"), str) and not own_arch(content):
        arch = f"{arch}-{name}"  # torchvision-resnet18
    if content.get("sharing", {}).get(TARGET, HARD) != HARD:
        arch = f"{arch}-{_label('sharing', content, choices)}"  # resnet20-mmoe
    if (file := weights_file(content)) is not None:
        content["arch"]["weights"] = hashlib.sha256(file.read_bytes()).hexdigest()
    contents, nodes = _data_files(content), _data_nodes(content)
    if contents.get("") and (CONF / "data" / f"{choices.get('data')}.yaml").is_file():
        data = f"{data}-{Path(content['data'][next(iter(contents['']))]).stem}"  # table-birds
    for place, files in contents.items():
        nodes[place].update(files)
    parts = content["data"].get("parts")
    if isinstance(parts, Mapping) and all(isinstance(one, Mapping) and TARGET in one for one in parts.values()):
        data = f"{data}-{'-'.join(parts)}"  # union-synthetic-rooms
    if own := own_code(config):
        content["source"] = own
    # Sorted keys, so that the order of options on the command line does not matter.
    text = json.dumps(canonical(as_before(content)), sort_keys=True)
    return Identity(
        data=safe(data),
        arch=safe(arch),
        loss=safe(loss),
        digest=hashlib.sha256(text.encode()).hexdigest()[:8],
        seed=config["seed"],
        variant="-".join(filter(None, [_variant("loss", config, choices), _variant("sharing", config, choices)])),
    )


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` without the options that do not change a run's numbers.

    A built-in data set has the same images in every folder, so its folder is left out. A user's own data class may
    behave otherwise. So its `root`, `download` and `cache` stay, and `root` becomes an absolute path.
    """
    content = copy.deepcopy(dict(config))
    for path in EXCLUDED:
        *parents, key = path.split(".")
        if parents == ["data"]:
            continue
        node = content
        for parent in parents:
            # A missing parent gives a new empty dict, and removing a key from it changes nothing.
            node = node.get(parent, {})
        node.pop(key, None)
    for node in _data_nodes(content).values():
        own = not _built_in(node)
        for path in EXCLUDED:
            parent, _, key = path.rpartition(".")
            if parent == "data" and not (own and key in ("root", "download", "cache")):
                node.pop(key, None)
        if own and isinstance(root := node.get("root"), str):
            node["root"] = os.path.realpath(root)
    return content


def _data_nodes(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The data node and the data sets in it, by place: "" for the node, "parts.rooms." for a part of a union."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(node := content.get("data"), dict):
        found[""] = node
        for key, value in node.items():
            for name, part in value.items() if isinstance(value, dict) else ():
                if isinstance(part, dict) and TARGET in part:  # which may be a union, too
                    found |= {f"{key}.{name}.{below}": one for below, one in _data_nodes({"data": part}).items()}
    return found


def own_code(config: Mapping[str, Any]) -> dict[str, str]:
    """{module: sha256} of the user's own modules that decide a run's numbers. `loss.file` itself is left out."""
    content = decisive(config)
    file = _loss_file(content)
    return source.digests([name for _, name in _targets(content)], [] if file is None else [file])


def own_parts(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The parts of a run's identity that are not in its config.yaml: the user's own code and data folder, per node.

    Returns:
        for example {"data": {"my_data": "1a2b3c4d", "root": "/home/me/data"}, "arch": {"my_net": "5e6f7a8b"}}. It has
        the start of the sha256 of each own module, and the folder of own data as an absolute path.
    """
    content, found = decisive(config), {}
    for name, node in content.items():
        own = source.digests([target for _, target in _targets(node)], [])
        found[name] = {module: digest[:8] for module, digest in own.items()}
    for place, node in _data_nodes(content).items():
        if not _built_in(node) and isinstance(root := node.get("root"), str):
            found["data"][f"{place}root"] = root
    with suppress(ConfigError):  # a run can be used where its files are not
        for place, files in _data_files(content).items():
            found["data"] |= {f"{place}{key}": digest[:8] for key, digest in files.items()}
    return {name: own for name, own in found.items() if own}


def owner(node: dict[str, Any], key: str) -> tuple[dict[str, Any], str] | None:
    """Where a key of `own_parts` is an option, such as "parts.birds.file": its node and name; None for a module."""
    *parents, name = key.split(".")
    place: Any = node
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    return (place, name) if isinstance(place, dict) and name in place else None


def safe(label: str) -> str:
    """`label` in a form that is valid as a folder and in a W&B name: at most 39 letters, digits and ._+-.

    If a label must be changed, the start of its hash is appended. So two labels never become the same.
    """
    if re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._+-]{{0,{LABEL - 1}}}", label):
        return label
    mended = re.sub(r"[^A-Za-z0-9_+-]+", "_", label).lstrip("+-")[: LABEL - 9]
    return f"{mended or '_'}-{hashlib.sha256(label.encode(errors='surrogatepass')).hexdigest()[:8]}"


def today(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a saved config in which the classes of mtl have today's names, whatever they were when it was saved."""
    content, names = copy.deepcopy(dict(config)), {old: new for new, old in MOVED.items()}
    for node, name in _targets(content):
        node[TARGET] = names.get(name, name)
    return content


def as_before(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as the first release would have written it: first paths of classes, no later options at default.

    Hashing this form keeps the identity of older runs. It changes `content` in place.
    """
    for node, name in _targets(content):
        node[TARGET] = MOVED.get(name, name)
    for place, default in ADDED.items():
        path, _, owner = place.partition("@")
        *parents, key = path.split(".")
        node: Any = content
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        for one in _data_nodes(content).values() if parents == ["data"] else [node]:
            if isinstance(one, dict) and key in one and one[key] == default and owner in ("", one.get(TARGET)):
                del one[key]
    return content


def _targets(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every node of a config that names a class, and that name."""
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


def _data_files(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """{place: {option: sha256}} of the files of the user's that data sets of ours read; places as in `_data_nodes`.

    Raises:
        ConfigError: there is no such file.
    """
    found: dict[str, dict[str, str]] = {}
    for place, node in _data_nodes(content).items():
        for key in FILES if _built_in(node) else ():
            if isinstance(name := node.get(key), str):
                try:
                    path = Path(name).expanduser()
                    known = path.stat()
                    found.setdefault(place, {})[key] = _content(path, known.st_size, known.st_mtime_ns)
                except OSError as error:
                    raise ConfigError(f"data.{place}{key}={name}: {error.strerror or error}") from error
    return found


@cache
def _content(path: Path, size: int, changed: int) -> str:
    """The sha256 of a file of this size that was changed at that time. A grid asks for each of its runs."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def own_arch(config: Mapping[str, Any]) -> bool:
    """Whether the network is a user's own class."""
    return not _built_in(config.get("arch"))


def weights_file(config: Mapping[str, Any]) -> Path | None:
    """The file with the weights that a network of ours starts from; None where they have a name, or there are none.

    Raises:
        ConfigError: there is no such file, or the folder belongs to no run.
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
    """The name of the chosen option, such as resnet20.

    It is the name of the class if no option was chosen, or if another `_target_` replaced the option's class.
    """
    target, option = config[group][TARGET], choices.get(group)
    own = target.rpartition(".")[2].lower()
    if not option:
        return own
    file = CONF / group / f"{option}.yaml"
    if file.is_file() and f"_target_: {target}" not in file.read_text().splitlines():
        return own
    return option


def _variant(group: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    return variant(config.get(group, {}), choices.get(group), CONF / group)


def canonical(value: Any) -> Any:
    """`value` with 2.0 written as 2, so that lr=2 and lr=2.0 are the same run."""
    if isinstance(value, Mapping):
        return {k: canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
