"""An output tree on disk as train.py would leave it, with numbers chosen by a test."""

import json
from pathlib import Path

import yaml


def write_run(
    root: Path,
    loss: str = "equal",
    seed: int = 0,
    curves: dict | None = None,
    *,
    lr: float = 0.1,
    task: str | None = None,
    digest: str = "00000000",
    arch: str = "resnet20",
    higher: dict | None = None,
    rate: float = 100.0,
    batch: int = 50,
    **info,
) -> Path:
    """One run.

    Args:
        curves: {"test/a_accuracy": [per epoch, …], "weights/a": […], …}.
        higher: {"a_accuracy": higher is better, …}; by default all test accuracies are.
        rate, batch: images a second, images a step.
        info: further fields of run.json.
    """
    curves = curves or {"test/a_accuracy": [1.0, 2.0], "test/b_accuracy": [3.0, 4.0]}
    higher = higher or {k.removeprefix("test/"): True for k in curves if k.startswith("test/") and "_loss" not in k}
    epochs = len(next(iter(curves.values())))
    directory = root / "synthetic" / arch / loss / digest / f"seed{seed}"
    directory.mkdir(parents=True)
    group = f"synthetic/{arch}/{loss}/{digest}"
    known = {"data": "synthetic", "arch": arch, "loss": loss, "digest": digest, "seed": seed, "group": group,
             "choices": {"optimizer": "sgd", "data": "synthetic", "arch": arch, "loss": loss},
             "command": f"python train.py loss={loss} seed={seed}", "status": "finished", "error": None,
             "finished": "2026-01-02T03:04:05+00:00", "commit": "c0ffee", "dirty": False,
             "versions": {"torch": "2.15.0"},
             "hardware": {"device": "cpu", "gpu": None, "cpu": "Z80", "threads": 1, "host": "h"}}  # fmt: skip
    (directory / "run.json").write_text(json.dumps({**known, **info}))
    node = {"_target_": "mtl.losses.Single", "task": task} if task else {"_target_": f"mtl.losses.{loss}"}
    config = {
        "data": {"_target_": "mtl.data.Synthetic", "batch_size": batch},
        "arch": {"_target_": arch},
        "loss": node,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": lr},
        "trainer": {"epochs": epochs},
        "seed": seed,
        "output_root": "outputs",
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for epoch in range(epochs):
        row = {"epoch": epoch + 1, **{k: v[epoch] for k, v in curves.items() if v[epoch] is not None}}
        for metric in higher:
            row.setdefault(f"test/{metric.split('_')[0]}_loss", 1.0)
        rows.append(row)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    best = {}
    for metric, up in higher.items():
        row = (max if up else min)(rows, key=lambda r, m=metric: r[f"test/{m}"])
        best[f"test/{metric}"] = {"value": row[f"test/{metric}"], "epoch": row["epoch"]}
    summary = {"epochs": epochs, "best": best, "last": {f"test/{m}": rows[-1][f"test/{m}"] for m in higher},
               "higher_is_better": {f"test/{m}": up for m, up in higher.items()}, "selected": None,
               "images_per_second": rate}  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory
