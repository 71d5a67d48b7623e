"""The report's output: files that add up, many tasks, running runs, and what it says first."""

import csv
import io
import json
import math
import re
import shutil
import time

import pytest
from test_report import column, fine, scores
from test_report import write as write_selected
from test_report_faults import plotless  # noqa: F401
from tree import write_run

from mtl.report import __main__ as command
from mtl.report import summaries
from mtl.report.__main__ import main
from mtl.report.figures import page, per_run
from mtl.report.findings import findings
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.report.scores import Scores
from mtl.report.tables import Entry, Table

SINGLE = {"loss___target_": "mtl.losses.Single"}


def write(root, loss="equal", seed=0, **more):
    """A run without validation data, so that its last epoch is what counts."""
    folder = write_selected(root, loss, seed, **more)
    if (file := folder / "summary.json").exists():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"selected": None}))
    return folder


def baselines(root, seeds=(0, 1, 2), accuracy=60.0, error=10.0):
    for seed in seeds:
        write(root, "single", seed, figures={"fine_accuracy": accuracy}, **SINGLE, loss__task="fine")
        write(root, "single", seed, figures={"depth_mae": error}, **SINGLE, loss__task="depth")


def say(root):
    """What the box on top of the page says."""
    found = load([root])
    (benchmark,) = benchmarks(found.runs, found.stopped)
    return " ".join(findings(Scores(benchmark, benchmark.archs[0]), "equal"))


# -- files ------------------------------------------------------------------------------------------------------------


def test_figures_come_in_addition_to_tables_and_all_formats_of_a_folder_stay_up_to_date(tmp_path, plotless):  # noqa: F811
    out = tmp_path / "report"
    write(tmp_path / "runs", "equal", figures=fine(60.0))
    assert main([str(tmp_path / "runs"), "--out", str(out), "--format", "svg"]) == 0
    assert {f.suffix for f in out.iterdir()} == {".csv", ".tex", ".md", ".html", ".svg"}
    write(tmp_path / "runs", "dwa", figures=fine(61.0))
    (curves,) = out.glob("*-learning-curves.svg")
    before = curves.read_text()
    assert main([str(tmp_path / "runs"), "--out", str(out), "--format", "csv"]) == 0
    for name in ("report.md", "report.html", "runs.csv", "cifar100-resnet20-figures.tex"):
        assert "dwa" in (out / name).read_text(), name
    assert curves.read_text() != before


def test_what_an_earlier_report_left_goes_and_what_is_not_the_reports_stays(tmp_path, plotless):  # noqa: F811
    runs, out = tmp_path / "runs", tmp_path / "report"
    for seed in range(2):
        write(runs, "equal", seed)
    gone = write(runs, "dwa", 0, trainer__epochs=3, arch="vgg")
    write(runs, "dwa", 1, arch="vgg", status="failed", error="x")
    assert main([str(runs), "--out", str(out), "--format", "svg"]) == 0
    mine = {"my-figures.csv": "a,b\n1,2\n", "old-cost.svg": "<svg/>", "runs.tex": "mine", "notes.txt": "n"}
    for name, text in mine.items():
        (out / name).write_text(text)
    assert any("vgg" in f.name for f in out.iterdir()) and (out / "missing.csv").exists()
    for folder in gone.parent.iterdir():
        shutil.rmtree(folder)
    assert main([str(runs), "--out", str(out)]) == 0
    assert not [f.name for f in out.iterdir() if "vgg" in f.name] and not (out / "missing.csv").exists()
    assert {name: (out / name).read_text() for name in mine} == mine
    assert list(out.glob("cifar100-resnet20-*.svg"))


def test_a_column_of_numbers_holds_numbers_or_nothing(tmp_path, plotless):  # noqa: F811
    for seed, value in enumerate((60.1, 99.7, 61.3)):
        write(tmp_path, "equal", seed, figures=fine(value))
    write(tmp_path, "dwa", 0, figures=fine(0.1 + 0.2))
    write(tmp_path, "pcgrad", 0, figures=fine(math.nan, math.inf))
    write(tmp_path, "rlw", 0, status="diverged")
    write(tmp_path, "single", 0, figures={"fine_accuracy": 50.0}, **SINGLE, loss__task="fine")
    assert main([str(tmp_path)]) == 0
    words = {"benchmark", "arch", "strategy", "optimizer", "metric", "verdict", "seeds, better:worse", "commit",
             "dirty", "directory", "reason"}  # fmt: skip
    for file in (tmp_path / "report").glob("*.csv"):
        for row in csv.DictReader(file.open()):
            for name, cell in row.items():
                if name not in words and cell:
                    assert math.isfinite(float(cell)), (file.name, name, cell)
                    assert len(cell.lstrip("-").replace(".", "").lstrip("0")) <= 12, (file.name, name, cell)
    table = Table("", "", ["s", "x"], [[Entry("a"), Entry("99.7", 99.69999999999999)], [Entry("b"), Entry("–")]])
    assert table.csv() == "s,x\na,99.7\nb,\n"


