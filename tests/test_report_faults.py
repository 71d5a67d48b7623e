"""The report over damaged, edited and hostile runs: it names what is wrong and is right about all the others."""

import csv
import itertools
import json
import math
import os
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_report import column, fine, scores, write
from tree import write_run

from mtl.report import multitask, summaries
from mtl.report.__main__ import main
from mtl.report.commands import single_task_command
from mtl.report.figures import page, per_run
from mtl.report.names import slug
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.report.scores import Scores
from mtl.report.statistics import deviation, mean, paired
from mtl.report.tables import Entry, Table

NUMBERS = [float("nan"), float("inf"), -float("inf"), None]
ODD = [
    None, 0, 1, -1, 3.5, 1e308, float("nan"), float("inf"), True, "", "x", "1", "'", "a\nb", "\u202e", "漢", "$\\x$",
    [], [1], ["x"], {}, {"a": 1}, {"a": []}, {"a": None}, [[]], 10**400,
]  # fmt: skip


@pytest.fixture
def plotless(monkeypatch):
    """Without the 5 MB of Plotly that every page holds."""
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "")


FACTS = {
    "versions": {"python": "3.11.2", "torch": "2.15.0"}, "commit": "c0ffee", "dirty": False,
    "hardware": {"device": "cpu", "gpu": None, "cpu": "Z80", "threads": 1, "host": "h"},
    "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T04:04:05+00:00",
}  # fmt: skip


def tree(root):
    """Three strategies of three seeds each, and one of two single-task baselines."""
    for seed in range(3):
        for i, loss in enumerate(("equal", "dwa", "pcgrad")):
            write(root, loss, seed, figures={"fine_accuracy": 60.0 + i + seed, "depth_mae": 10.0 - i * seed})
    write(root, "single", figures={"fine_accuracy": 50.0}, **{"loss___target_": "mtl.losses.Single"}, loss__task="fine")
    for file in root.rglob("run.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | FACTS))
    for file in root.rglob("summary.json"):
        facts = {"parameters": 9, "seconds": 1.5, "images_per_second": 80.0}
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))


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


@pytest.mark.parametrize("seed", [4, 8, 10])
def test_one_odd_field_costs_that_run_alone_and_never_the_report(tmp_path, capsys, plotless, seed):
    root, draw = tmp_path / "runs", random.Random(seed)
    tree(root)
    code, said, errors, untouched = report(root, capsys)
    assert (code, errors, len(untouched)) == (0, "", 10)
    directories = sorted(map(Path, untouched))
    for _ in range(40):
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


# -- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NUMBERS, ids=str)
def test_a_seed_without_a_finite_value_is_counted_named_and_never_the_best(tmp_path, capsys, plotless, value):
    for seed in range(3):
        write(tmp_path / "runs", "equal", seed, figures=fine(60.0 + seed))
        write(tmp_path / "runs", "dwa", seed, figures=fine(50.0))
        write(tmp_path / "runs", "pcgrad", seed, figures=fine(90.0 + seed if seed else value or math.nan, 1.0))
    if value is None:
        (folder,) = (tmp_path / "runs").glob("*/*/pcgrad/*/seed0")
        for file in (folder / "summary.json", folder / "metrics.jsonl"):
            file.write_text(file.read_text().replace("NaN", "null"))
    found = scores(tmp_path / "runs")
    table = summaries.metrics_table(found)
    cells = column(table, "fine_accuracy\nlast")
    assert (cells["pcgrad"].text, cells["pcgrad"].count, cells["pcgrad"].best) == ("91.50 ± 0.71 (n=2)", 2, False)
    assert (cells["equal"].text, cells["equal"].count, cells["equal"].best) == ("61.00 ± 1.00", None, True)
    assert column(table, "n")["pcgrad"].text == "3 (1 not finite)" and column(table, "n")["equal"].text == "3"
    assert "Not finite: pcgrad, seed 0 (fine_accuracy" in table.note
    header, *rows = csv.reader(table.csv().splitlines())
    assert {r[0]: r[header.index("fine_accuracy, last, n")] for r in rows if r[1]}["pcgrad"] == "2"
    ranks = found.mean_ranks("last")
    assert (ranks["equal"], ranks["dwa"], ranks["pcgrad"]) == (1.25, 1.75, 3.0)  # the two share depth's first place
    verdicts = column(summaries.differences(found, "equal", "last"), "verdict")
    assert "pcgrad: 1 of 3 seeds not finite" in verdicts["pcgrad"].text or "fine" not in verdicts
    assert main([str(tmp_path / "runs"), "--format", "csv,md,tex,html,svg"]) == 0 and not capsys.readouterr().err
    per_run = re.search(r'id="plots">(.*?)</script>', (tmp_path / "runs/report/report.html").read_text(), re.S)[1]
    assert "NaN" not in per_run and "Infinity" not in per_run and json.loads(per_run)


