"""What Δm is held against (`--baseline`), and each strategy at the rate with the best validation Δm; all by hand."""

import csv
import re

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from test_report import HIGHER, write
from test_report_faults import plotless  # noqa: F401
from test_report_output import SINGLE
from test_select import curves

from mtl.data.celeba import ATTRIBUTES
from mtl.data.qm9 import TARGETS
from mtl.report.__main__ import main
from mtl.report.baselines import published
from mtl.tracking import flatten

TASKS = {"fine": "fine_accuracy", "depth": "depth_mae"}


def alone(root, task, rate, val, test, seed=0, **more):
    """A single-task run of two epochs; the first has a bad validation value and a wonderful test value."""
    metric, bad = TASKS[task], {"fine": 1.0, "depth": 99.0}[task]
    curves(root, "single", seed, {metric: [1000.0 - 10 * bad, test]}, {metric: [bad, val]}, **SINGLE, loss__task=task,
           optimizer__lr=rate, **more)  # fmt: skip


def both(root, loss, rate, val, test, seed=0, **more):
    """A multi-task run of two epochs with these (fine, depth) in the last one; the first has bad validation values."""
    tests = {m: [test[i] + 1, test[i]] for i, m in enumerate(HIGHER)}
    vals = {m: [{True: 1.0, False: 99.0}[HIGHER[m]], val[i]] for i, m in enumerate(HIGHER)}
    curves(root, loss, seed, tests, vals, optimizer__lr=rate, **more)


@pytest.fixture
def study(tmp_path):
    """Rate 0.2 is best for fine on validation data, 0.1 for depth; the test values of the others are better."""
    root = tmp_path / "runs"
    alone(root, "fine", 0.1, val=60.0, test=70.0)
    alone(root, "fine", 0.2, val=65.0, test=50.0)
    alone(root, "depth", 0.1, val=10.0, test=8.0)
    alone(root, "depth", 0.2, val=12.0, test=2.0)
    alone(root, "fine", 0.1, val=90.0, test=100.0, arch="resnet", arch__depth=16)
    both(root, "equal", 0.3, val=(60.0, 10.0), test=(55.0, 4.0), seed=1)
    return root


def run(capsys, root, *options):
    """The console's text on one line, and the report's folder."""
    assert main([str(root), "--format", "csv,md", *options]) == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out), root / "report"


