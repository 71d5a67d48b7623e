"""What a run says before its first epoch and after its last."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from mtl.archs.model import count_macs, count_parameters
from mtl.losses import LossWeighting
from mtl.tracking.console import duration, table

if TYPE_CHECKING:
    from mtl.engine.run import Job

log = logging.getLogger("mtl")


def header(job: Job, tracker: str, resumed: int) -> None:
    """What will run, before the first epoch.

    Args:
        job: the run.
        tracker: what the tracker says of itself.
        resumed: epochs that are already done.
    """
    learner, config, identity = job.learner, job.config, job.identity
    trainer, strategy, optimizer = learner.trainer, learner.strategy, config["optimizer"]
    own = sum(p.numel() for p in strategy.parameters())
    sizes = [f"{job.train.size:,} train", *(f"{b.size:,} {name}" for name, b in job.evaluations.items())]
    heads = "" if isinstance(strategy, LossWeighting) else f", heads: {strategy.heads} gradient"
    lines = {
        "run": identity.name,
        "data": f"{identity.data}: {', '.join(sizes)}; "
        f"tasks {', '.join(f'{t.name} ({t.outputs})' for t in learner.tasks)}",
        "model": f"{identity.arch}: {count_parameters(learner.model):,} parameters, "
        f"{count_macs(learner.model, job.benchmark.image_shape) / 1e6:,.1f} MMAC an image",
        "strategy": f"{identity.loss} ({strategy.family}{heads}{f', {own} own parameters' if own else ''})",
        "training": f"{trainer.epochs} epochs of {len(job.train)} steps, batch {job.benchmark.batch_size}, "
        f"{optimizer['_target_'].rpartition('.')[2]} lr {optimizer.get('lr', 'default')}, "
        f"{config['schedule']['_target_'].rpartition('.')[2].lower()} schedule",
        "micro": learner.microscope.describe(learner, len(job.train), job.benchmark.batch_size),
        "device": f"{_device_name(learner.device)}, {trainer.precision}"
        + (f"; {processes.size} processes with a part of each batch" if (processes := learner.processes) else ""),
        "output": str(job.directory.path),
        "tracker": tracker,
        "resumed": f"after epoch {resumed}" if resumed else "",
    }
    for key, value in lines.items():
        if value:
            log.info(f"{key:9s} {value}")
    if trainer.slow_precision(learner.device):
        log.info("WARNING   this CPU has no bf16 instructions: trainer.precision=fp32 is about 10x faster here")


def footer(job: Job, rows: list[dict[str, float]]) -> None:
    """What came of it, and how to do it again."""
    summary = job.summary(rows)
    chosen = summary["selected"]
    header = ["test", "best", "at epoch", f"last ({len(rows)})", *([f"by {chosen['by']}"] if chosen else [])]
    body = [
        [
            key.removeprefix("test/"),
            f"{best['value']:.4g}",
            str(best["epoch"]),
            f"{summary['last'][key]:.4g}",
            *([f"{chosen[key]:.4g}"] if chosen else []),
        ]
        for key, best in summary["best"].items()
    ]
    log.info(table(header, body))
    speed = f"{summary['images_per_second']:,.0f} img/s in training"
    speed += f", peak memory {summary['peak_memory_gib']:.2f} GiB"
    files = "last.pt and best.pt" if job.directory.best.is_file() else "last.pt (best.pt is missing)"
    log.info(f"{duration(summary['seconds'])}, {speed}; checkpoints {files} in {job.directory.path}")
    log.info(f"reproduce: {job.command}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
