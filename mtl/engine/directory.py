"""A run's directory: its lock, the run's status, and the files that every run writes."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from mtl import __version__
from mtl.config.program import checkout
from mtl.engine.files import Damaged, check_regular, dump_row, read_json, read_rows, write_json, write_text, writing
from mtl.errors import Busy, SetupError, remove_empty
from mtl.tracking.runlog import RunLog

PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "wandb")


PATIENCE = 1.0  # seconds that a run waits for its lock: a check of the lock (`busy`) takes far less


class RunDirectory:
    """A run's directory. As a context manager it is locked, so that only one process trains the run.

    It contains config.yaml, run.json (identity, status, commit, versions, hardware, command), metrics.jsonl (one row
    per epoch), summary.json, train.log, last.pt and best.pt. If nothing was written, the directory is removed again.

    Raises:
        Busy: another process is training this run.
        SetupError: the directory cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self.last, self.best = path / "last.pt", path / "best.pt"
        self._lock = FileLock(path / ".lock")
        self._log: RunLog | None = None
        self._fields: dict[str, Any] = {}

    def __enter__(self) -> RunDirectory:
        self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=PATIENCE, poll_interval=PATIENCE / 50)
        except Timeout:
            raise Busy(f"another process is training {self.path}; this one leaves it alone") from None
        except OSError as error:
            remove_empty(self._made)
            raise SetupError(f"cannot write to {self.path}: {error.strerror}; set output_root=DIR") from error
        return self

    def __exit__(self, *exception) -> None:
        with suppress(OSError):  # the folder may be gone, or its disk full
            if self._log is not None:
                self._log.end()
        with suppress(OSError):
            self._lock.release()
        with suppress(OSError):
            # Without run.json the run never began: remove what this process has created, and nothing else.
            if not (self.path / "run.json").exists():
                new = self.path in self._made
                for name in (".lock", *(("config.yaml", "train.log") if new else ())):
                    (self.path / name).unlink(missing_ok=True)
                remove_empty(self._made)

    @property
    def run(self) -> dict[str, Any]:
        """The content of run.json; empty before the first start, or if a power cut has left it incomplete.

        Raises:
            SetupError: the file is damaged in another way, so that the run may or may not be finished.
        """
        file, cure = self.path / "run.json", "delete it, and the run's command writes it anew"
        try:
            content = read_json(file)
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        except Damaged as error:
            raise Damaged(f"{error}; {cure}") from error
        for key in ("status", *(["finished"] if content.get("status") == "finished" else [])):
            if not isinstance(content.get(key), str):
                raise Damaged(f"{file} is damaged: no {key} in it; {cure}")
        return content

    @property
    def busy(self) -> bool:
        """Whether a process is training this run now.

        Raises:
            SetupError: the lock file cannot be read.
        """
        file = self.path / ".lock"
        try:
            check_regular(file)
            with file.open("rb") as f:
                # Several checks can share the lock. A run that starts meanwhile waits for their end: see PATIENCE.
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError as error:
            raise SetupError(f"cannot read {file}: {error.strerror}") from error

    @property
    def finished(self) -> bool:
        """Whether this process has marked the run as finished."""
        return self._fields.get("status") == "finished"

    def update(self, **fields: Any) -> None:
        """Change fields of run.json.

        Raises:
            WriteError: the file cannot be written.
        """
        content = {**self._fields, **fields}
        write_json(self.path / "run.json", content)
        self._fields = content

    def start(self, config: Mapping[str, Any], fields: Mapping[str, Any], device: torch.device) -> None:
        """Write config.yaml, set run.json to "running", and start logging to train.log.

        Raises:
            WriteError: one of the files cannot be written.
            SetupError: one of the files is damaged.
        """
        log_file = self.path / "train.log"
        check_regular(log_file)
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        with writing(log_file):
            self._log = RunLog(log_file)
        self._log.begin()
        self._fields = self.run
        self.update(**fields, status="running", error=None, started=now(), finished=None, **provenance(device))

    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl; see `mtl.engine.files.read_rows`."""
        return read_rows(self.metrics)

    def append(self, row: Mapping[str, float]) -> None:
        """Append a row to metrics.jsonl.

        Raises:
            WriteError: the file cannot be written.
        """
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as f:
            f.write(dump_row(row) + "\n")
            f.flush()
            os.fsync(f.fileno())  # on disk before the checkpoint, which contains the row's digest

    def truncate(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Keep only `rows` in metrics.jsonl: the rows up to the last checkpoint.

        Raises:
            WriteError: the file cannot be written.
        """
        text = "".join(dump_row(row) + "\n" for row in rows)
        if not self.metrics.exists() or self.metrics.read_text(encoding="utf-8", errors="replace") != text:
            write_text(self.metrics, text)


def now() -> str:
    """The current time as ISO 8601, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions of packages, and hardware, for run.json."""
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
    if root is None:  # installed as a package: a repository around the environment is another project's
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
