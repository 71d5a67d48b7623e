"""Which run is this? A hash of everything that decides its numbers, and the directory and names that follow from it."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"  # in a wheel; in a checkout

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

# Options that came after runs had been made; at this value, which is what was done before, no part of the hash.
ADDED = {"mtl.losses.GradNorm": {"mean": "arithmetic"}}


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
    """
    content = copy.deepcopy(dict(config))
    for path in EXCLUDED:
        *parents, key = path.split(".")
        node = content
        for parent in parents:
            node = node.get(parent, {})
        node.pop(key, None)
    loss, name = content["loss"], _label("loss", content, choices)
    for key, before in ADDED.get(loss["_target_"], {}).items():
        if loss.get(key) == before:
            del loss[key]
    if (file := loss.get("file")) and Path(file).is_file():
        # A user's own loss is what the file says, not where it lies.
        loss["file"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        name = f"{name}-{Path(file).stem}"
    text = json.dumps(canonical(content), sort_keys=True)
    return Identity(
        data=_label("data", content, choices),
        arch=_label("arch", content, choices),
        loss=name,
        digest=hashlib.sha256(text.encode()).hexdigest()[:8],
        seed=config["seed"],
    )


def _label(group: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """The chosen option's name; the class's own where another class was put into that option's place."""
    target, file = config[group]["_target_"], CONF / group / f"{choices[group]}.yaml"
    if file.is_file() and f"_target_: {target}" not in file.read_text().splitlines():
        return target.rpartition(".")[2].lower()
    return choices[group]


def canonical(value: Any) -> Any:
    """2.0 as 2: a default spelled out in another way is the same run."""
    if isinstance(value, Mapping):
        return {k: canonical(v) for k, v in value.items()}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