def test_a_benchmark_without_any_finite_value_has_a_report(tmp_path, capsys, plotless):
    for seed in range(2):
        write(tmp_path / "runs", "equal", seed, figures=fine(math.nan, math.inf))
        write(tmp_path / "runs", "dwa", seed, figures=fine(math.nan, -math.inf))
    assert main([str(tmp_path / "runs"), "--format", "md,html,svg"]) == 0
    out, err = capsys.readouterr()
    assert not err and "No run has a finite value of fine_accuracy, depth_mae." in " ".join(out.split())


def test_statistics_take_what_is_no_number():
    nan, inf = math.nan, math.inf
    assert multitask.ranks([[inf], [1.0], [-inf], [None], [2.0]], [True]).ravel().tolist() == [4, 2, 4, 4, 1]
    assert multitask.ranks([[inf], [1.0], [-inf], [None], [2.0]], [False]).ravel().tolist() == [4, 1, 4, 4, 2]
    for value in (inf, -inf, nan, None):
        assert math.isnan(multitask.delta_m([value, 1], [1, 1], [True, False]))
        assert math.isnan(multitask.delta_m([1, 1], [1, value], [True, False]))
        assert math.isnan(multitask.achievement([1, 1], [value, 1], [True, False]))
        assert multitask.pareto_optimal([[value, 9], [1, 1]], [True, False]).tolist() == [False, True]
    assert math.isnan(multitask.delta_m([1e308, -1e308], [1e-308, 1e-308], [True, True]))
    assert multitask.pareto_optimal([], [True]).tolist() == []
    assert multitask.pareto_optimal([[1.0]], [True], []).tolist() == [True]
    found = paired([inf, 1.0, 3.0, 1e308, nan], [1.0, 0.0, 1.0, -1e308, 1.0], True)
    assert (found.n, found.mean) == (2, 1.5)
    assert mean([]) is not None and math.isnan(mean([])) and mean([1.7e308] * 2) == inf
    assert deviation([1.0]) is None and deviation([1.7e308, -1.7e308]) == inf
    assert per_run.pareto_front([], True, True) == [] and per_run._steps([], True) == []