def test_a_part_that_fails_is_one_line_everywhere_and_a_traceback_in_a_file(tmp_path, capsys, plotless, monkeypatch):  # noqa: F811
    write(tmp_path / "runs")
    write(tmp_path / "runs", "dwa")
    monkeypatch.setattr(per_run, "pareto", lambda benchmark: {}["front"])
    monkeypatch.setattr(summaries, "optimizers", lambda scores, at: 1 / 0)
    monkeypatch.setattr(command, "findings", lambda scores, reference: [][0])
    monkeypatch.setattr(page, "_lede", lambda *arguments: 1 / 0)
    assert main([str(tmp_path / "runs")]) == 1
    err = capsys.readouterr().err.splitlines()
    errors = tmp_path / "runs/report/report-errors.txt"
    assert err[-1] == f"the tracebacks are in {errors}" and "Traceback" not in "".join(err)
    assert sum(line.startswith("error: not made: ") for line in err) == len(err) - 1 >= 4
    assert errors.read_text().count("Traceback (most recent call last)") == len(err) - 1
    text = (tmp_path / "runs/report/report.html").read_text()
    assert text.count("Not made: ") == len(err) - 1 and "KeyError" in text and "Learning curves" in text
    monkeypatch.undo()
    assert main([str(tmp_path / "runs"), "--format", "csv"]) == 0 and not errors.exists()


# -- many tasks -------------------------------------------------------------------------------------------------------


def crowd(root, tasks=40, losses=("equal", "dwa", "pcgrad"), seeds=range(3)):
    """Runs on so many tasks, task t at 50 + t + seed, each strategy one better than the one before; baselines at 51."""
    names = [f"attribute_{t:02}" for t in range(tasks)]

    def add(loss, seed, values, **more):
        curves = {f"test/{t}_accuracy": [v - 5, v] for t, v in values.items()}
        curves |= {f"weights/{t}": [1.0, 1.0 + i] for i, t in enumerate(values)}
        folder = write_run(root, loss, seed, curves, higher={f"{t}_accuracy": True for t in values}, **more)
        file = folder / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": {t: [f"{t}_accuracy"] for t in values}}))

    for i, loss in enumerate(losses):
        for seed in seeds:
            add(loss, seed, {t: 50.0 + k + i + seed for k, t in enumerate(names)})
    for k, name in enumerate(names):
        add("single", 0, {name: 51.0 + k}, task=name, digest=f"{k:08}")


def test_many_tasks_are_shown_as_mean_best_and_worst_and_compared_in_the_mean(tmp_path, capsys, plotless):  # noqa: F811
    crowd(tmp_path / "runs")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 150
    found = load([tmp_path / "runs"])
    (benchmark,) = benchmarks(found.runs)
    of = Scores(benchmark, "resnet20")
    table = summaries.metrics_table(of)
    cells = column(table, "mean accuracy of 40 tasks\nlast")  # 50 + 19.5 + 1 of seeds 0, 1, 2
    assert (cells["equal"].value, cells["dwa"].value, cells["pcgrad"].value) == pytest.approx((70.5, 71.5, 72.5))
    assert cells["equal"].spread == pytest.approx(1.0) and cells["pcgrad"].best
    assert [cells[k].beats for k in ("equal", "dwa", "pcgrad")] == [False, True, True]
    assert cells["single-task (40 networks)"].value == pytest.approx(70.5)
    assert column(table, "worst task's accuracy\nlast")["equal"].text == "51.00 attribute_00"
    assert column(table, "best task's accuracy\nlast")["equal"].text == "90.00 attribute_39"
    rows = summaries.differences(of, "equal", "last").rows
    assert [(r[0].text, r[1].text, r[3].value) for r in rows] == [
        ("pcgrad", "mean accuracy of 40 tasks", pytest.approx(2.0)),
        ("dwa", "mean accuracy of 40 tasks", pytest.approx(1.0)),
    ]
    with (tmp_path / "out/synthetic-resnet20-tasks-last.csv").open() as f:
        each = {row["metric"]: row for row in csv.DictReader(f)}
    assert len(each) == 40 and float(each["attribute_07_accuracy"]["dwa"]) == pytest.approx(59.0)
    assert float(each["attribute_07_accuracy"]["single-task"]) == pytest.approx(58.0)
    figures = {f.name: f for f in per_run.figures(benchmark)["resnet20"]}
    mean, worst = figures["learning-curves"].panels
    assert {t.label: t.y for t in mean.traces}["equal"] == pytest.approx([65.5, 70.5])
    assert {t.label: t.y for t in worst.traces}["equal"] == pytest.approx([46.0, 51.0])
    assert len(figures["weights"].panels) == 3 and len(figures["parallel-coordinates"].panels[0].ticks) == 2
    assert sum(len(f.panels) for f in figures.values()) <= 20


