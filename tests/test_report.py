"""The report: runs read back and sorted, what the tables say, and the command line."""

import csv
import json
import math
import random
import re
import statistics
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml

from mtl.config.identity import identify
from mtl.report import summaries
from mtl.report.__main__ import main
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.report.scores import Scores
from mtl.report.tables import Entry, Table

HIGHER = {"fine_accuracy": True, "depth_mae": False}


def write(root, loss="equal", seed=0, figures=None, status="finished", error=None, arch="resnet20", **changes):
    """A run directory as train.py leaves it.

    Args:
        figures: {metric: last value}; best is 1 better, selected is 0.5 worse. Default: drawn from loss and seed.
        changes: of the config, "optimizer__lr=0.01"; the digest follows from them.
    """
    if figures is None:
        draw = random.Random(f"{loss}{seed}")
        figures = {"fine_accuracy": 60 + 5 * draw.random(), "depth_mae": 10 + draw.random()}
    config = {
        "data": {"_target_": "mtl.data.cifar100.CIFAR100", "root": "anywhere", "batch_size": 128, "limit_train": None,
                 "limit_test": None, "val_fraction": 0.0, "workers": 2},
        "arch": {"_target_": "mtl.archs.resnet.ResNet", "depth": 20},
        "loss": {"_target_": f"mtl.losses.{loss.title()}"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        "step": {"gradients": "paper"},
        "trainer": {"epochs": 3, "device": "auto"},
        "seed": seed, "output_root": str(root),
    }  # fmt: skip
    for path, value in changes.items():
        node, key = path.split("__")
        config[node][key] = value
    identity = identify(config, {"data": "cifar100", "arch": arch, "loss": loss})
    folder = identity.directory(root)
    folder.mkdir(parents=True)
    info = {**asdict(identity), "status": status, "group": identity.group, "error": error,
            "command": f"python train.py loss={loss} optimizer.lr=0.1 seed={seed}",
            "choices": {"optimizer": config["optimizer"]["_target_"].rpartition(".")[2].lower()}}  # fmt: skip
    signs = {m: 1 if HIGHER[m] else -1 for m in figures}
    last = {f"test/{m}": v for m, v in figures.items()}
    best = {f"test/{m}": v + signs[m] for m, v in figures.items()}
    losses = {f"test/{m.partition('_')[0]}_loss": 1.0 for m in figures}
    chosen = {f"test/{m}": v - signs[m] / 2 for m, v in figures.items()}
    summary = {
        "epochs": 3, "last": last, "best": {k: {"value": v, "epoch": 2} for k, v in best.items()},
        "higher_is_better": {f"test/{m}": HIGHER[m] for m in figures},
        "selected": {"by": "val/fine_accuracy", "epoch": 1, **chosen},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [{"epoch": e, **losses, **tests} for e, tests in enumerate((chosen, best, last), start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if status == "finished":
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def edit(folder, **fields):
    """Change fields of run.json."""
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def scores(root, arch="resnet20"):
    found = load([root])
    (benchmark,) = benchmarks(found.runs, found.stopped)
    return Scores(benchmark, arch)


def fine(value, mae=10.0):
    return {"fine_accuracy": value, "depth_mae": mae}


def column(table, name):
    return {row[0].text: row[table.header.index(name)] for row in table.rows}


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_run_from_before_an_option_was_added_is_under_the_same_protocol(tmp_path):
    """data.eval_batch_size and trainer.stages at their defaults, beside a run that knows neither."""
    old, new = write(tmp_path / "a"), write(tmp_path / "b", "dwa", data__eval_batch_size=500, trainer__stages=[])
    found = load([tmp_path])
    assert [{g.name for g in b.groups} for b in benchmarks(found.runs)] == [{"equal", "dwa"}]
    assert old.parents[1].name == "equal" and new.parents[1].name == "dwa"


def test_unfinished_and_damaged_directories_are_named_and_left_out(tmp_path):
    good = write(tmp_path)
    write(tmp_path, seed=1, status="diverged", error="fine loss became nan")
    write(tmp_path, seed=2, status="running")
    harm = {
        "half a summary": lambda d: (d / "summary.json").write_text('{"epochs": 2'),
        "no summary": lambda d: (d / "summary.json").unlink(),
        "empty run.json": lambda d: (d / "run.json").write_text(""),
        "run.json of another time": lambda d: (d / "run.json").write_text('{"status": "finished"}'),
        "no run.json": lambda d: (d / "run.json").unlink(),
        "half a row": lambda d: (d / "metrics.jsonl").write_bytes((d / "metrics.jsonl").read_bytes()[:-9]),
        "a row too few": lambda d: (d / "metrics.jsonl").write_text((d / "metrics.jsonl").read_text().splitlines()[0]),
        "a garbled row": lambda d: (d / "metrics.jsonl").write_text(
            (d / "metrics.jsonl").read_text().replace('"epoch": 2, ', '"epoch": 2, 7 ')
        ),
        "a word for a number": lambda d: (d / "metrics.jsonl").write_text(
            re.sub(r'("epoch": 2, "[^"]+"): [^,}]+', r'\1: "high"', (d / "metrics.jsonl").read_text())
        ),
        "zeros": lambda d: (d / "metrics.jsonl").write_bytes(bytes(99)),
        "no rows": lambda d: (d / "metrics.jsonl").unlink(),
        "binary": lambda d: (d / "summary.json").write_bytes(b"\xff\xfe\x00"),
        "half a config": lambda d: (d / "config.yaml").write_text("data: {"),
        "a shorter config": lambda d: (d / "config.yaml").write_text((d / "config.yaml").read_text()[:-150]),
        "a summary of other rows": lambda d: (d / "summary.json").write_text(
            re.sub(r'("last": ..test/fine_accuracy": )', r"\g<1>1", (d / "summary.json").read_text())
        ),
        "a list": lambda d: (d / "summary.json").write_text("[1, 2]"),
    }  # fmt: skip
    folders = []
    for seed, act in enumerate(harm.values(), start=10):
        folders.append(write(tmp_path, seed=seed))
        act(folders[-1])
    found = load([tmp_path])
    assert [r.directory for r in found.runs] == [good]
    assert sorted(text for _, text in found.unfinished) == [
        "diverged: fine loss became nan",
        "running since an unknown time",
    ]
    assert {d for d, _ in found.damaged} == set(folders) and all(reason for _, reason in found.damaged)


def test_a_run_is_counted_once_however_often_it_is_found(tmp_path):
    first, second = write(tmp_path / "a", status="running"), write(tmp_path / "b")
    found = load([tmp_path, tmp_path / "b", second])
    assert [r.directory for r in found.runs] == [second] and not found.unfinished
    assert [d for d, _ in found.damaged] == [first]


def test_rows_are_read_and_older_runs_say_what_is_better_by_their_best_epoch(tmp_path):
    folder = write(tmp_path, figures=fine(60.0, 10.0))
    summary = json.loads((folder / "summary.json").read_text())
    del summary["higher_is_better"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (run,) = load([folder]).runs
    assert [row["test/depth_mae"] for row in run.rows] == [10.5, 9.0, 10.0]
    assert run.metrics == HIGHER and run.tasks == {"fine": "fine_accuracy", "depth": "depth_mae"}
    assert [run.value("depth_mae", at) for at in ("last", "best", "selected")] == [10.0, 9.0, 10.5]


# -- sorting ----------------------------------------------------------------------------------------------------------


def test_groups_are_told_apart_by_what_differs_and_baselines_found_by_their_config(tmp_path):
    adam = {"optimizer___target_": "torch.optim.Adam"}
    for seed in (0, 1):
        write(tmp_path, "dwa", seed, loss__temperature=2.0)
        write(tmp_path, "dwa", seed, loss__temperature=1.0)
        write(tmp_path, "equal", seed, data__root=f"elsewhere{seed}", trainer__device=f"cuda:{seed}")
    write(tmp_path, "equal", optimizer__lr=0.01)
    write(tmp_path, "equal", **adam)
    write(tmp_path, "pcgrad", step__gradients="features")
    single = {"loss___target_": "mtl.losses.Single"}
    write(tmp_path, "single", figures={"fine_accuracy": 50.0}, **single, loss__task="fine")
    write(tmp_path, "single", figures={"fine_accuracy": 40.0}, **single, loss__task="fine", **adam)
    write(tmp_path, "single", figures={"depth_mae": 12.0}, **single, loss__task="depth")
    (benchmark,) = benchmarks(load([tmp_path]).runs)
    assert benchmark.name == "cifar100" and benchmark.metrics == HIGHER
    groups = {g.label: g for g in benchmark.groups}
    assert set(groups) == {
        "dwa, temperature 1", "dwa, temperature 2", "equal, sgd, lr 0.1", "equal, sgd, lr 0.01", "equal, adam", "pcgrad"
    }  # fmt: skip
    assert [r.seed for r in groups["dwa, temperature 1"].runs] == [0, 1]
    assert [r.seed for r in groups["equal, sgd, lr 0.1"].runs] == [0, 1]  # root and device decide no figure
    assert groups["equal, adam"].optimizer == "adam"
    assert {b.label for b in benchmark.baselines} == {"single, fine, sgd", "single, fine, adam", "single, depth, sgd"}
    found = {name: benchmark.baseline(g, "fine") for name, g in groups.items()}
    value = {name: b and b.runs[0].value("fine_accuracy") for name, b in found.items()}
    assert value["pcgrad"] == value["dwa, temperature 1"] == 50.0  # the step's switches go with the loss
    assert value["equal, adam"] == 40.0 and value["equal, sgd, lr 0.01"] is None


def test_a_benchmark_is_one_protocol(tmp_path):
    write(tmp_path)
    write(tmp_path, seed=1, data__workers=8, data__val_fraction=0)  # 0 is 0.0
    write(tmp_path, data__limit_train=4000, data__val_fraction=0.1, trainer__epochs=8)
    write(tmp_path, trainer__epochs=8, arch="vgg16_bn")
    names = {b.name: [len(g.runs) for g in b.groups] for b in benchmarks(load([tmp_path]).runs)}
    assert names == {
        "cifar100, val_fraction 0, 3 epochs": [2],
        "cifar100, 3,600 images, val_fraction 0.1, 8 epochs": [1],
        "cifar100, val_fraction 0, 8 epochs": [1],
    }


def test_own_data_of_two_folders_or_two_codes_are_two_benchmarks(tmp_path):
    """Neither is in the class's name: the folder decides the figures, and so does the code that reads it."""
    own = {"data___target_": "my.Data"}
    for root, loss in (("A", "equal"), ("A", "dwa"), ("B", "equal")):
        write(tmp_path / "roots", loss, **own, data__root=str(tmp_path / root))
    names = {b.name: len(b.groups) for b in benchmarks(load([tmp_path / "roots"]).runs)}
    assert {name[-2:]: n for name, n in names.items()} == {"/A": 2, "/B": 1} and all("root" in n for n in names)
    for code, loss in (("11111111", "equal"), ("11111111", "dwa"), ("22222222", "pcgrad")):
        edit(write(tmp_path / "codes", loss, **own), own={"data": {"my": code}, "optimizer": {"opt": "33333333"}})
    names = {b.name: len(b.groups) for b in benchmarks(load([tmp_path / "codes"]).runs)}
    assert names == {"data, my 11111111": 2, "data, my 22222222": 1}


def test_the_baseline_of_other_code_is_no_baseline(tmp_path):
    single = {"loss___target_": "mtl.losses.Single", "loss__task": "fine"}
    own = {"arch": {"net": "11111111"}}
    edit(write(tmp_path, "equal", arch___target_="net.Net"), own=own)
    edit(write(tmp_path, "single", figures={"fine_accuracy": 50.0}, arch___target_="net.Net", **single),
         own={"arch": {"net": "22222222"}})  # fmt: skip
    (benchmark,) = benchmarks(load([tmp_path]).runs)
    assert benchmark.baseline(benchmark.groups[0], "fine") is None
    assert benchmark.archs == ["net, net 11111111", "net, net 22222222"]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_selections_stand_side_by_side_as_mean_and_sample_deviation(tmp_path):
    for seed, value in enumerate([60.0, 62.0, 67.0]):
        write(tmp_path, seed=seed, figures=fine(value))
        write(tmp_path, "dwa", seed, figures=fine(50.0))
    table = summaries.metrics_table(scores(tmp_path))
    cell = column(table, "fine_accuracy\nlast")["equal"]
    assert cell.text == "63.00 ± 3.61" and cell.best
    assert (cell.value, cell.spread) == pytest.approx((63.0, statistics.stdev([60, 62, 67])))
    assert column(table, "fine_accuracy\nbest")["equal"].text == "64.00 ± 3.61"
    assert column(table, "fine_accuracy\nselected")["equal"].text == "62.50 ± 3.61"
    assert column(table, "depth_mae\nbest")["equal"].text == "9.00 ± 0.00"


def test_a_strategy_that_diverged_in_a_seed_does_not_look_better_for_it(tmp_path):
    for seed in range(3):
        write(tmp_path, "equal", seed, figures=fine(60.0 + seed))
        write(tmp_path, "dwa", seed, figures=fine(59.0 + seed, 9.5))
        lucky = {"figures": fine(99.0, 1.0)} if seed else {"status": "diverged", "error": "fine loss became nan"}
        write(tmp_path, "pcgrad", seed, **lucky)
        write(tmp_path, "rlw", seed, status="diverged")
    write(tmp_path, "famo", 0, figures=fine(98.0, 2.0))  # one seed only
    found = scores(tmp_path)
    table = summaries.metrics_table(found)
    assert column(table, "n")["pcgrad"].text == "2, 1 diverged" and column(table, "n")["rlw"].text == "0, 3 diverged"
    accuracy = column(table, "fine_accuracy\nlast")
    assert {label for label, c in accuracy.items() if c.best} == {"equal"} and accuracy["pcgrad"].value == 99.0
    assert "pcgrad, seed 0 diverged" in table.note and "famo (1)" in table.note
    ranks = found.mean_ranks("last")
    # fine: equal 1, dwa 2; depth: dwa 1, equal 2; pcgrad last in both; famo is not ranked
    assert (ranks["equal"], ranks["dwa"], ranks["pcgrad"]) == (1.5, 1.5, 3.0) and math.isnan(ranks["famo"])
    assert found.wins("fine_accuracy", "last") == ({"equal": 1, "dwa": 0, "pcgrad": 2}, 3)
    verdicts = column(summaries.differences(found, "equal", "last"), "verdict")
    assert "pcgrad: 1 of 3 seeds diverged" in verdicts["pcgrad"].text


def test_delta_m_is_paired_by_seed_where_the_baselines_have_it(tmp_path):
    single = {"loss___target_": "mtl.losses.Single"}
    for seed, value in ((0, 50.0), (1, 60.0)):
        write(tmp_path, "single", seed, figures={"fine_accuracy": value}, **single, loss__task="fine")
        write(tmp_path, "single", seed, figures={"depth_mae": 10.0}, **single, loss__task="depth")
    for seed in range(3):
        write(tmp_path, "equal", seed, figures=fine(55.0, 12.0))
    found = scores(tmp_path)
    deltas = found.delta_m(found.groups[0], "last")
    assert deltas == pytest.approx({0: (10 - 20) / 2, 1: (-100 / 12 - 20) / 2, 2: -20 / 2})  # seed 2: the mean is 55
    table = summaries.multi_task(found, "last")
    shares = [column(table, name)["equal"].value for name in ("achievement %\nfine", "achievement %\ndepth")]
    fine_share = (55 / 50 + 55 / 60 + 55 / 55) / 3 * 100
    assert shares == pytest.approx([fine_share, 10 / 12 * 100])
    assert column(table, "achievement %")["equal"].value == pytest.approx((fine_share + 10 / 12 * 100) / 2)
    note = table.note
    assert "same seed (2 runs)" in note and "lacks the seed (1 run)" in note
    assert summaries.baseline_command(found) is None


def test_missing_baselines_are_named_with_their_command(tmp_path):
    write(tmp_path, "dwa", 3)
    command = summaries.baseline_command(scores(tmp_path))
    assert command == "python train.py -m loss=single loss.task=fine,depth optimizer.lr=0.1 seed=3"


def test_differences_are_taken_from_the_reference_with_the_same_config(tmp_path):
    adam = {"optimizer___target_": "torch.optim.Adam"}
    for seed in range(3):
        write(tmp_path, "equal", seed, figures=fine(60.0))
        write(tmp_path, "equal", seed, figures=fine(70.0), **adam)
        write(tmp_path, "dwa", seed, figures=fine(71.0 + seed / 10), **adam)
        write(tmp_path, "pcgrad", seed, figures=fine(71.0), trainer__epochs=3, optimizer__lr=1.0)
    found = scores(tmp_path)
    table = summaries.differences(found, "equal", "last")
    assert {row[0].text for row in table.rows} == {"dwa"} and "pcgrad" in table.note
    assert table.rows[0][3].value == pytest.approx(1.1) and "2 comparisons" in table.note
    against = summaries.differences(found, "equal, sgd", "last")
    assert {row[0].text for row in against.rows} == {"dwa", "equal, adam", "pcgrad"}
    assert {row[3].text for row in against.rows if row[1].text == "fine_accuracy"} == {"+11.10", "+10.00", "+11.00"}


def test_pareto_optimal_runs_are_counted_per_optimizer(tmp_path):
    adam = {"optimizer___target_": "torch.optim.Adam"}
    write(tmp_path, "equal", 0, figures=fine(60.0, 5.0))
    write(tmp_path, "equal", 1, figures=fine(50.0, 9.0))  # dominated by its own kind
    write(tmp_path, "equal", 0, figures=fine(55.0, 8.0), **adam)  # by sgd's
    write(tmp_path, "equal", 1, figures=fine(70.0, 9.0), **adam)
    rows = {row[0].text: [c.value for c in row[1:]] for row in summaries.optimizers(scores(tmp_path), "last").rows}
    assert rows == {"sgd": [2, 1, 1], "adam": [2, 1, 1]}


def test_published_figures_are_marked_and_their_protocol_is_named(tmp_path):
    write(tmp_path, figures={"fine_accuracy": 60.0})
    table = summaries.metrics_table(scores(tmp_path))
    best = column(table, "fine_accuracy\nbest")
    assert best["published, not run here: DWA"].text == "67.81 ± 0.28"  # of 67.96, 67.98, 67.49
    assert not any(c.best for label, c in best.items() if label.startswith("published"))
    assert column(table, "fine_accuracy\nlast")["published, not run here: DWA"].value is None
    assert "trainer.epochs 3 instead of 200" in table.note
    write(tmp_path / "other", arch="resnet32")
    assert not any(
        "published" in label for label in column(summaries.metrics_table(scores(tmp_path / "other", "resnet32")), "n")
    )


def test_a_table_in_four_formats():
    table = Table("Figures of a_b", "5 % & more", ["strategy", "a_b\nlast", "a_b\nbest"],
                  [[Entry("x|y"), Entry("1.23 ± 0.10", 1.2345, True, 0.1), Entry("-0.5", -0.5)],
                   [Entry("z"), Entry("–"), Entry("2", 2)]])  # fmt: skip
    rows = list(csv.reader(table.csv().splitlines()))
    assert rows == [["strategy", "a_b, last", "a_b, last, std", "a_b, best"], ["x|y", "1.2345", "0.1", "-0.5"],
                    ["z", "", "", "2"]]  # fmt: skip
    assert r"| x\|y | **1.23 ± 0.10** | -0.5 |" in table.markdown()
    assert r"x$|$y & \textbf{1.23 $\pm$ 0.10} & $-$0.5 \\" in table.latex()
    assert r"\multicolumn{2}{c}{a\_b}" in table.latex() and r"5 \% \& more" in table.latex()
    lines = table.terminal().splitlines()
    assert len({len(line) for line in lines[1:]}) == 1 and "1.23 ± 0.10*" in lines[4]


# -- command line -----------------------------------------------------------------------------------------------------


def test_the_lines_fit_the_terminal(tmp_path, capsys, monkeypatch):
    """A table that is too wide goes on below, with the columns that tell its rows apart."""
    for loss in ("equal", "dwa"):
        write(tmp_path, loss)
    write(tmp_path, "dwa", data__limit_test=1, data__limit_train=1000, arch="a_network_with_a_long_name")
    monkeypatch.setenv("COLUMNS", "80")
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(tmp_path) not in line and "train.py" not in line]
    assert [line for line in lines if len(line) > 80] == []
    told = lines[next(i for i, line in enumerate(lines) if "differences from equal" in line) :]
    # strategy and metric stand in each part of the table
    assert len([line for line in told if line.startswith("dwa") and "fine_accuracy" in line]) >= 2
    assert "2 runs, commit" in out and "1 test image, " in out and not re.search(" 1 [a-z]+s[ ,.]", out)


def test_the_command_writes_every_table_and_says_so(tmp_path, capsys):
    for seed in range(3):
        for loss in ("equal", "dwa"):
            write(tmp_path, loss, seed)
    write(tmp_path, "dwa", 3, status="failed", error="disk\nfull")
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    files = sorted(p for p in (tmp_path / "report").iterdir())
    assert not err and sorted(line for line in out.splitlines() if line.startswith(str(tmp_path / "report"))) == [
        str(f) for f in files
    ]
    assert "failed: disk full" in out and "3 seeds: too few to tell" in out
    with (tmp_path / "report" / "runs.csv").open() as f:
        assert len(list(csv.DictReader(f))) == 6
    text = (tmp_path / "report" / "report.md").read_text()
    assert len(re.findall("^### ", text, re.M)) == 1 + 2 * 3 + 1  # figures; two tables per selection; what is missing
    assert main([str(tmp_path), "--out", str(tmp_path / "x"), "--format", "tex"]) == 0
    assert {p.suffix for p in (tmp_path / "x").iterdir()} == {".tex"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: no finished run"),
        (["runs", "--reference", "equa"], "--reference equa: no such strategy here; one of equal; did you mean equal?"),
        (["runs", "--format", "docx"], "--format docx: one of csv, md, tex, html"),
        (["runs", "--delta-m", "flatt"], "--delta-m flatt: one of main, flat, task; did you mean flat?"),
        (["broken"], "broken: no finished run; 1 run without a result"),
    ],
)
def test_wrong_commands_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "runs")
    (write(tmp_path / "broken") / "summary.json").unlink()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {message}") and len(err.splitlines()) == 1
    assert not (tmp_path / "runs" / "report").exists()


def test_the_report_needs_no_torch(tmp_path):
    write(tmp_path)
    code = "import sys; from mtl.report.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    assert done.returncode == 0