# -- files that contradict each other ---------------------------------------------------------------------------------


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("config.yaml", "lr: 0.1", "lr: 0.5", "config.yaml differs from seed 0 of the same group: optimizer.lr 0.5"),
        ("config.yaml", "epochs: 3", "epochs: 9", "trainer.epochs 9 instead of 3"),
        ("config.yaml", "seed: 1", "seed: 7", "config.yaml says seed 7, run.json says seed 1"),
        ("run.json", '"seed": 1', '"seed": 7', "the folder is seed1, run.json says seed 7"),
        ("run.json", '"loss": "dwa"', '"loss": "pcgrad"', "group is cifar100/resnet20/dwa/"),
        ("run.json", "cifar100/resnet20/dwa", "cifar100/resnet20/equal", "group is cifar100/resnet20/equal/"),
        ("metrics.jsonl", '"test/fine_accuracy": 62.0', '"test/fine_accuracy": 99.0', "99.0 in metrics.jsonl, 62.0 in"),
        ("metrics.jsonl", '"test/fine_accuracy": 60.5', '"test/fine_accuracy": 99.0', "summary.json says 62.0 is the"),
    ],
)  # fmt: skip
def test_an_edited_file_is_named_as_a_contradiction_everywhere(tmp_path, capsys, plotless, name, old, new, reason):
    for seed in range(2):
        folder = write(tmp_path / "runs", "dwa", seed, figures=fine(60.0 + seed))
    summary = json.loads((folder / "summary.json").read_text()) | {"selected": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    change(folder / name, old, new)
    code, said, _, rows = report(tmp_path / "runs", capsys)
    assert code == 0 and len(rows) == 1
    places = [said, *((tmp_path / "report" / f"report.{s}").read_text().replace("\\", "") for s in ("html", "md"))]
    for text in places:
        assert str(folder) in text and "contradiction" in text and reason in text


def test_of_a_config_without_a_twin_the_contradiction_is_named_and_the_run_counts(tmp_path, capsys, plotless):
    write(tmp_path / "runs", "equal")
    folders = [write(tmp_path / "runs", loss) for loss in ("dwa", "pcgrad", "rlw")]
    change(folders[0] / "config.yaml", "lr: 0.1", "lr: 0.5")  # the command says 0.1
    change(folders[1] / "config.yaml", "momentum: 0.9", "momentum: 0.8")
    change(folders[2] / "config.yaml", "epochs: 3", "epochs: 4")
    code, said, _, rows = report(tmp_path / "runs", capsys)
    assert code == 0 and len(rows) == 4
    for text in (said, (tmp_path / "report/report.html").read_text(), (tmp_path / "report/report.md").read_text()):
        text = text.replace("\\", "")
        assert "config.yaml says optimizer.lr 0.5, the command in run.json optimizer.lr=0.1" in text
        assert "does not give the digest" in text and "says trainer.epochs 4, the run trained 3" in text
        assert all(str(f) in text for f in folders)


# -- whose metric -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "older"])
@pytest.mark.parametrize("tasks", [("age_group", "age"), ("age", "age_group")])
def test_a_task_whose_name_starts_anothers_has_its_own_metric(tmp_path, tasks, noted):
    metrics = {f"{t}_mae": False for t in tasks}
    folder = write_run(tmp_path, "equal", 0, {f"test/{m}": [3.0, 2.0] for m in metrics}, higher=metrics)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {f"test/{t}_loss": 1.0 for t in tasks}
    rows = [{k: v for k, v in r.items() if not k.endswith("_loss")} | losses for r in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if noted:
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"tasks": {t: [f"{t}_mae"] for t in tasks}}))
    (run,) = load([tmp_path]).runs
    assert run.tasks == {t: f"{t}_mae" for t in tasks} and list(run.tasks) == list(tasks)


def test_what_no_prefix_could_tell_is_in_the_summary(tmp_path):
    metrics = {"age_group_mae": False, "age_mae": False}  # of age: its own metric "group_mae" first
    folder = write_run(tmp_path, "equal", 0, {f"test/{m}": [3.0, 2.0] for m in metrics}, higher=metrics)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"tasks": {"age": list(metrics)}}))
    assert load([tmp_path]).runs[0].tasks == {"age": "age_group_mae"}


def test_a_run_notes_whose_its_metrics_are(smoke):
    assert smoke("trainer.epochs=1").code == 0
    (file,) = Path("out").rglob("summary.json")
    assert json.loads(file.read_text())["tasks"] == {"fine": ["fine_accuracy"], "coarse": ["coarse_accuracy"]}
    found = load(["out"])
    assert len(found.runs) == 1 and not found.damaged and not found.doubtful