def test_six_tasks_have_a_column_each(tmp_path):
    crowd(tmp_path, tasks=6)
    table = summaries.metrics_table(Scores(benchmarks(load([tmp_path]).runs)[0], "resnet20"))
    assert "attribute_05_accuracy\nlast" in table.header and not any("mean" in h for h in table.header)


# -- single-task baselines --------------------------------------------------------------------------------------------


def test_baselines_stand_in_the_order_of_the_tasks_and_cells_that_beat_them_are_marked(tmp_path):
    for seed in range(3):
        write(tmp_path, "equal", seed, figures=fine(59.0, 9.0))
        write(tmp_path, "dwa", seed, figures=fine(61.0, 11.0))
    baselines(tmp_path)
    table = summaries.metrics_table(scores(tmp_path))
    labels = [row[0].text for row in table.rows]
    assert [label for label in labels if label.startswith("single")] == ["single, fine", "single, depth"]
    cells = column(table, "fine_accuracy\nlast"), column(table, "depth_mae\nlast")
    assert [[c[k].beats for k in ("equal", "dwa")] for c in cells] == [[False, True], [True, False]]
    assert "61.00 ± 0.00*†" in table.terminal() and "**61.00 ± 0.00**†" in table.markdown()
    assert r"\textbf{61.00 $\pm$ 0.00}$\dagger$" in table.latex() and "†" not in table.csv()
    assert {"*", "†"} <= set(table.terms)


# -- what the runs show -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([-0.01, 3.0], ["By Δm, dwa is the best of 2 strategies (+2.50 %); 1 of them is better than single-task",
                      "Its lead over equal holds under the paired t test"]),
        ([0.0, 0.1], ["Its lead over equal does not hold under", "(3 seeds, too few to tell)"]),
        ([-9.0, -5.0], ["dwa is the best of 2 strategies (−4.17 %); no strategy is better than single-task learning"]),
    ],
)  # fmt: skip
def test_the_box_says_who_leads_by_how_much_and_whether_that_holds(tmp_path, gains, said):
    for seed in range(3):
        for loss, gain in zip(("equal", "dwa"), gains, strict=True):
            noise = (0.3 if gains[1] == 0.1 else 0.003) * (seed - 1) * (loss == "dwa")
            write(tmp_path, loss, seed, figures=fine(60.0 + gain + noise, 10.0))
    baselines(tmp_path)
    text = say(tmp_path)
    for part in said:
        part = (
            re.sub(r"\(\+2\.52 %\)", "(+2.50 %)", part).replace("−4.14", "−4.17").replace("all 1 others", "the other")
        )
        assert part in text, text
    assert text.endswith("No run is missing; 3 seeds are few, and only a large difference can be told from chance.")


def test_the_box_says_what_is_missing(tmp_path):
    for seed in range(5):
        write(tmp_path, "equal", seed, figures=fine(60.0 + seed / 10))
        write(tmp_path, "dwa", seed, figures=fine(70.0 + seed / 11))
    write(tmp_path, "pcgrad", 0, figures=fine(99.0, 1.0))
    write(tmp_path, "pcgrad", 1, status="diverged")
    text = say(tmp_path)
    assert text.startswith("By mean rank over the metrics, dwa is the best of 2 strategies")
    assert "1 of 4 differences from equal hold under the paired t test with Holm's correction (dwa)" in text
    assert "Missing: single-task baselines, so there is no Δm; 1 run that diverged; seeds of pcgrad" in text
    assert text.endswith("every comparison rests on 5 seeds.")


def test_the_box_stands_on_the_page_in_the_markdown_and_on_the_console(tmp_path, capsys, plotless):  # noqa: F811
    write(tmp_path, "equal")
    write(tmp_path, "dwa")
    assert main([str(tmp_path)]) == 0
    said = "one seed is few, and no difference can be told from chance"
    assert said in " ".join(capsys.readouterr().out.split())
    html = (tmp_path / "report/report.html").read_text()
    assert html.index('id="findings"') < html.index("Table 1") and said in html
    assert said in (tmp_path / "report/report.md").read_text()


