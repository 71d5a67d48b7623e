"""Weights & Biases: online when logged in and reachable, else offline; never a prompt, never a run lost to a dashboard.

All runs share <output_root>/wandb. `wandb leet <output_root>/wandb` shows them side by side without an account.
`wandb sync <output_root>/wandb/*` uploads them later, the folders of one id in the order in which they began.

A resumed run goes on in a second folder with the same id. W&B writes to a folder only now and then, so a kill loses its
last steps. The second folder begins with the steps that no folder holds.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mtl.tracking import RunInfo, Tracker, pictures

log = logging.getLogger("mtl")

# By default W&B tries for 90 s to begin a run, and without a limit to end one. A grid without a network would wait so
# in every cell.
PROBE, BEGIN, END = 5.0, 30.0, 600.0  # seconds: to reach the server at all; to open a run; to upload the rest
INSPECT = 60.0  # seconds: to read one earlier folder of a run

ID, NAME, TAG = 64, 128, 64  # characters that W&B accepts
FORBIDDEN = "/\\#?%:"  # in a project


class WandbTracker(Tracker):
    """One W&B run for each run: id and name from the identity, group = everything except the seed, epoch as the x-axis.

    In a sweep (`wandb agent`) W&B chooses the id. A run that was begun or finished before is reported from its start.

    Args:
        project, entity: where online runs go.
        mode: auto and online are online if W&B is logged in and reachable, else offline. The environment variable
            WANDB_MODE=disabled comes first.
        tags: added to data, arch and loss.
        artifact: best uploads best.pt as a model artifact, when a run has finished.

    Raises:
        ValueError: W&B accepts no such project or tag.
    """

    def __init__(
        self,
        project: str = "mtl",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        tags: Sequence[str] = (),
        artifact: Literal["none", "best"] = "none",
    ):
        if not 0 < len(project) <= NAME or set(project) & set(FORBIDDEN):
            raise ValueError(f"project: must have 1 to {NAME} characters and none of {FORBIDDEN}, not {project!r}")
        if wrong := [tag for tag in tags if not 0 < len(tag) <= TAG]:
            raise ValueError(f"tags: each must have 1 to {TAG} characters, not {wrong[0]!r}")
        self.project, self.entity, self.mode, self.tags, self.artifact = project, entity, mode, tuple(tags), artifact
        self.run = None

    @property
    def repeats(self) -> bool:
        """In a sweep, yes: W&B takes a run without a report for a crash, and its search would learn nothing from it."""
        return "WANDB_SWEEP_ID" in os.environ

    def start(self, info: RunInfo) -> str:
        self.info = info
        try:
            import wandb  # late: half a second that runs without W&B need not pay

            mode, wish = self._mode(wandb)
            info.output_root.joinpath("wandb").mkdir(parents=True, exist_ok=True)
            try:
                self.run = self._open(wandb, mode)
            except Exception as error:
                if mode != "online":
                    raise
                # Until this, W&B's service keeps the id of the run that it could not begin.
                wandb.teardown()
                mode, wish = "offline", f"W&B refused ({_first_line(error)}), so "
                self.run = self._open(wandb, mode)
            self.run.define_metric("epoch", hidden=True)
            self.run.define_metric("*", step_metric="epoch")
            for key, higher in info.best.items():
                # With "last" too: "max" alone would remove the plain key from the summary. After a resume this maximum
                # is over the epochs since. The key "best/<metric>", which `finish` adds, is over all.
                self.run.define_metric(key, step_metric="epoch", summary="max,last" if higher else "min,last")
            missing = self._missing(mode)
        except Exception as error:
            self.run = None
            return f"not available ({type(error).__name__}: {error}); training goes on without it"
        for row in missing:
            self.log(row)
        if mode == "online":
            return str(self.run.url)
        if mode == "disabled":
            return "disabled by WANDB_MODE"
        return f"{wish}offline; upload with: wandb sync {self.run.settings.sync_dir}"

    def _mode(self, wandb: Any) -> tuple[str, str]:
        """online, offline or disabled; and why it is not as wished, to begin a line with."""
        if os.environ.get("WANDB_MODE") == "disabled":
            return "disabled", ""
        if self.mode == "offline":
            return "offline", ""
        # Before init, which would prompt the user for a login.
        mode, refused = _logged_in(wandb)
        if refused:
            return mode, f"W&B refused the key ({refused}), so "
        if mode == "offline":
            return mode, "not logged in (wandb login), so " if self.mode == "online" else ""
        if not _reachable(url := wandb.setup().settings.base_url):
            return "offline", f"{url} cannot be reached, so "
        return mode, ""

    def compare(self, output_root: Path, name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
        """Report what only several runs together say, as one more run: Δm and ranks of a grid.

        Args:
            output_root: of all runs.
            name: of the grid. The same name is the same run, which is then updated.
            rows: {strategy: {"delta_m": …, "mean_rank": …}}.

        Returns:
            one line for the console.
        """
        try:
            import wandb

            columns = list(dict.fromkeys(key for row in rows.values() for key in row))
            with wandb.init(
                project=self.project, entity=self.entity, id=_fit(f"summary-{name}", ID, r"[^A-Za-z0-9_.-]"),
                name=_fit(f"summary {name}", NAME), job_type="summary", tags=["summary", *self.tags],
                dir=str(output_root.resolve()), mode=self._mode(wandb)[0], resume="allow",
                settings=wandb.Settings(silent=True, init_timeout=BEGIN, finish_timeout=END),
            ) as run:  # fmt: skip
                run.summary.update({f"{key}/{s}": value for s, row in rows.items() for key, value in row.items()})
                table = [[strategy, *(row.get(key) for key in columns)] for strategy, row in rows.items()]
                run.log({"strategies": wandb.Table(columns=["strategy", *columns], data=table)})
                # There is no Δm without single-task baselines.
                return f"W&B:      {'Δm and ranks' if 'delta_m' in columns else 'ranks'} are in the run {run.id}"
        except Exception as error:  # the table has been printed
            return f"W&B:      no summary run ({type(error).__name__}: {_first_line(error)})"

    def _missing(self, mode: str) -> list[Mapping[str, float]]:
        """The rows so far that W&B does not have under this id."""
        if mode == "disabled" or not self.info.rows:
            return []
        if mode == "online":
            return [row for row in self.info.rows if row["epoch"] >= self.run.step]
        here, folders = Path(self.run.settings.sync_dir), self.info.output_root / "wandb"
        name = glob.escape(self.run.id)
        earlier = [f for f in folders.glob(f"*run-*-{name}/run-{name}.wandb") if f.parent.resolve() != here.resolve()]
        told = set().union(*map(_steps, earlier))
        return [row for row in self.info.rows if row["epoch"] not in told]

    def _open(self, wandb: Any, mode: str) -> Any:
        identity, config = self.info.identity, self.info.config
        # Beside the flat config there are names without a dot: W&B's panels and filters read a dot as nesting. A sweep
        # uses these names for its parameters, too, and locks their values.
        tags = [_fit(name, TAG) for name in (identity.data, identity.arch, identity.loss)]
        names = {"data": identity.data, "arch": identity.arch, "loss": identity.loss, "lr": config.get("optimizer.lr")}
        return wandb.init(
            project=self.project,
            entity=self.entity,
            id=_fit(identity.name, ID, r"[^A-Za-z0-9_.-]"),
            name=_fit(identity.title, NAME),
            group=_fit(identity.group, NAME),
            job_type="train",
            tags=list(dict.fromkeys([*tags, *self.tags])),
            config={**config, **names},
            # Absolute: W&B's service is another process, which may work in another folder.
            dir=str(self.info.output_root.resolve()),
            mode=mode,
            resume="allow",
            settings=wandb.Settings(silent=True, init_timeout=BEGIN, finish_timeout=END),
        )

    def log(self, row: Mapping[str, float]) -> None:
        if self.run is not None:
            finite: dict[str, Any] = {
                k: v for k, v in row.items() if not (isinstance(v, float) and not math.isfinite(v))
            }
            if sheet := pictures.of(self.info.directory, int(row["epoch"])):
                import wandb

                finite["pictures"] = wandb.Image(sheet.page, caption=sheet.caption)
            # The step is given, not counted: a resumed run must go on where it was.
            self._try(lambda: self.run.log(finite, step=int(row["epoch"]), commit=True))

    def finish(self, summary: Mapping[str, Any], ok: bool) -> None:
        if self.run is not None:
            self._try(lambda: self.run.summary.update({_slashed(key): value for key, value in summary.items()}))
        if self.run is not None and ok and self.artifact == "best":
            if (self.info.directory / "best.pt").is_file():
                self._try(lambda: self._upload(summary))
            else:
                log.warning("best.pt is missing, so W&B gets no artifact")
        if self.run is not None:
            self._try(lambda: self.run.finish(exit_code=0 if ok else 1))
            self.run = None

    def _upload(self, summary: Mapping[str, Any]) -> None:
        import wandb

        identity = self.info.identity
        facts = {"data": identity.data, "arch": identity.arch, "loss": identity.loss, "seed": identity.seed}
        chosen = {_slashed(k): v for k, v in summary.items() if k.startswith(("best.", "last.", "selected."))}
        name = _fit(identity.name, NAME, r"[^A-Za-z0-9_.-]")
        artifact = wandb.Artifact(name, type="model", metadata={**facts, **chosen})
        # Absolute, for a sync from anywhere; best.pt is not written again, so W&B need not copy it before.
        artifact.add_file(str((self.info.directory / "best.pt").resolve()), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact, aliases=["best"])

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk, a dead service: metrics.jsonl holds everything anyway
            log.warning(f"W&B stopped ({type(error).__name__}: {error}); training goes on without it")
            self.run = None


def _steps(file: Path) -> set[int]:
    """The steps in a .wandb file; none if it cannot be read, since a row reported twice is better than a lost one."""
    if file.stat().st_size <= 7:  # its header: a kill came before anything was written
        return set()
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    try:
        lines = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=INSPECT).stdout
        records = [json.loads(line) for line in lines.splitlines() if b'"history"' in line]
        return {int(record["history"]["item"]["_step"]) for record in records if record["type"] == "history"}
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return set()


def _fit(text: str, limit: int, forbidden: str = r"[\x00-\x1f]") -> str:
    """`text` as W&B accepts it. If the text must change, a hash keeps different texts apart."""
    accepted = re.sub(forbidden, "-", text).strip()
    if accepted == text and len(text) <= limit:
        return text
    return f"{accepted[: limit - 9]}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def _slashed(key: str) -> str:
    """best.test/fine_accuracy.value as best/fine_accuracy: W&B would read a dot as nesting."""
    return key.removesuffix(".value").replace(".test/", "/").replace(".", "/")


def _logged_in(wandb: Any) -> tuple[str, str]:
    """The mode, online or offline, and the fault of the key, if it has one."""
    try:
        return ("online" if wandb.login(prompt=False, verify=False) else "offline"), ""
    except Exception as error:  # a key of another length, say
        return "offline", _first_line(error)


def _reachable(url: str) -> bool:
    """Whether a server answers at all. A proxy in HTTPS_PROXY is used, as W&B does."""
    try:
        with urllib.request.urlopen(url, timeout=PROBE):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError as error:  # W&B may know a certificate that Python does not know
        return isinstance(getattr(error, "reason", error), ssl.SSLError)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