# -- files that are none ----------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    ("name", "act", "reason"),
    [
        ("metrics.jsonl", lambda f: (f.unlink(), os.mkfifo(f)), "metrics.jsonl is no regular file"),
        ("run.json", lambda f: (f.unlink(), os.mkfifo(f)), "run.json is no regular file"),
        ("summary.json", lambda f: (f.unlink(), f.symlink_to("/dev/zero")), "summary.json is no regular file"),
        ("config.yaml", lambda f: (f.unlink(), f.symlink_to(f)), "config.yaml: Too many levels of symbolic links"),
        ("run.json", lambda f: (f.unlink(), f.mkdir()), "run.json is no regular file"),
        ("config.yaml", lambda f: f.write_text(BOMB + f.read_text()), "config.yaml: more than 50,000 values"),
        ("config.yaml", lambda f: f.write_text(MERGES + f.read_text()), "config.yaml: << is not allowed"),
        ("config.yaml", lambda f: f.write_text("z: &z [*z]\n" + f.read_text()), "config.yaml: more than 50,000 values"),
        ("config.yaml", lambda f: f.write_text("#" * 2_000_000), "config.yaml has 2 MB"),
        ("metrics.jsonl", lambda f: f.write_text("[" + "1," * 3_000_000), "metrics.jsonl: a line is longer than 4 MB"),
        ("run.json", lambda f: f.write_text("[" * 9999), "run.json: recursion limit"),
        ("run.json", lambda f: f.write_text("null"), "run.json is half-written"),
    ],
)  # fmt: skip
def test_what_blocks_or_explodes_is_refused_at_once(tmp_path, name, act, reason):
    good, bad = write(tmp_path), write(tmp_path, seed=1)
    act(bad / name)
    found = load([tmp_path])
    assert [r.directory for r in found.runs] == [good]
    ((directory, said),) = found.damaged
    assert directory == bad and said.startswith(reason)


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("run.json", '"choices": {"optimizer": "sgd"}', '"choices": null', "run.json: choices is None, must be"),
        ("run.json", '"error": null', '"versions": null', "run.json: versions is None"),
        ("run.json", '"error": null', '"hardware": {"gpu": [1]}', "run.json: hardware.gpu is [1]"),
        ("run.json", '"error": null', '"hardware": {"threads": {}}', "run.json: hardware.threads is {}"),
        ("run.json", '"command": "python', '''"command": "'python''', "must be a command line"),
        ("run.json", '"command": "python train.py', '"command": null, "x": "', "run.json: command is None"),
        ("config.yaml", "  _target_: mtl.losses.Equal", "  x: 1", "config.yaml lacks loss._target_"),
        ("config.yaml", "limit_test: null", "limit_test: x", "config.yaml: data.limit_test is 'x'"),
        ("config.yaml", "limit_train: null", "limit_train: .nan", "config.yaml: data.limit_train is nan"),
        ("summary.json", '"epochs": 3', '"parameters": "many", "epochs": 3', "summary.json: parameters is 'many'"),
        ("summary.json", '"test/depth_mae": false', '"test/depth_mae": []', "summary.json: higher_is_better is"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_named_with_its_file_and_field(tmp_path, name, old, new, reason):
    write(tmp_path, "dwa")
    change(write(tmp_path) / name, old, new)
    found = load([tmp_path])
    ((_, said),) = found.damaged
    assert len(found.runs) == 1 and reason in said


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    good, shut = write(tmp_path), tmp_path / "cifar100" / "shut"
    shut.mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = load([tmp_path])
    assert [r.directory for r in found.runs] == [good]
    assert found.damaged == [(shut, "cannot be read: Permission denied")]


def test_a_part_that_fails_costs_no_other_part(tmp_path, capsys, plotless, monkeypatch):
    write(tmp_path / "runs")
    monkeypatch.setattr(page, "_origin", lambda runs: 1 / 0)
    monkeypatch.setattr(summaries, "per_run", lambda found: 1 / 0)
    assert main([str(tmp_path / "runs")]) == 1
    assert re.findall("error: not made: (.*): ZeroDivisionError", capsys.readouterr().err) == [
        "runs.csv", "Where it comes from"
    ]  # fmt: skip
    text = (tmp_path / "runs/report/report.html").read_text()
    assert "Where it comes from: ZeroDivisionError" in text and "Learning curves" in text
    assert (tmp_path / "runs/report/report.md").exists()


# -- names ------------------------------------------------------------------------------------------------------------


def test_markup_and_odd_letters_stay_text_in_every_format(tmp_path, capsys):
    name = "<script>x</script> $\\frac$ 漢é [a](b) *c* | =1+1"
    table = Table(name, name, [name, "n"], [[Entry("=1+1"), Entry("-2", -2.0)], [Entry("@x"), Entry("3", 3.0)]])
    assert "<script>" not in table.markdown().replace("\\<", "") and "\\<script>" in table.markdown().splitlines()[0]
    assert table.latex().isascii() and "U+6F22" in table.latex() and r"\'{e}" in table.latex()
    assert "\\\\\n    [" not in table.latex()
    assert list(csv.reader(table.csv().splitlines()))[1:] == [["'=1+1", "-2.0"], ["'@x", "3.0"]]
    write_run(tmp_path / "runs", "漢<b>$x$", 0, error=None, command="python train.py 'a=\x1b[31m\u202e'")
    write_run(tmp_path / "runs", "_{$\\bad", 0)
    write_run(tmp_path / "runs", "mgda", 0, status="failed", error="\x1b]0;taken\x07 disk\nfull")
    assert main([str(tmp_path / "runs"), "--format", "md,html,png,svg"]) == 0
    out, err = capsys.readouterr()
    assert not err and "\x1b" not in out and "disk full" in out
    assert not re.search("[\x1b\x07\u202e]", (tmp_path / "runs/report/report.html").read_text())
    assert "<b>" not in (tmp_path / "runs/report/report.md").read_text().replace("\\<b>", "")


def test_file_names_are_short_and_different():
    assert slug("cifar100, 8 epochs resnet20") == "cifar100-8-epochs-resnet20"
    long = [slug("x" * 300 + end) for end in "ab"] + [slug("漢" * 300), slug("…"), slug("")]
    assert len(set(long)) == 5 and all(0 < len(s.encode()) <= 100 for s in long)
    assert ".." not in slug("../../etc") and "/" not in slug("../../etc")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python train.py --config-dir 'my conf' loss=custom loss.file=x.py +loss.k=1 ~loss.z data=mine seed=3",
         "python train.py --config-dir 'my conf' -m loss=single loss.task=a,b data=mine seed=0,1"),
        ("torchrun --nproc-per-node 2 train.py -cn other -m 'hydra.searchpath=[file://x]' loss._target_=my.L",
         "python train.py -cn other -m loss=single loss.task=a,b 'hydra.searchpath=[file://x]' "
         "seed=0,1"),
        ("python -m mtl.train data=mine --config-dir=x step.gradients=features",
         "python -m mtl.train --config-dir=x -m loss=single loss.task=a,b data=mine seed=0,1"),
    ],
)  # fmt: skip
def test_the_command_for_baselines_keeps_flags_and_drops_any_loss(command, expected):
    assert single_task_command(command, ["a", "b"], [0, 1]) == expected


