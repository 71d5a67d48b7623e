"""The W&B workspace: what its panels name is what the tracker logs, checked on the serialised view, offline."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from mtl.errors import ConfigError, SetupError
from mtl.report import wandb_workspace

pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")


def benchmark(directory: Path) -> SimpleNamespace:
    """One finished run as mtl.report.protocols sorts it."""
    info, summary = (json.loads((directory / f"{name}.json").read_text()) for name in ("run", "summary"))
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = {k.removeprefix("test/"): v for k, v in summary["higher_is_better"].items()}
    group = SimpleNamespace(any=SimpleNamespace(info=info, rows=rows))
    return SimpleNamespace(name="digits", metrics=metrics, groups=[group], baselines=[])


def named(node) -> set[str]:
    """Every metric, config value and column that a serialised view names."""
    if isinstance(node, list):
        return set().union(*map(named, node))
    if not isinstance(node, dict):
        return set()
    found = {node["accessor"]} if node.get("accessor") else set()
    found |= {m for m in node.get("metrics") or () if isinstance(m, str)} | set(node.get("column_order", ()))
    if isinstance(node.get("key"), dict) and "section" in node["key"]:
        found.add(f"{node['key']['section']}:{node['key']['name']}")
    return found.union(*map(named, node.values()))


def test_every_name_in_a_panel_is_one_that_the_tracker_logs(cli, tmp_path):
    run = cli("data=digits", "data.limit_train=64", "data.limit_test=32", "data.val_fraction=0.25", "trainer.epochs=1",
              "arch=wide_resnet", "arch.depth=10", "arch.width=1", "loss=pcgrad",
              f"output_root={tmp_path / 'out'}")  # fmt: skip
    assert run.code == 0, run.err
    (folder,) = Path("out/wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    history = {k for r in records if r["type"] == "history" for k in r["history"]["item"]}
    summary = {k for r in records if r["type"] == "summary" for k in r["summary"]["update"]}
    config = {k for r in records if r["type"] == "run" for k in r["run"]["config"]["update"]}
    (file,) = Path("out").rglob("run.json")

    def names_in_view(found) -> set[str]:
        return named(json.loads(wandb_workspace.build(found, "someone", "mtl")._to_model().model_dump_json()))

    allowed = {*history, *(f"summary_metrics.{k}" for k in summary), *(f"summary:{k}" for k in summary)}
    allowed |= {f"config:{k}.value" for k in config} | {f"config:{k}" for k in config}
    runs = {"run:displayName", "run:jobType", "run:group"}
    found = benchmark(file.parent)
    names = names_in_view(found)
    assert names - runs <= allowed and runs <= names
    assert {"test/digit_accuracy", "val/digit_accuracy", "weights/odd", "grad/cosine", "summary:selected/ink_mae",
            "config:loss.value", "summary_metrics.selected/digit_accuracy"} <= names  # fmt: skip
    # W&B reads a dot as nesting; the tracker's names have none.
    assert not [n for n in names if "." in re.sub(r"^summary_metrics\.|\.value$", "", n)]

    found.groups[0].any.rows = [{k: v for k, v in row.items() if "val/" not in k} for row in found.groups[0].any.rows]
    names = names_in_view(found)
    assert names - runs <= allowed and "summary:best/ink_mae" in names and "val/digit_accuracy" not in names


def test_what_stands_in_the_way_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="ENTITY/PROJECT"):
        wandb_workspace.create([], "mtl")
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    with pytest.raises(SetupError, match="wandb login"):
        wandb_workspace.create([], "someone/mtl")
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    nothing = SimpleNamespace(name="digits", metrics={}, groups=[], baselines=[])  # no run has finished
    assert wandb_workspace.create([nothing], "someone/mtl") == []
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(SetupError, match="pip install"):
        wandb_workspace.build(SimpleNamespace(), "someone", "mtl")