# -- running runs -----------------------------------------------------------------------------------------------------


def running(root, loss, seed, epochs, **more):
    """A run that has come so far, with a row that is being written."""
    folder = write_run(
        root, loss, seed, {"test/a_accuracy": [float(e) for e in range(1, 11)]}, status="running", **more
    )
    (folder / "summary.json").unlink()
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(rows[:epochs]) + '\n{"epoch": 9, "te')
    return folder


def test_running_runs_have_their_curves_and_no_place_in_a_table(tmp_path, plotless):  # noqa: F811
    for seed in (0, 1):
        write_run(tmp_path / "runs", "equal", seed, {"test/a_accuracy": [1.0 + seed] * 10})
    running(tmp_path / "runs", "equal", 2, 4)
    running(tmp_path / "runs", "famo", 0, 6)
    found = load([tmp_path / "runs"])
    assert not found.damaged and len(found.runs) == 2
    (benchmark,) = benchmarks(found.runs, found.stopped)
    curves = next(f for f in per_run.figures(benchmark)["resnet20"] if f.name == "learning-curves")
    (panel,) = curves.panels
    shown = {
        (t.label, t.unfinished): (list(t.x), list(t.y), list(t.values[0]) if len(t.values) else None)
        for t in panel.traces
    }
    assert shown["equal", True] == ([1, 2, 3, 4], [1, 2, 3, 4], ["4 of 10 epochs"])
    assert shown["famo", True] == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], ["6 of 10 epochs"])
    assert shown["equal", False][1] == [1.5] * 10
    assert "have not finished: equal (seed 2), famo (seed 0)" in curves.caption
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    with (tmp_path / "out/runs.csv").open() as f:
        assert [row["strategy"] for row in csv.DictReader(f)] == ["equal", "equal"]
    assert "famo" in (tmp_path / "out/report.html").read_text()


def test_before_any_run_has_finished_there_is_a_report_of_curves(tmp_path, capsys, plotless):  # noqa: F811
    running(tmp_path / "runs", "equal", 0, 3)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", "svg", "--paper"]) == 0
    out, err = capsys.readouterr()
    assert not err and "No run has finished yet (1 running)." in out
    html = (tmp_path / "out/report.html").read_text()
    assert "There are no finished runs." in html and "Learning curves" in html
    assert list((tmp_path / "out").glob("*-learning-curves.svg"))


