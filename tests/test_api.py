"""Runs from Python (`mtl.train`, `mtl.grid`), trained ones in use (`mtl.load`, `mtl.evaluate`), and `python -m mtl`."""

import csv
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import shipped
import torch
import yaml
from conftest import ROOT
from golden.problems import Net
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

import mtl
from mtl.__main__ import COMMANDS
from mtl.__main__ import main as overview
from mtl.errors import ConfigError, Diverged, SetupError, UserError
from mtl.evaluate import evaluate
from mtl.evaluate import main as evaluation

SMALL = ("data=digits", "data.limit_train=64", "data.limit_test=48", "data.batch_size=32", "logger=none",
         "trainer.device=cpu", "arch._target_=golden.problems.Net", "~arch.depth")  # fmt: skip
MODEL_LESS = ("run.json", "config.yaml", "summary.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of four epochs, whose best epoch need not be its last."""
    root = tmp_path_factory.mktemp("trained")
    return mtl.train(*SMALL, "loss=rotograd", "trainer.epochs=4", "optimizer.lr=0.3", seed=1, output_root=root)


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(trained.directory, tmp_path / "copy"))


# -- mtl.train and mtl.grid -------------------------------------------------------------------------------------------


def test_a_call_is_the_run_of_the_command(trained, cli, tmp_path):
    words = (*SMALL, "loss=rotograd", "trainer.epochs=4", "optimizer.lr=0.3", "seed=1")
    assert cli(*words, "output_root=other").code == 0
    (folder,) = (tmp_path / "other").rglob("seed1")
    assert trained.status == "finished" and trained.directory.parts[-5:] == folder.parts[-5:]
    assert torch.equal(
        mtl.load(folder).model.backbone.wide.weight, mtl.load(trained.directory).model.backbone.wide.weight
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(trained.rows) == 4
    for ours, theirs in zip(trained.rows, rows, strict=True):
        assert all(ours[key] == theirs[key] for key in ours if not key.startswith("time/"))
    last = {key: trained.rows[-1][key] for key in ("test/digit_accuracy", "test/odd_accuracy", "test/ink_mae")}
    assert trained.summary["last"] == last
    assert "epoch 4/4" in (trained.directory / "train.log").read_text()


def test_a_finished_run_is_found_and_an_interrupted_one_goes_on(trained, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("trained again")

    root = trained.directory.parents[4]
    options = {"optimizer": {"lr": 0.3}, "seed": 1, "output_root": root}
    with monkeypatch.context() as patch:
        patch.setattr("mtl.engine.learner.Learner.train_epoch", never)
        assert mtl.train(*SMALL, "loss=rotograd", **options, **{"trainer.epochs": 4}) == trained
    step, seen = mtl.engine.learner.Learner.train_epoch, []

    def stopped(self, batches, epoch):
        if epoch == 2 and not seen:
            seen.append(epoch)
            raise KeyboardInterrupt
        return step(self, batches, epoch)

    options["output_root"] = tmp_path
    monkeypatch.setattr("mtl.engine.learner.Learner.train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        mtl.train(*SMALL, "loss=rotograd", "trainer.epochs=4", **options)
    again = mtl.train(*SMALL, "loss=rotograd", "trainer.epochs=4", **options)
    assert [row["test/ink_mae"] for row in again.rows] == [row["test/ink_mae"] for row in trained.rows]


def test_nothing_of_the_process_is_changed(tmp_path):
    """Hydra's state of a program around us, the log, the generators, the command line, the signals, the folder."""
    log, heard = logging.getLogger("mtl"), []
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)
    listener = logging.Handler()
    listener.emit = heard.append
    logging.getLogger().addHandler(listener)
    before = (list(sys.argv), os.getcwd(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    try:
        with initialize_config_dir(str(ROOT / "conf" / "loss"), version_base="1.2"):
            hydra, base = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
            mtl.train(*SMALL, "trainer.epochs=1", output_root=tmp_path)
            with pytest.raises(UserError):
                mtl.train(*SMALL, "loss=nope", output_root=tmp_path)
            assert GlobalHydra.instance().hydra is hydra and VersionBase.instance().getbase() == base
            assert "temperature" in compose("dwa")
        assert not GlobalHydra.instance().is_initialized()
        assert not heard  # the root logger is at WARNING
        logging.getLogger("mtl").setLevel(logging.INFO)
        mtl.train(*SMALL, "trainer.epochs=1", "seed=3", output_root=tmp_path)
        assert any("epoch 1/1" in record.getMessage() for record in heard)
        assert all(record.levelno >= logging.INFO for record in heard)
    finally:
        logging.getLogger().removeHandler(listener)
        level, log.level = log.level, logging.NOTSET
    after = (list(sys.argv), os.getcwd(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert (log.handlers, log.propagate, level) == ([], True, logging.INFO)


def test_a_run_in_another_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(mtl.train(*SMALL, "trainer.epochs=1", output_root=tmp_path / "a"))
    )
    thread.start()
    here = mtl.train(*SMALL, "trainer.epochs=1", output_root=tmp_path / "b")
    thread.join()
    assert results[0].rows[0]["test/ink_mae"] == here.rows[0]["test/ink_mae"]
    assert all("epoch 1/1" in (r.directory / "train.log").read_text() for r in (*results, here))


@pytest.mark.parametrize("words", [
    ("loss=pcgradd",), ("foo=1",), ("trainer.epochs=-1",), ("optimiser.lr=1",), ("--nope",), ("data",), ("loss=[a]",),
    ("optimizer.lr=1e38",), ("data=cifar100", "data.root=nowhere", "data.download=false"),
    ("data.batch_size=${nope}",), ("loss=custom",), ("trainer.device=cuda:99",),
])  # fmt: skip
def test_a_wrong_call_raises_the_line_that_the_command_prints(words, cli, tmp_path):
    run = cli(*SMALL, "trainer.epochs=1", *words)
    (line,) = [t for t in run.err.splitlines() if t.startswith("error: ")]
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    with pytest.raises(UserError) as caught:
        mtl.train(*SMALL, "trainer.epochs=1", *words)
    assert f"error: {caught.value}" == line and caught.value.exit_code == run.code != 0
    assert isinstance(caught.value, Diverged) == ("diverged" in run.out + run.err or "became" in line)


@pytest.mark.parametrize("words, options, message", [
    (("loss=dwa,pcgrad",), {}, "loss=dwa,pcgrad: several values make a grid; use mtl.grid"),
    (("-m",), {}, "-m: leave it away"),
    (("hydra/launcher=parallel",), {}, "hydra/launcher=parallel: options of Hydra belong to the command line"),
    ((), {"sed": 1}, "sed: unknown key"),
    ((3,), {}, "3: a word of the command line is needed, such as 'loss=dwa'"),
    ((), {"loss": Net}, "loss: Net is no number, string, list or dict; a class goes by its path"),
    (("arch._target_=__main__.Net",), {}, "__main__.Net: a run must know its code"),
    ((), {"optimizer": {"lr": "fast"}}, "optimizer.lr=fast: must be a valid number"),
])  # fmt: skip
def test_what_only_a_call_can_get_wrong(words, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        mtl.train(*SMALL, "trainer.epochs=1", *words, **options)
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_keywords_are_words(tmp_path):
    from mtl.api import _spell

    options = {"seed": np.int64(3), "output_root": tmp_path, "optimizer": {"lr": 0.1, "_target_": "torch.optim.SGD"},
               "loss.weights": {"a": 1, "b b": 0.5}, "study": {"plan": True}, "data.root": "a,b 'c'"}  # fmt: skip
    words = _spell(options, sweep=False)
    assert words[:4] == ["seed=3", f"output_root={tmp_path}", "optimizer.lr=0.1", "optimizer._target_=torch.optim.SGD"]
    assert words[5:] == ["study.plan=true", r"data.root='a,b \'c\''"]
    assert _spell({"seed": range(3), "data": {"limit_train": (8, 16)}}, sweep=True) == [
        "seed=0,1,2", "data.limit_train=8,16",
    ]  # fmt: skip
    assert _spell({"milestones": [1, 2]}, sweep=False) == ["milestones=[1,2]"]


def test_a_grid_is_a_table_of_the_runs_of_the_command(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = (*SMALL, "trainer.epochs=1")
    assert [cli(*small, "loss=equal", f"seed={seed}").code for seed in (0, 1)] == [0, 0]
    files = sorted(tmp_path.rglob("last.pt"))
    times = [file.stat().st_mtime_ns for file in files]
    result = mtl.grid(*small, "loss=equal,pcgrad", seed=[0, 1])
    assert [(row["loss"], row["seed"]) for row in result.rows] == [
        (loss, seed) for loss in ("equal", "pcgrad") for seed in (0, 1)
    ]
    assert [file.stat().st_mtime_ns for file in files] == times, "finished runs were trained again"
    for row in result.rows:
        summary = json.loads((Path(row["directory"]) / "summary.json").read_text())
        assert row["status"] == "finished" and row["ink_mae"] == summary["last"]["test/ink_mae"]
    assert str(result).splitlines()[0].split() == [
        "loss",
        "seed",
        "status",
        "digit_accuracy",
        "odd_accuracy",
        "ink_mae",
    ]
    result.to_csv("grid.csv")
    with open("grid.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(row["ink_mae"]) for row in table] == [row["ink_mae"] for row in result.rows]


def test_a_grid_goes_on_after_a_run_that_fails_and_begins_none_after_a_wrong_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = (*SMALL, "trainer.epochs=1", "optimizer.momentum=0.99")
    with pytest.raises(ConfigError, match=r"^loss=nope: no such option"):
        mtl.grid(*small, "loss=equal,nope")
    assert not list(tmp_path.iterdir())
    rows = mtl.grid(*small, optimizer={"lr": [1e38, 0.01], "momentum": 0.9}, study={"baselines": "auto"}, seed=[0]).rows
    last = [row for row in rows if "loss" not in row]
    assert [(row["optimizer.lr"], row["status"]) for row in last] == [(1e38, "diverged"), (0.01, "finished")]
    assert "became" in last[0]["message"] and "ink_mae" not in last[0]
    assert all(row["seed"] == 0 and "optimizer.momentum" not in row for row in rows)
    alone = [row["loss.task"] for row in rows if row.get("loss") == "single" and row["optimizer.lr"] == 0.01]
    assert alone == ["digit", "odd", "ink"]


def test_a_plan_trains_nothing(tmp_path):
    words = (*SMALL, "trainer.epochs=2", "study.plan=true")
    result = mtl.train(*words, output_root=tmp_path)
    assert (result.status, result.rows, result.summary) == ("planned", [], {})
    (row,) = mtl.grid(*words, output_root=tmp_path, seed=[42]).rows
    assert (row["status"], row["state"], row["epochs"], row["seed"]) == ("planned", "new", 2, 42)
    assert not list(tmp_path.iterdir())


# -- mtl.load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", ["best", "last"])
def test_a_loaded_run_predicts_as_it_was_evaluated(trained, epoch):
    """Accuracy and error of the answers, counted here, are those of the run's row; RotoGrad turns what heads see."""
    run = mtl.load(str(trained.directory), epoch)
    assert not run.model.training and [task.name for task in run.tasks] == ["digit", "odd", "ink"]
    assert run.config["seed"] == 1 and run.name == "net-rotograd-s1-" + trained.directory.parts[-2]
    row = trained.rows[run.epoch - 1]
    test = run.benchmark.splits()["test"]
    answers = run.predict(test.columns["image"].numpy())
    for task in ("digit", "odd"):
        right = (answers[task]["class"] == test.column(task)).double().mean().item()
        assert 100 * right == pytest.approx(row[f"test/{task}_accuracy"])
        assert ((answers[task]["probability"] > 0) & (answers[task]["probability"] <= 1)).all()
    error = (answers["ink"]["number"] - test.column("ink")).abs().mean().item()
    assert error == pytest.approx(row["test/ink_mae"], rel=1e-5)
    single = run.predict({"image": test.columns["image"][:1]})
    assert single["ink"]["number"].shape == (1,) and not single["ink"]["number"].requires_grad


def test_the_best_epoch_and_the_last(trained):
    best, last = (mtl.load(trained.directory, epoch).epoch for epoch in ("best", "last"))
    assert last == 4 and best == trained.summary["best"]["test/digit_accuracy"]["epoch"]


@pytest.mark.parametrize("inputs, message", [
    (torch.zeros(2, 8, 8, 1), "inputs: image: float32 of shape (2, 8, 8, 1); uint8 images of shape (N, 8, 8, 1)"),
    (torch.zeros(8, 8, 1, dtype=torch.uint8), "inputs: image: uint8 of shape (8, 8, 1)"),
    (torch.zeros(0, 8, 8, 1, dtype=torch.uint8), "inputs: there are no samples"),
    ({"imag": torch.zeros(2, 8, 8, 1)}, "inputs: image is missing; the model reads image; did you mean imag?"),
    ("cat.png", "inputs: image: "),
])  # fmt: skip
def test_wrong_inputs_are_named(trained, inputs, message):
    with pytest.raises(ConfigError) as caught:
        mtl.load(trained.directory).predict(inputs)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def no_run(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return f"{folder} is no run's folder: there is no run.json in it"


def a_tree(folder):
    shutil.move(folder, folder.parent / "inner")
    folder.mkdir()
    shutil.move(folder.parent / "inner", folder / "deep")
    return f"there is no run.json in it; the first of the runs below it is {folder / 'deep'}"


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")
    return "is no folder; a run's folder is needed"


def nothing(folder):
    shutil.rmtree(folder)
    return "no such folder"


def without(name):
    def take_away(folder):
        (folder / name).unlink()
        return {"best.pt": "has no best.pt; use epoch=last", "run.json": "is no run's folder"}.get(
            name, f"{name} is mis"
        )

    return take_away


def with_text(name, text, message):
    def damage(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return message

    return damage


def edited(key, value, message):
    def edit(folder):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return message

    return edit


def flipped(folder):
    content = bytearray((folder / "best.pt").read_bytes())
    content[len(content) // 2] ^= 64
    (folder / "best.pt").write_bytes(content)
    return "best.pt is damaged or no checkpoint of this project"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def bomb(folder):
    torch.save({"epoch": 1, "model": Bomb()}, folder / "best.pt")
    return "best.pt is damaged or no checkpoint of this project"


def of_another(folder):
    saved = torch.load(folder / "best.pt", weights_only=True)
    saved["run"][0] += 1
    torch.save(saved, folder / "best.pt")
    return "is the checkpoint of another run, "


def of_nothing(folder):
    torch.save({"a": 1}, folder / "best.pt")
    return "best.pt is no checkpoint of this project: no epoch in it"


@pytest.mark.parametrize("damage", [
    no_run, a_tree, a_file, nothing, without("best.pt"), without("run.json"), without("config.yaml"), flipped, bomb,
    of_another, of_nothing, with_text("best.pt", "", "damaged"), with_text("best.pt", "hello", "damaged"),
    with_text("run.json", "[1]", "run.json is damaged"), with_text("run.json", '{"status": "x"}', "no name in it"),
    with_text("run.json", '{"stat', "run.json is damaged: no name in it"),
    with_text("config.yaml", "a: [", "config.yaml is damaged"), with_text("config.yaml", b"\xff\xfe", "config.yaml is"),
    with_text("config.yaml", "[]", "it holds no config of a run"),
    with_text("config.yaml", "a: 1", "there is no data in"),
    with_text("config.yaml", "!!python/object/apply:os.mkdir [exploded]", "config.yaml is damaged"),
    edited("arch._target_", "my_net.Net", "arch._target_=my_net.Net: cannot be imported (No module named 'my_net')"),
    edited("data._target_", "mtl.data.gone.Data", "data._target_=mtl.data.gone.Data: cannot be imported"),
    edited("arch", {"_target_": "mtl.archs.resnet.ResNet", "depth": 20}, "does not fit its config.yaml ("),
    edited("loss", {"_target_": "mtl.losses.Single", "task": "odd"}, "does not fit its config.yaml ("),
    edited("trainer.steps_of_2030", 1, "trainer.steps_of_2030: unknown key; allowed"),
    edited("seed", None, "there is no seed in it"),
], ids=lambda damage: damage.__qualname__.partition(".")[0])  # fmt: skip
def test_a_wrong_folder_is_one_line(damage, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = damage(copy)
    with pytest.raises(UserError) as caught:
        mtl.load(copy)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(copy) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_other_arguments_are_refused_too(trained):
    with pytest.raises(ConfigError, match=r"^epoch: 3 is none of best, last"):
        mtl.load(trained.directory, epoch=3)
    with pytest.raises(UserError, match=r"device: 'tpu' is none of auto, cpu"):
        mtl.load(trained.directory, device="tpu")


def test_a_config_of_an_older_version_is_completed(copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    for node in ("microscope", "study", "step"):
        del config[node]
    del config["trainer"]["stages"]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert mtl.load(copy).epoch >= 1


def test_a_change_of_own_code_is_said(copy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtl.load(copy)
    info = json.loads((copy / "run.json").read_text())
    info["own"]["arch"][Net.__module__] = "00000000"
    (copy / "run.json").write_text(json.dumps(info))
    with pytest.warns(UserWarning, match=r"golden.problems was changed after .* was trained with it"):
        mtl.load(copy)


# -- python -m mtl.evaluate -------------------------------------------------------------------------------------------


def test_an_evaluation_has_the_runs_own_figures(trained, capsys, tmp_path):
    """Bit for bit: the same batches, in the same order, on the same device."""
    assert evaluation([str(trained.directory), "--epoch", "last", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    file = trained.directory / "evaluations" / "test-last.json"
    assert not err and out.splitlines()[-1] == str(file) and len(out.splitlines()) == 2 + 3 + 1
    content = json.loads(file.read_text())
    row = trained.rows[-1]
    assert content["figures"] == {key: row[key] for key in row if key.startswith("test/")}
    assert {k: content["figures"][k] for k in trained.summary["last"]} == trained.summary["last"]
    assert (content["epoch"], content["split"], content["samples"], content["data"]) == (4, "test", 48, {})
    for name in MODEL_LESS:
        assert (trained.directory / name).is_file()


def test_changed_data_is_evaluated_and_named(trained, copy, capsys):
    words = [str(trained.directory), str(copy), "data.limit_test=10", "--epoch=best", "--device=cpu"]
    assert evaluation(words) == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("net-rotograd-s1") for line in out.splitlines()) == 6
    (file,) = [Path(line) for line in out.splitlines() if line.startswith(str(copy))]
    content = json.loads(file.read_text())
    assert file.name.startswith("test-best-limit_test_10") and content["data"] == {"limit_test": 10}
    run = mtl.load(copy)
    test = run.benchmark.splits()["test"]
    right = run.predict(test.columns["image"][:10])["digit"]["class"] == test.columns["digit"][:10]
    assert content["figures"]["test/digit_accuracy"] == pytest.approx(100 * right.double().mean().item())


def test_a_split_without_labels_is_null_not_nan(trained, copy, monkeypatch):
    load = mtl.data.digits.Digits.load

    def unlabelled(self):
        splits = load(self)
        splits["test"].columns["ink"].fill_(float("nan"))
        return splits

    monkeypatch.setattr("mtl.data.digits.Digits.load", unlabelled)
    found = evaluate(copy, {}, device="cpu")
    content = json.loads(found.write("x", {}).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["figures"]["test/ink_mae"] is None and "–" in found.lines[2][-1]


@pytest.mark.parametrize("words, message", [
    (["data.limit=3"], "data.limit: unknown key; allowed: batch_size"),
    (["loss=dwa"], "loss=dwa: only options of the data can be changed, as data.KEY=VALUE"),
    (["data.limit_test=1,2"], "data.limit_test=1,2: one value is needed"),
    (["data.limit_test=[1"], "'data.limit_test=[1' is not KEY=VALUE"),
    (["--split", "tset"], "--split tset: the data has train, test; did you mean test?"),
    (["nowhere"], "nowhere: no such folder"),
    (["--device", "cuda:99"], "trainer.device=cuda:99: this machine shows"),
])  # fmt: skip
def test_refused_evaluations(words, message, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluation([str(trained.directory), *words]) != 0
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


# -- python -m mtl ----------------------------------------------------------------------------------------------------


def test_the_overview_lists_every_command(capsys):
    started = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for file in shipped.files("mtl/**/*.py")
        if 'if __name__ == "__main__":' in file.read_text()
    }
    assert {*COMMANDS, "mtl"} == started
    assert overview([]) == 0
    out = capsys.readouterr().out
    assert all(f"python -m {name} " in out for name in COMMANDS)
    assert overview(["--version"]) == 0 and capsys.readouterr().out == f"mtl {mtl.__version__}\n"
    assert overview(["evalute"]) == 2
    assert capsys.readouterr().err.endswith("did you mean python -m mtl.evaluate?\n")


def test_a_damaged_finished_run_is_an_error_not_a_result(copy):
    (copy / "metrics.jsonl").write_text("{}\n")
    root = copy.parent / "root" / Path(*copy.parts[-5:-5])
    folder = root / "digits" / "net" / "rotograd" / json.loads((copy / "run.json").read_text())["digest"] / "seed1"
    folder.parent.mkdir(parents=True)
    shutil.move(copy, folder)
    with pytest.raises(SetupError, match=r"metrics\.jsonl"):
        mtl.train(*SMALL, "loss=rotograd", "trainer.epochs=4", "optimizer.lr=0.3", seed=1, output_root=root)
