"""Weights & Biases: online when logged in, else offline; never a prompt, never a run lost to a dashboard.

All runs share <output_root>/wandb, so `wandb leet <output_root>/wandb` shows them side by side without an account and
`wandb sync` uploads them later.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mtl.tracking import RunInfo, Tracker

log = logging.getLogger("mtl")


class WandbTracker(Tracker):
    """One W&B run per run: id and name from the identity, group = everything but the seed, epoch as the x-axis.

    Args:
        project, entity: where online runs go.
        mode: auto and online are online when W&B is logged in, else offline; WANDB_MODE=disabled is obeyed.
        tags: added to data, arch and loss.
    """

    def __init__(
        self,
        project: str = "mtl",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        tags: Sequence[str] = (),
    ):
        self.project, self.entity, self.mode, self.tags = project, entity, mode, tuple(tags)
        self.run = None

    def start(self, info: RunInfo) -> str:
        identity, mode = info.identity, self.mode
        try:
            import wandb  # late: half a second that runs without W&B need not pay

            if os.environ.get("WANDB_MODE") == "disabled":
                mode = "disabled"
            elif mode != "offline":
                # Asked without a prompt, and before init, which would ask with one.
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            info.output_root.joinpath("wandb").mkdir(parents=True, exist_ok=True)
            self.run = wandb.init(
                project=self.project,
                entity=self.entity,
                id=identity.name,
                name=identity.name,
                group=identity.group,
                job_type="train",
                tags=[identity.data, identity.arch, identity.loss, *self.tags],
                config=dict(info.config),
                # Absolute: W&B's service is another process, which may work in another folder.
                dir=str(info.output_root.resolve()),
                mode=mode,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )
            self.run.define_metric("epoch", hidden=True)
            self.run.define_metric("*", step_metric="epoch")
            for key, higher in info.best.items():
                # With "last" too: "max" alone would remove the plain key from the summary.
                self.run.define_metric(key, step_metric="epoch", summary="max,last" if higher else "min,last")
        except Exception as error:
            self.run = None
            return f"not available ({type(error).__name__}: {error}); training goes on without it"
        if mode == "online":
            return str(self.run.url)
        if mode == "disabled":
            return "disabled by WANDB_MODE"
        wish = "not logged in (wandb login), so " if self.mode == "online" else ""
        return f"{wish}offline; upload with: wandb sync {self.run.settings.sync_dir}"

    def log(self, row: Mapping[str, float]) -> None:
        if self.run is not None:
            finite = {k: v for k, v in row.items() if not (isinstance(v, float) and not math.isfinite(v))}
            # The step is given, not counted: a resumed run must go on where it was.
            self._try(lambda: self.run.log(finite, step=int(row["epoch"])))

    def finish(self, summary: Mapping[str, Any], ok: bool) -> None:
        if self.run is not None:
            self._try(lambda: self.run.summary.update(dict(summary)))
        if self.run is not None:
            self._try(lambda: self.run.finish(exit_code=0 if ok else 1))
            self.run = None

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk, a dead service: metrics.jsonl holds everything anyway
            log.warning(f"W&B stopped ({type(error).__name__}: {error}); training goes on without it")
            self.run = None