def test_watch_rebuilds_when_a_run_has_written_and_only_then(tmp_path, capsys, plotless, monkeypatch):  # noqa: F811
    root, out = tmp_path / "runs", tmp_path / "out"
    folder, seen = None, []

    def sleep(seconds):
        nonlocal folder
        seen.append((out / "report.html").read_text() if (out / "report.html").exists() else "")
        if len(seen) == 1:
            folder = running(root, "equal", 0, 3)
        elif len(seen) == 3:  # at the second nothing has changed
            rows = (folder / "metrics.jsonl").read_text().splitlines()[:3]
            row = json.dumps(json.loads(rows[0]) | {"epoch": 4})
            (folder / "metrics.jsonl").write_text("\n".join([*rows, row]) + "\n")
        elif len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main([str(root), "--out", str(out), "--watch", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\d\d:", line)]
    assert [line.split("  ", 1)[1] for line in lines] == [
        f"{root}: no such folder yet", *[f"0 finished, 1 running: {out / 'report.html'}"] * 2
    ]  # fmt: skip
    assert seen[0] == "" and "3 of 10 epochs" in seen[1] and seen[2] == seen[1] and "4 of 10 epochs" in seen[3]
    assert '<meta http-equiv="refresh" content="3">' in seen[1]


@pytest.mark.parametrize("value", ["0", "-1", "often", "inf", "nan"])
def test_watch_takes_a_positive_number(value, capsys):
    with pytest.raises(SystemExit):
        main(["--watch", value])
    assert f"argument --watch: invalid seconds value: '{value}'" in capsys.readouterr().err


# -- axes -------------------------------------------------------------------------------------------------------------


def test_the_first_epochs_do_not_own_the_scale(tmp_path):
    slow = [900.0, 300.0, 40.0, 3.0, *[0.3 - i / 1000 for i in range(16)]]
    for loss, more in (("equal", 0.0), ("dwa", 0.02)):
        curves = {"test/a_mae": [v + more for v in slow], "test/b_accuracy": [50.0 + i for i in range(20)]}
        write_run(tmp_path, loss, 0, curves, higher={"a_mae": False, "b_accuracy": True})
    (benchmark,) = benchmarks(load([tmp_path]).runs)
    figure = next(f for f in per_run.figures(benchmark)["resnet20"] if f.name == "learning-curves")
    first, second = figure.panels
    low, high = first.limits
    assert 0.2 < low < 0.285 and 0.32 <= high < 0.5 and second.limits is None
    assert "leaves out values of the first epochs: a mae" in figure.caption


# -- two definitions of Δm --------------------------------------------------------------------------------------------


def test_delta_m_of_several_metrics_is_flat_or_by_task_and_the_report_says_which(tmp_path, capsys, plotless):  # noqa: F811
    higher = {"seg_miou": True, "depth_err": False, "depth_rel": False}
    tasks = {"seg": ["seg_miou"], "depth": ["depth_err", "depth_rel"]}

    def add(loss, values, **more):
        own = {m: v for m, v in values.items()}
        folder = write_run(tmp_path / "runs", loss, 0, {f"test/{m}": [v] for m, v in own.items()},
                           higher={m: higher[m] for m in own}, **more)  # fmt: skip
        file = folder / "summary.json"
        mine = {t: m for t, ms in tasks.items() if (m := [x for x in ms if x in own])}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": mine}))

    add("equal", {"seg_miou": 55.0, "depth_err": 8.0, "depth_rel": 5.0})
    add("single", {"seg_miou": 50.0}, task="seg", digest="1")
    add("single", {"depth_err": 10.0, "depth_rel": 4.0}, task="depth", digest="2")
    # gains: +10 %, +20 %, −25 %
    for name, value, words in (("main", 15.0, "main metric of each task"), ("flat", 5 / 3, "all metrics alike (flat)"),
                               ("task", 3.75, "metrics (by task)")):  # fmt: skip
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--delta-m", name]) == 0
        assert words in " ".join(capsys.readouterr().out.split())
        text = (tmp_path / "out/synthetic-resnet20-multi-task-last.csv").read_text()
        (row,) = csv.DictReader(io.StringIO(text))
        assert float(row["Δm %"]) == pytest.approx(value)


def test_a_table_of_many_metrics_has_a_row_for_each_in_the_terminal():
    """13 metrics in three selections of two strategies: 39 columns side by side would be 900 characters wide."""
    names = [f"rooms_segmentation_metric_{i}" for i in range(13)]
    header = ["strategy", "n", *(f"{name}\n{at}" for name in names for at in ("last", "best", "selected"))]
    rows = [[Entry(label), Entry("3", 3), *(Entry(f"{i + k}.5", i + k, k == 1) for i in range(39))]
            for k, label in enumerate(["equal", "nash_mtl"])]  # fmt: skip
    lines = Table("title", "", header, rows).fitted(120).split("\n")
    assert max(map(len, lines)) <= 120 and len(lines) == 3 + 1 + 39
    assert [line.split() for line in lines[1:6:2]] == [["metric", "equal", "nash_mtl"], ["n", "3", "3"],
                                                       ["best", "1.5", "2.5*"]]  # fmt: skip
    assert [line.split()[0] for line in lines[4::3]] == names  # each said once
    # Single tasks have no metric in common, so one column holds them. Two of one task stay apart.
    alone = [[Entry(f"single, {task}"), Entry("3", 3), *(Entry("7" if i % 13 == k else "–") for i in range(39))]
             for k, task in enumerate(["depth", "normals"])]  # fmt: skip
    lines = Table("title", "", header, [*rows, *alone]).fitted(120).split("\n")
    assert lines[1].split() == ["metric", "equal", "nash_mtl", "single", "tasks"]
    assert [line.split()[-1] for line in lines[3:7]] == ["3", "7", "7", "–"]
    lines = Table("title", "", header, [*rows, *alone, alone[0][:2] + [Entry("8")] * 39]).fitted(120).split("\n")
    assert "single tasks" not in lines[1]
    # More strategies than columns keep their rows. Too many columns of strategies go on below.
    few = Table("title", "", header[:3], [[Entry(f"s{k}"), *row[1:3]] for k in range(9) for row in rows[:1]])
    assert few.fitted(20).split("\n")[4].startswith("s0")
    lines = Table("title", "", header, [[Entry(f"strategy {k}"), *rows[0][1:]] for k in range(30)]).fitted(120)
    assert max(map(len, lines.split("\n"))) <= 120 and lines.count(names[7]) == lines.count("metric  ") > 3