def test_the_command_for_baselines_runs_with_a_config_folder_of_ones_own(cli, tmp_path):
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "strangers.yaml").write_text("_target_: mtl.losses.DWA\ntemperature: 3.0\n")
    small = ("experiment=smoke", "data.train_size=64", "data.test_size=32", "data.batch_size=32", "trainer.epochs=1",
             "output_root=out")  # fmt: skip
    assert cli("--config-dir", "mine", "loss=strangers", "loss.temperature=4.0", *small, "seed=5").code == 0
    (file,) = Path("out").rglob("run.json")
    info = json.loads(file.read_text())
    if "--config-dir" not in info["command"]:  # as the command line notes it
        info["command"] = info["command"].replace("train.py", "train.py --config-dir mine")
        file.write_text(json.dumps(info))
    found = load(["out"])
    (benchmark,) = benchmarks(found.runs)
    command = summaries.baseline_command(Scores(benchmark, benchmark.archs[0]))
    words = shlex.split(command)
    assert words[:5] == ["python", "train.py", "--config-dir=mine", "-m", "loss=single"]
    assert cli(*words[2:]).code == 0
    found = load(["out"])
    (benchmark,) = benchmarks(found.runs)
    assert summaries.baseline_command(Scores(benchmark, benchmark.archs[0])) is None and len(found.runs) == 3
