"""Which epochs stand for a run on request: the mean of the last ten, and early stopping by Δm on validation data."""

import csv
import json

import numpy as np
import pytest
from test_report import HIGHER, write
from test_report_faults import plotless  # noqa: F401
from test_report_output import SINGLE

from mtl.report.__main__ import main

EPOCHS = 12


def curves(root, loss, seed, tests, vals, **changes):
    """A run with these values in its epochs: {metric: (E,)} on test and on validation data."""
    main_, *_ = tests
    epochs = len(tests[main_])
    folder = write(root, loss, seed, figures={m: 0.0 for m in tests}, trainer__epochs=epochs, **changes)
    signs = {m: 1 if HIGHER[m] else -1 for m in tests}
    chosen = int(np.argmax(signs[main_] * np.asarray(vals[main_])))
    rows = [
        {"epoch": e + 1, **{f"test/{m.partition('_')[0]}_loss": 1.0 for m in tests},
         **{f"test/{m}": tests[m][e] for m in tests}, **{f"val/{m}": vals[m][e] for m in tests}}
        for e in range(epochs)
    ]  # fmt: skip
    best = {m: int(np.argmax(signs[m] * np.asarray(tests[m]))) for m in tests}
    summary = {
        "epochs": epochs, "last": {f"test/{m}": tests[m][-1] for m in tests},
        "best": {f"test/{m}": {"value": tests[m][e], "epoch": e + 1} for m, e in best.items()},
        "higher_is_better": {f"test/{m}": HIGHER[m] for m in tests},
        "selected": {"by": f"val/{main_}", "epoch": chosen + 1, **{f"test/{m}": tests[m][chosen] for m in tests}},
    }  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of two strategies, and single-task runs; the values of each epoch are random."""
    draw, known = np.random.default_rng(0), {}
    for seed in (0, 1):
        for loss in ("equal", "dwa"):
            known[loss, seed] = [
                {
                    "fine_accuracy": draw.uniform(50, 70, EPOCHS).tolist(),
                    "depth_mae": draw.uniform(5, 15, EPOCHS).tolist(),
                }
                for _ in range(2)
            ]
            curves(tmp_path / "runs", loss, seed, *known[loss, seed])
        for metric in HIGHER:
            known[metric, seed] = [{metric: draw.uniform(8, 70, EPOCHS).tolist()} for _ in range(2)]
            task = metric.partition("_")[0]
            curves(tmp_path / "runs", "single", seed, *known[metric, seed], **SINGLE, loss__task=task)
    return tmp_path / "runs", known


def rows(folder):
    with (folder / "report/runs.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_mean_of_the_last_ten_epochs(runs, capsys, plotless):  # noqa: F811
    folder, known = runs
    assert main([str(folder), "--select", "last10", "--paper"]) == 0
    for row in rows(folder):
        if row["strategy"] != "single, fine" and row["strategy"] != "single, depth":
            (tests, _) = known[row["strategy"], int(row["seed"])]
            assert float(row["depth_mae, last10"]) == pytest.approx(np.mean(tests["depth_mae"][2:]))
            assert float(row["depth_mae, last"]) == pytest.approx(tests["depth_mae"][-1])
    wanted = np.mean([np.mean(known["dwa", seed][0]["fine_accuracy"][2:]) for seed in (0, 1)])
    text = (folder / "report/paper.tex").read_text()
    assert "mean of the last ten epochs" in text and f"{wanted:.2f}" in text
    assert "last10: The mean of the values of the last ten epochs." in capsys.readouterr().out


def test_stopping_by_delta_m_on_validation_data(runs, capsys, plotless):  # noqa: F811
    """By hand: the best epoch of the mean gain over what single-task learning has on validation data when it stops."""
    folder, known = runs
    assert main([str(folder), "--select", "delta_m"]) == 0
    for row in rows(folder):
        if row["strategy"] in ("equal", "dwa"):
            seed = int(row["seed"])
            tests, vals = known[row["strategy"], seed]
            top, low = (
                max(known["fine_accuracy", seed][1]["fine_accuracy"]),
                min(known["depth_mae", seed][1]["depth_mae"]),
            )
            gains = (np.array(vals["fine_accuracy"]) / top - 1) - (np.array(vals["depth_mae"]) / low - 1)
            assert float(row["fine_accuracy, delta_m"]) == pytest.approx(tests["fine_accuracy"][gains.argmax()])
            assert float(row["depth_mae, delta_m"]) == pytest.approx(tests["depth_mae"][gains.argmax()])
    assert "chosen by Δm on validation data" in capsys.readouterr().out


@pytest.mark.parametrize("rule, message", [
    ("last10", "not of cifar100, which has runs of 3 epochs; 10 or more are needed"),
    ("delta_m", "not of cifar100, which lacks single-task runs with the config of equal (study.baselines=auto)"),
    ("last01", "one of last, best, selected, last10, delta_m; did you mean last10?"),
])  # fmt: skip
def test_a_rule_that_cannot_be_is_one_line(tmp_path, capsys, rule, message):
    write(tmp_path, "equal")
    assert main([str(tmp_path), "--select", rule]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --select {rule}: {message}") and err.count("\n") == 1, err
