"""A run's directory: who works in it, what state it is in, and the files that every run writes."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from mtl import __version__
from mtl.config.errors import Busy, SetupError, remove_empty
from mtl.config.program import checkout

PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "wandb")


class RunDirectory:
    """Exclusive use of one run's directory, as a context manager.

    Holds config.yaml, run.json (identity, status, commit, versions, hardware, command), metrics.jsonl (one row per
    epoch), summary.json, train.log, last.pt and best.pt. A directory in which nothing was written is removed again.

    Raises:
        Busy: another process is at work here.
        SetupError: the directory cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self.last, self.best = path / "last.pt", path / "best.pt"
        self._lock = FileLock(path / ".lock")
        self._handler: logging.Handler | None = None

    def __enter__(self) -> RunDirectory:
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise Busy(f"another process is training {self.path}; this one leaves it alone") from None
        except OSError as error:
            remove_empty(self._made)
            raise SetupError(f"cannot write to {self.path}: {error.strerror}; set output_root=DIR") from error
        return self

    def __exit__(self, *exception) -> None:
        if self._handler is not None:
            logging.getLogger("mtl").removeHandler(self._handler)
            self._handler.close()
        self._lock.release()
        if not (self.path / "run.json").exists():
            (self.path / ".lock").unlink(missing_ok=True)
            remove_empty(self._made)

    @property
    def run(self) -> dict[str, Any]:
        """The content of run.json; empty before the first start, or if a power cut has left it unreadable."""
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def busy(self) -> bool:
        """Whether a process is at work here now."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with FileLock(self.path / ".lock", blocking=False):
                return False
        except Timeout:
            return True

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        write_json(self.path / "run.json", {**self.run, **fields})

    def start(self, config: Mapping[str, Any], fields: Mapping[str, Any], device: torch.device) -> None:
        """Note what begins here, and log to train.log from now on."""
        (self.path / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
        self.update(**fields, status="running", error=None, started=now(), finished=None, **provenance(device))
        self._handler = logging.FileHandler(self.path / "train.log")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("mtl").addHandler(self._handler)

    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl; a half-written last line (a kill in mid-write) is left out."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def append(self, row: Mapping[str, float]) -> None:
        """Add one row to metrics.jsonl."""
        with self.metrics.open("a") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())  # as durable as the checkpoint that follows

    def truncate(self, epochs: int) -> list[dict[str, float]]:
        """Keep only the rows of the first `epochs` epochs (those the checkpoint knows) and return them."""
        rows = [r for r in self.rows() if r["epoch"] <= epochs]
        write_text(self.metrics, "".join(json.dumps(r) + "\n" for r in rows))
        return rows


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions and hardware: what a figure must be able to name."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version(), "mtl": __version__, **{p: version(p) for p in PACKAGES}},
        "hardware": {
            "device": str(device),
            "gpu": gpu,
            "cpu": _cpu(),
            "threads": torch.get_num_threads(),
            "host": platform.node(),
        },
    }


def _git(*arguments: str) -> str | None:
    root = checkout()
    if root is None:  # installed: a repository around the environment is not this code's
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a copy without its history
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
