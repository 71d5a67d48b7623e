"""The report over damaged, edited and hostile runs: it names what is wrong and is right about all the others."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from test_report import write

from mtl.report import main
from mtl.study import page

NUMBERS = [float("nan"), float("inf"), -float("inf"), None]
ODD = [
    None, 0, 1, -1, 3.5, 1e308, float("nan"), float("inf"), True, "", "x", "1", "'", "a\nb", "\u202e", "漢", "$\\x$",
    [], [1], ["x"], {}, {"a": 1}, {"a": []}, {"a": None}, [[]], 10**400,
]  # fmt: skip


@pytest.fixture
def plotless(monkeypatch):
    """Without the 5 MB of Plotly that every page holds."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "")


def tree(root):
    """Three strategies of three seeds each, and two single-task baselines."""
    for seed in range(3):
        for i, loss in enumerate(("equal", "dwa", "pcgrad")):
            write(root, loss, seed, figures={"fine_accuracy": 60.0 + i + seed, "depth_mae": 10.0 - i * seed})
    single = {"loss___target_": "mtl.losses.Single"}
    write(root, "single", figures={"fine_accuracy": 50.0}, **single, loss__task="fine")
    write(root, "single", figures={"depth_mae": 12.0}, **single, loss__task="depth")


def report(root, capsys, *options):
    """Its exit code, what it printed on both streams, and the rows of runs.csv by directory."""
    out = root.parent / "report"
    code = main([str(root), "--out", str(out), *options])
    said, errors = capsys.readouterr()
    with (out / "runs.csv").open() as f:
        rows = {row["directory"]: row for row in csv.DictReader(f)}
    return code, said, errors, rows


def edit(file, draw):
    """Put an odd value in a random place of a JSON or YAML file, or take the place away; says what was done."""
    load, dump = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    line = draw.randrange(len(lines))
    content = node = load(lines[line])
    key = draw.choice(list(node))
    while isinstance(node[key], dict) and node[key] and draw.random() < 0.7:
        node, key = node[key], draw.choice(list(node[key]))
    if draw.random() < 0.1:
        del node[key]
    else:
        node[key] = draw.choice(ODD)
    lines[line] = dump(content)
    file.write_text("\n".join(lines) + "\n")
    return f"{file.name}: {key} = {node.get(key, 'gone')!r:.40}"


@pytest.mark.parametrize("seed", range(3))
def test_one_odd_field_costs_that_run_alone_and_never_the_report(tmp_path, capsys, plotless, seed):
    root, draw = tmp_path / "runs", random.Random(seed)
    tree(root)
    code, said, errors, untouched = report(root, capsys)
    assert (code, errors, len(untouched)) == (0, "", 11)
    directories = sorted(map(Path, untouched))
    for _ in range(50):
        directory = draw.choice(directories)
        name = draw.choices(["run.json", "config.yaml", "summary.json", "metrics.jsonl"], [4, 3, 3, 2])[0]
        file = directory / name
        before = file.read_text()
        what = edit(file, draw)
        for old in (tmp_path / "report").iterdir():
            old.unlink()
        code, said, errors, rows = report(root, capsys)
        assert (code, errors) == (0, ""), (what, errors)
        assert {f.name for f in (tmp_path / "report").iterdir()} >= {"report.md", "report.html", "runs.csv"}, what
        columns = [k for k in untouched[str(directory)] if k not in ("benchmark", "strategy", "arch", "optimizer")]
        for other in untouched:
            if other != str(directory):
                assert [rows[other][k] for k in columns] == [untouched[other][k] for k in columns], what
        if str(directory) not in rows:  # left out, and named
            for place in (said, (tmp_path / "report/report.html").read_text()):
                assert str(directory) in place, what
        file.write_text(before)