def rows(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def gain(out, arch="resnet20", at="selected"):
    return {r["strategy"]: r["Δm %"] for r in rows(out / f"cifar100-{arch}-multi-task-{at}.csv")}


def test_the_best_single_task_runs_on_validation_data_are_the_baseline_of_all(study, capsys, plotless):  # noqa: F811
    text, out = run(capsys, study)
    assert gain(out) == {"equal": ""}  # none has its rate
    assert not (out / "cifar100-resnet20-baseline.csv").exists()
    text, out = run(capsys, study, "--baseline", "best", "--paper")
    assert float(gain(out)["equal"]) == pytest.approx((10 + 50) / 2)  # against 50 and 8
    assert "fine: single, fine, lr 0.2 on resnet20; depth: single, depth, lr 0.1 on resnet20" in text
    found = {r["metric"]: r for r in rows(out / "cifar100-resnet20-baseline.csv")}
    assert [found[m]["baseline"] for m in HIGHER] == ["50.0", "8.0"]
    assert [found[m]["on validation data"] for m in HIGHER] == ["65.0", "10.0"]
    assert {found[m]["of so many tried"] for m in HIGHER} == {"2"}
    (one,) = (r for r in rows(out / "runs.csv") if r["strategy"] == "equal")
    assert float(one["Δm %"]) == pytest.approx(30) and one["baseline of Δm"].startswith("own single-task runs that all")
    assert float(one["validation Δm %"]) == pytest.approx(100 * (60 / 65 - 1) / 2) and one["metrics of Δm"] == "main"
    for name in ("report.md", "paper.tex"):
        assert "own single-task runs that all strategies share" in (out / name).read_text()


def test_the_best_over_architectures_and_by_what_the_selection_says(study, capsys, plotless):  # noqa: F811
    text, out = run(capsys, study, "--baseline", "best-overall")
    assert float(gain(out)["equal"]) == pytest.approx((-45 + 50) / 2)  # against 100 and 8
    assert "fine: single on resnet; depth: single, depth, lr 0.1 on resnet20" in text
    # In the last epoch of validation data another rate is best than in its best epoch.
    curves(study, "single", 0, {"fine_accuracy": [60.0, 40.0]}, {"fine_accuracy": [99.0, 1.0]}, **SINGLE,
           loss__task="fine", optimizer__lr=0.5)  # fmt: skip
    text, out = run(capsys, study, "--baseline", "best")
    assert float(gain(out)["equal"]) == pytest.approx((100 * (55 / 60 - 1) + 50) / 2)
    text, out = run(capsys, study, "--baseline", "best", "--select", "last")
    assert float(gain(out, at="last")["equal"]) == pytest.approx(30)


def test_of_several_seeds_the_shared_ones_choose_and_the_mean_counts(study, capsys, plotless):  # noqa: F811
    alone(study, "fine", 0.2, val=10.0, test=60.0, seed=1)  # no other rate has seed 1
    _, out = run(capsys, study, "--baseline", "best")
    assert float(gain(out)["equal"]) == pytest.approx((0 + 50) / 2)  # 55 against the mean of 50 and 60


def test_epochs_by_delta_m_against_the_common_baseline(study, capsys, plotless, monkeypatch):  # noqa: F811
    """Epoch 1: (-10 + 40) / 2 against 65 and 10 on validation data; the first task alone would stop at epoch 2."""
    curves(study, "dwa", 0, {"fine_accuracy": [40.0, 60.0], "depth_mae": [4.0, 8.0]},
           {"fine_accuracy": [58.5, 66.0], "depth_mae": [6.0, 12.0]})  # fmt: skip
    text, out = run(capsys, study, "--baseline", "best", "--select", "delta_m")
    assert float(gain(out, at="delta_m")["dwa"]) == pytest.approx((-20 + 50) / 2)
    monkeypatch.chdir(study.parent)
    (study.parent / "alone.csv").write_text("metric,value,remark\nfine_accuracy,100,mine\ndepth_mae,12,\n")
    text, out = run(capsys, study, "--baseline", "alone.csv", "--select", "delta_m")
    # On validation data (-41.5 + 50) / 2 and (-34 + 0) / 2
    assert float(gain(out, at="delta_m")["dwa"]) == pytest.approx((-60 + 100 * 8 / 12) / 2)
    assert "against the constants of alone.csv" in text


def test_each_strategy_stands_at_the_rate_with_the_best_validation_delta_m(study, capsys, plotless):  # noqa: F811
    """Validation Δm of dwa at 0.1, 0.2, 0.4 is 0, 10 and 20 %, but 0.4 diverged in a seed that all have."""
    both(study, "dwa", 0.1, val=(65.0, 10.0), test=(100.0, 1.0))
    both(study, "dwa", 0.2, val=(71.5, 9.0), test=(45.0, 8.0))
    both(study, "dwa", 0.2, val=(2.0, 90.0), test=(55.0, 8.0), seed=1)  # a fresh seed chooses nothing
    write(study, "dwa", 0, figures={}, status="diverged", optimizer__lr=0.4, trainer__epochs=2)
    _, out = run(capsys, study)
    assert not (out / "cifar100-resnet20-tuned.csv").exists()  # each rate has a baseline of its own
    text, out = run(capsys, study, "--baseline", "best")
    found = {r["strategy"].split(",")[0]: r for r in rows(out / "cifar100-resnet20-tuned.csv")}
    row = found["dwa"]
    assert [row[k] for k in ("rate", "rates tried", "with a failed, or diverged run", "n")] == ["0.2", "3", "1", "2"]
    assert float(row["validation, Δm %"]) == pytest.approx(10)
    assert float(row["fine_accuracy"]) == pytest.approx(50) and float(row["Δm %"]) == pytest.approx(0)
    assert found["equal"]["rates tried"] == "1"
    # equal (55, 4) dominates both runs of dwa: no worse in either, better in depth
    assert (row["Pareto"], found["equal"]["Pareto"]) == ("0", "1")
    assert "so the best may lie beyond" not in text


def test_more_than_two_optimizers_are_counted_against_each_other(tmp_path, capsys, plotless):  # noqa: F811
    for optimizer, values in (("SGD", (60.0, 5.0)), ("Adam", (60.0, 4.0)), ("Adagrad", (50.0, 4.5))):
        both(tmp_path, "equal", 0.1, values, values, optimizer___target_=f"torch.optim.{optimizer}")
    _, out = run(capsys, tmp_path)
    found = {r["optimizer"]: r for r in rows(out / "cifar100-resnet20-optimizers-selected.csv")}
    names = [f"not dominated, by {n}" for n in ("adagrad", "adam", "sgd")]
    assert {k: [r[n] for n in names] for k, r in found.items()} == {
        "adam": ["1", "", "1"], "sgd": ["1", "0", ""], "adagrad": ["", "0", "1"]
    }  # fmt: skip


# Nash-MTL's row of linear scalarization on NYUv2, whose Δm they print as 5.59.
LS = {"segmentation_miou": (39.29, True), "segmentation_pixel_accuracy": (65.33, True),
      "depth_abs_err": (0.5493, False), "depth_rel_err": (0.2263, False), "normals_mean": (28.15, False),
      "normals_median": (23.96, False), "normals_11": (22.09, True), "normals_22": (47.50, True),
      "normals_30": (61.08, True)}  # fmt: skip


def dense(root, monkeypatch):
    """A run of one epoch with these values."""
    for metric, (_, higher) in LS.items():
        monkeypatch.setitem(HIGHER, metric, higher)
    values = {m: v for m, (v, _) in LS.items()}
    write(root, "equal", 0, values, arch="segnet_mtan", data__batch_size=2, data___target_="mtl.data.nyuv2.NYUv2",
          arch___target_="mtl.archs.segnet.SegNetMTAN", data__augmented=True)  # fmt: skip


def test_published_constants_with_their_source_and_a_warning(tmp_path, monkeypatch, capsys, plotless):  # noqa: F811
    dense(tmp_path, monkeypatch)
    text, out = run(capsys, tmp_path, "--baseline", "nyuv2_segnet_mtan", "--delta-m", "flat", "--select", "last")
    (row,) = rows(out / "nyuv2-segnet_mtan-multi-task-last.csv")
    assert float(row["Δm %"]) == pytest.approx(-5.59, abs=0.005)
    assert "the published constants nyuv2_segnet_mtan (protocol of CAGrad, Nash-MTL, FAMO, FairGrad; Liu et al." in text
    assert "all metrics alike (flat)" in text
    said = "Not comparable: trainer.epochs 3 instead of 200, --select last instead of last10. Numbers of diff"
    assert said in text
    assert "arch segnet_mtan" not in text and "data.batch_size 2" not in text  # these agree
    (vector,) = (r for r in rows(out / "nyuv2-segnet_mtan-baseline.csv") if r["metric"] == "normals_30")
    assert vector["baseline"] == "69.15" and vector["single-task runs"] == "constant"
    report = (out / "report.md").read_text()
    assert "Numbers of different protocols must not be mixed" in report and "Navon et al." in report


@pytest.mark.parametrize(("options", "message"), [
    (["nyuv2_segnet_mtn"], "nyuv2_segnet_mtn: one of own, best, best-overall, nyuv2_segnet_mtan, "),
    (["bset"], "or a CSV file with the columns metric and value; did you mean best?"),
    (["cityscapes_libmtl"], "not for nyuv2, which is data=nyuv2: these are numbers of data=cityscapes"),
    (["nyuv2_auto_lambda", "--delta-m", "flat"], "as it lacks segmentation_pixel_accuracy; depth_rel_err; "),
    (["best"], "which has no single-task runs: train them with loss=single loss.task=segmentation,depth,normals"),
    (["nope.csv"], "nope.csv: no such file"),
    (["own.csv", "a,b\n"], "the first line lacks the column metric"),
    (["own.csv", "metric,value\nx,1\nx,2\n"], "line 3: x stands there twice"),
    (["own.csv", "metric,value\nx,one\n"], "line 2: x is 'one', must be a number"),
    (["own.csv", "metric,value\nx,inf\n"], "line 2: x is inf, must be a finite number"),
    (["own.csv", "metric,value\nx\n"], "line 2: x is '', must be a number"),
    (["own.csv", "metric,value\nsegmentation_miou,0\ndepth_abs_err,1\nnormals_mean,1\n"], "segmentation_miou is 0"),
    (["own.csv", "\xff\xfe"], "is no CSV file in UTF-8"),
])  # fmt: skip
def test_a_baseline_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    dense(tmp_path / "runs", monkeypatch)
    name, *more = options
    if name == "own.csv":
        (tmp_path / name).write_bytes(more.pop().encode("latin-1"))
    assert main(["runs", "--baseline", name, *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --baseline {name}: ") and message in err and err.count("\n") == 1, err


def test_a_benchmark_that_cannot_have_it_keeps_its_own_runs(study, capsys, plotless):  # noqa: F811
    """Two protocols in one folder; of the second one there are no single-task runs."""
    both(study, "equal", 0.3, val=(60.0, 10.0), test=(55.0, 4.0), trainer__precision="bf16")
    text, _ = run(capsys, study, "--baseline", "best")
    assert "--baseline best: not for cifar100, precision bf16, which has no single-task runs" in text
    assert "own stands there" in text and "single, fine, lr 0.2 on resnet20" in text


def test_without_validation_data_nothing_is_best(tmp_path, capsys, monkeypatch):
    for task, metric in TASKS.items():
        write(tmp_path, "single", 0, {metric: 50.0}, **SINGLE, loss__task=task)
    write(tmp_path, "equal", 0)
    assert main([str(tmp_path), "--baseline", "best"]) == 2
    assert "whose single-task runs of fine have no validation data (data.val_fraction)" in capsys.readouterr().err


def test_the_shipped_constants_fit_the_presets_and_our_metrics():
    """The warning about another protocol is silent for the preset of the constants' own protocol."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for name, preset in {"nyuv2_segnet_mtan": "nyuv2", "nyuv2_paradigms_segnet": "nyuv2_paradigms",
                             "nyuv2_libmtl": "nyuv2_libmtl", "cityscapes_segnet_mtan": "cityscapes",
                             "celeba_cnn": "celeba", "qm9_nash_mtl": "qm9"}.items():  # fmt: skip
            config = compose("config", [f"experiment={preset}"], return_hydra_config=True)
            flat = flatten(OmegaConf.to_container(config)) | {"arch": config.hydra.runtime.choices["arch"]}
            settings = {k: v for k, v in published()[name].settings.items() if not k.startswith("--")}
            assert {k: flat.get(k) for k in settings} == settings, name
            assert published()[name].data == config.hydra.runtime.choices["data"]
    assert list(published()["celeba_cnn"].values) == [f"{a}_f1" for a in ATTRIBUTES]
    for name in ("qm9_nash_mtl", "qm9_ntkmtl", "qm9_libmtl"):
        assert list(published()[name].values) == [f"{t}_mae" for t in TARGETS]
    assert list(published()["qm9_nash_mtl"].values.values()) == pytest.approx(list(config.schedule.baselines))


def test_a_run_without_a_validation_delta_m_has_no_epoch_instead_of_the_first(study, capsys, plotless):  # noqa: F811
    nothing = [None, None]
    curves(study, "dwa", 0, {"fine_accuracy": [90.0, 91.0], "depth_mae": [1.0, 1.0]},
           {"fine_accuracy": [58.5, 66.0], "depth_mae": nothing})  # fmt: skip
    _, out = run(capsys, study, "--baseline", "best", "--select", "delta_m")
    assert gain(out, at="delta_m")["dwa"] == "" and gain(out, at="delta_m")["equal"] != ""


def test_a_baseline_of_0_is_named_where_it_takes_delta_m_away(tmp_path, capsys, plotless):  # noqa: F811
    """Such as the F1 of a rare attribute: no gain is relative to 0."""
    for task, test in (("fine", 0.0), ("depth", 8.0)):
        alone(tmp_path, task, 0.1, val=60.0, test=test)
    both(tmp_path, "equal", 0.1, val=(60.0, 10.0), test=(55.0, 4.0))
    text, out = run(capsys, tmp_path)
    assert gain(out) == {"equal": ""}
    assert "No Δm where a baseline is 0: fine_accuracy. Achievement takes" in text
