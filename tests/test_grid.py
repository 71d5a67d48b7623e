"""Grids that cannot be lost: killed, repeated, extended, shared between processes, planned, with their baselines."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT
from filelock import FileLock
from omegaconf import OmegaConf

from mtl.cli import grid
from mtl.cli.command import Launch
from mtl.engine.learner import Learner


def runs(root: Path) -> dict[str, Path]:
    """Directories by "loss/seed"."""
    found = {}
    for file in root.rglob("run.json"):
        run = json.loads(file.read_text())
        task = yaml.safe_load((file.parent / "config.yaml").read_text())["loss"].get("task", "")
        found[f"{run['loss']}{task}/{run['seed']}"] = file.parent
    return found


def metrics(directory: Path) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def table(output: str) -> list[str]:
    return output.split(": test metrics\n")[1].split("test set, ")[0].splitlines()


def test_a_grid_of_9_killed_3_times_ends_as_if_undisturbed(tmp_path):
    words = ("loss=equal,dwa,pcgrad", "seed=0,1,2", "data=digits", "trainer.epochs=3", "trainer.device=cpu")
    words = (*words, "data.limit_train=64", "data.limit_test=32", "data.batch_size=32", "logger=none")
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words]
    rng, killed = random.Random(0), 0

    def start(folder):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    calm = start(tmp_path / "calm")
    out, err = calm.communicate()
    assert calm.returncode == 0, err
    for _ in range(3):
        process = start(tmp_path / "killed")
        for _ in range(rng.randrange(8, 20)):  # so many lines of the console: in the middle of some cell
            process.stdout.readline()
        time.sleep(rng.random() / 4)
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        killed += process.returncode != 0
    assert killed == 3
    last = start(tmp_path / "killed")
    again, err = last.communicate()
    assert last.returncode == 0, err
    assert table(again) == table(out)
    one, other = runs(tmp_path / "calm"), runs(tmp_path / "killed")
    assert len(one) == 9 and one.keys() == other.keys()
    for name, directory in one.items():
        assert json.dumps(metrics(directory)) == json.dumps(metrics(other[name])), name
        ours, theirs = (torch.load(d / "last.pt", weights_only=True)["model"] for d in (directory, other[name]))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_failed_cell_does_not_stop_the_grid_and_runs_again(smoke, tmp_path, monkeypatch):
    train_epoch = Learner.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", lambda *a: 1 / 0 if a[0].seed == 0 else train_epoch(*a))
        first = smoke("-m", "seed=0,1")
    assert first.code == 1 and "1 of 2 runs finished" in first.out
    assert re.search(r"^failed: python train.py .*seed=0.*: ZeroDivisionError: .*train\.log\)$", first.out, re.M)
    again = smoke("-m", "seed=0,1")
    assert again.code == 0 and "2 of 2 runs finished" in again.out
    assert again.out.count("epoch 2/2") == 1  # seed 1 was not trained again
    assert {d.parts[-1] for d in runs(tmp_path).values()} == {"seed0", "seed1"}


def test_a_cell_at_which_another_process_works_is_left_alone(smoke, tmp_path):
    smoke("-m", "seed=0")
    (directory,) = runs(tmp_path).values()
    (directory / "run.json").unlink()
    with FileLock(directory / ".lock"):
        result = smoke("-m", "seed=0,1")
        planned = smoke("-m", "seed=0,1", "study.plan=true")
    assert result.code == 0 and "1 of 2 runs finished (1 running elsewhere)" in result.out and not result.err
    assert re.search(r"^running elsewhere: python train.py .*seed=0", result.out, re.M)
    assert re.search(r"-s1-\w+ +finished", planned.out)


def test_what_another_terminal_has_finished_meanwhile_is_in_the_table(smoke, tmp_path, monkeypatch):
    """The other process ends while this one waits for its run before the table."""
    smoke("-m", "seed=0")
    (directory,) = runs(tmp_path).values()
    text = (directory / "run.json").read_text()
    (directory / "run.json").write_text(text.replace('"finished"', '"running"', 1))
    lock = FileLock(directory / ".lock")

    def ends(seconds):
        (directory / "run.json").write_text(text)
        lock.release()

    monkeypatch.setattr(grid, "time", SimpleNamespace(sleep=ends, time=time.time))
    with lock:
        result = smoke("-m", "seed=0,1")
    assert result.code == 0 and "2 of 2 runs finished; " in result.out and "waiting   for 1 run" in result.out
    assert re.search(r"^equal +2 ", result.out, re.M)


def test_an_interrupted_grid_counts_all_that_was_asked_for(tmp_path, capsys):
    """2 methods x 2 seeds with 2 tasks' baselines are 4 + 4 runs."""
    (tmp_path / "grid.json").write_text(json.dumps({"started": time.time() - 10, "cells": 4, "bases": 2}))
    for i, status in enumerate(["finished", "finished", "running"]):
        name = "cell-00000.json" if i == 2 else f"cell-00000-{i}.json"
        cell = {"command": f"c{i}", "directory": "", "status": status, "code": 0, "message": "", "plan": None}
        (tmp_path / name).write_text(json.dumps(cell))
    assert grid.progress(tmp_path).startswith("grid      2 of 8 runs done (2 finished, 1 running)")
    outcomes = [grid._as_found(o, grid.Collection([], [], [], [])) for o in grid._outcomes(tmp_path)][2:]
    outcomes += [{"status": "finished"}] * 2
    assert grid._closing(tmp_path, outcomes) == (
        "2 of 8 runs finished (1 interrupted, 5 not begun); the same command again runs what is missing"
    )


def test_what_diverged_is_left_alone_until_asked(smoke, tmp_path, monkeypatch):
    """The same config would diverge again."""
    wild = ("-m", "seed=0", "optimizer.lr=1e6", "trainer.epochs=1")
    first = smoke(*wild)
    assert first.code == 1 and "0 of 1 runs finished (1 diverged)" in first.out
    monkeypatch.setattr(Learner, "train_epoch", lambda *a: pytest.fail("trained again"))
    again, planned = smoke(*wild), smoke(*wild, "study.plan=true")
    assert again.code == 1 and "study.diverged=again trains it again" in again.err
    assert "1 diverged); about 0s" in planned.out
    monkeypatch.setattr(Learner, "train_epoch", lambda *a: 1 / 0)
    assert "ZeroDivisionError" in smoke(*wild, "study.diverged=again").err


def test_a_damaged_run_json_costs_no_run(smoke, tmp_path):
    smoke("seed=0")
    (directory,) = runs(tmp_path).values()
    before = metrics(directory)
    (directory / "run.json").write_text('{"status": "fini')
    assert smoke("seed=0").code == 0
    assert json.loads((directory / "run.json").read_text())["status"] == "finished" and metrics(directory) == before


# --------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_says_what_is_there_and_leaves_nothing(smoke, tmp_path, monkeypatch):
    smoke("seed=0")
    with monkeypatch.context() as patch:
        train_epoch = Learner.train_epoch
        patch.setattr(Learner, "train_epoch", lambda *a: train_epoch(*a) if a[2] == 0 else 1 / 0)
        smoke("seed=1")
    before = {p: p.stat().st_mtime for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    result = smoke("-m", "loss=equal,dwa", "seed=0,1,2", "study.plan=true")
    assert result.code == 0, result.err
    assert {p: p.stat().st_mtime for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == before
    lines = [re.split(r"\s{2,}", line.strip()) for line in result.out.splitlines() if line.startswith("resnet20-")]
    cells = [(line[0][:-9], *line[1:3], line[-1]) for line in lines]
    assert cells == [
        ("resnet20-equal-s0", "finished", "finished"),
        ("resnet20-equal-s1", "failed", "1", "as seed1 took"),
        ("resnet20-equal-s2", "new", "2", "as seed0 took"),
        *((f"resnet20-dwa-s{seed}", "new", "2", "measured") for seed in (0, 1, 2)),
    ]
    assert "6 runs (1 finished, 1 failed, 4 new)" in result.out


def test_a_plan_tells_runs_apart_and_knows_those_of_other_epochs(cli):
    toy = ("data=toy", "arch=point", "data.steps=2", "trainer.device=cpu", "logger=none", "seed=0")
    assert cli(*toy, "trainer.epochs=1", "loss=cagrad", "loss.c=0.2").code == 0
    words = ("-m", *toy, "trainer.epochs=5", "study.plan=true")
    plan = cli(*words, "loss=cagrad", "loss.c=0.2,0.3", "optimizer.lr=0.01,0.02")
    names = re.findall(r"^point-(\S+)-s0-\w{8} (\S+) ", plan.out, re.M)
    assert names == [(f"cagrad-c{c}", f"optimizer.lr={lr}") for c in (0.2, 0.3) for lr in (0.01, 0.02)]
    plan = cli(*words, "loss=cagrad", "loss.c=0.2,0.3")
    assert "note: 1 of the new runs has finished with another number of epochs (1);" in plan.out
    plan = cli(*words, "loss=single", "loss.task=L1,L2")
    assert re.findall(r"^point-(\S+)-s0", plan.out, re.M) == ["single-L1", "single-L2"]


def test_the_planned_time_is_that_of_the_epochs_that_are_left(smoke, tmp_path):
    smoke("seed=0")
    (directory,) = runs(tmp_path).values()
    rows = [{**row, "time/seconds": 100.0} for row in metrics(directory)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = smoke("-m", "seed=0,1,2", "study.plan=true")
    assert result.out.count("3m20s") == 2 and "about 6m40s of training left" in result.out


# ------------------------------------------------------------------------------------------------- the grid's own files


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): None if p.is_dir() else p.read_bytes() for p in sorted(root.rglob("*"))}


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder with what a user may have in it, an earlier grid's record and Slurm's files among it."""
    folder = tmp_path / "precious"
    earlier = {"command": "c", "status": "finished", "code": 0, "directory": "d", "message": "", "plan": None}
    for name, text in {
        "notes.txt": "mine", "sub/deep/notes.txt": "mine", ".hidden": "", "grid.json": '{"started": 0, "cells": 9}',
        "multirun.yaml": "mine", "optimization_results.yaml": "mine", ".submitit/1/1_result.pkl": "mine",
        **{f"cell-{i:05d}.json": json.dumps({**earlier, "directory": f"d{i}"}) for i in range(4)},
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    return folder


TOY = ("data=toy", "arch=point", "data.steps=2", "trainer.epochs=1", "logger=none")
NOTHING = {  # grids that train nothing
    "plan": ["loss=dwa,equal", "study.plan=true"],
    "typo": ["loss=dwa,equall"],
    "launcher": ["loss=dwa,equal", "+hydra.launcher.nope=1"],
    "refused": ["loss=dwa,equal", "data.batch_size=x"],
    "signal": ["loss=dwa,equal"],
}


PLACES = ["precious", ".", "absolute", "precious/new/deep", "precious/empty"]


@pytest.mark.parametrize(("kind", "place"), [
    *(("plan", place) for place in PLACES), *((kind, PLACES[i % 2]) for i, kind in enumerate(NOTHING) if i),
    ("signal", "absolute"), ("refused", "precious/new/deep"),
])  # fmt: skip
def test_a_grid_that_trains_nothing_touches_nothing(cli, precious, tmp_path, monkeypatch, kind, place):
    where = str(precious) if place == "absolute" else place
    if kind == "signal":
        monkeypatch.setattr("mtl.cli.cell.run_from_hydra", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    before = contents(tmp_path)
    result = cli("-m", *TOY, f"hydra.sweep.dir={where}", *NOTHING[kind])
    assert result.code == {"plan": 0, "signal": 143}.get(kind, 2), result.err
    assert contents(tmp_path) == before


def test_a_grid_counts_and_writes_its_own_cells_alone(smoke, precious):
    before = contents(precious)
    result = smoke("-m", "seed=0", "hydra.sweep.dir=precious")
    assert result.code == 0 and "1 of 1 runs finished" in result.out, result.err
    (record,) = (p for p in precious.iterdir() if p.name not in {name.split("/")[0] for name in before})
    assert {"grid.json", "multirun.yaml", "cell-00000.json"} <= {p.name for p in record.iterdir()}
    shutil.rmtree(record)
    assert contents(precious) == before
    again = smoke("-m", "seed=0,1", "study.plan=true", "hydra.sweep.dir=precious")
    assert again.code == 0 and "2 runs (1 finished, 1 new)" in again.out
    assert contents(precious) == before


def test_folders_that_were_there_stay_though_empty(cli, tmp_path):
    (tmp_path / "outputs" / "multirun").mkdir(parents=True)
    assert cli("-m", *TOY, "loss=equal", "data.batch_size=x").code == 2
    assert contents(tmp_path) == {"outputs": None, "outputs/multirun": None}


def test_jobs_in_the_queue_keep_their_files(tmp_path):
    """Ctrl-C leaves Slurm's jobs in the queue, none of which may have begun."""
    made = tmp_path / "grid"
    for interrupted in (True, False):
        (made / ".submitit" / "7").mkdir(parents=True, exist_ok=True)
        (made / ".submitit" / "7" / "7_submitted.pkl").touch()
        assert Launch(directory=made, made=[made]).close(interrupted) == 0
        assert made.exists() == interrupted
    assert tmp_path.exists()


def test_a_full_disk_names_the_folder(smoke, tmp_path, monkeypatch):
    """Hydra's own file is the first one, and its error does not say which file it was."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(OmegaConf, "save", mock.Mock(side_effect=full))
    result = smoke("-m", "seed=0,1")
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert f"error: cannot write to {tmp_path / 'out' / 'multirun'}" in result.err and "No space left" in result.err


def test_a_finished_grid_of_another_user_is_listed(smoke, tmp_path, monkeypatch):
    assert smoke("-m", "seed=0").code == 0
    shutil.rmtree(tmp_path / "out" / "multirun")
    before, mkdir = contents(tmp_path), Path.mkdir

    def read_only(self, *arguments, **words):
        if self.is_relative_to(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **words)

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setenv("TMPDIR", str(tmp_path.parent))
    monkeypatch.setattr(tempfile, "tempdir", None)
    result = smoke("-m", "seed=0,1")
    assert result.code == 1 and "1 of 2 runs finished" in result.out and "no record is kept" in result.out
    assert re.search(r"^equal +1 ", result.out, re.M)
    assert len(result.err.splitlines()) == 1 and "seed1: Permission denied; set output_root" in result.err
    assert contents(tmp_path) == before and not list(tmp_path.parent.glob("mtl-grid-*"))


DAMAGES = [("metrics.jsonl", ""), ("metrics.jsonl", "half a ro"), ("metrics.jsonl", None)]
HEALED = ['{"epochs": 2, "la', "{}", None]  # of summary.json, which the metrics give again


def test_a_damaged_finished_run_counts_as_damaged(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("mtl.report.figures.paper.draw", lambda *arguments, **words: [])
    assert cli("-m", *TOY, "seed=0,1").code == 0
    directory = next(d for name, d in runs(tmp_path).items() if name.endswith("/0")).relative_to(tmp_path)
    for name, text in DAMAGES:
        before = (directory / name).read_text()
        (directory / name).unlink() if text is None else (directory / name).write_text(text)
        result = cli("-m", *TOY, "seed=0,1")
        assert result.code == 1 and "1 of 2 runs finished" in result.out and re.search(r"^equal +1 ", result.out, re.M)
        told = rf"^(damaged|refused): python train.py .*seed=0: {directory}.*{name}"
        assert re.search(told, result.out, re.M), result.out
        (line,) = result.err.splitlines()
        assert line.startswith(f"error: {directory}") and name in line
        (directory / name).write_text(before)
    for text in HEALED:
        (directory / "summary.json").unlink() if text is None else (directory / "summary.json").write_text(text)
        result = cli("-m", *TOY, "seed=0,1")
        assert result.code == 0 and "2 of 2 runs finished" in result.out and not result.err


def test_the_closing_table_says_whose_files_contradict_each_other(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("mtl.report.figures.paper.draw", lambda *arguments, **words: [])
    first = cli("-m", *TOY, "loss=equal,dwa")
    assert first.code == 0 and "contradiction" not in first.out, first.err
    directory = next(d for name, d in runs(tmp_path).items() if name.startswith("dwa"))
    config = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(re.sub(r"\blr: \S+", "lr: 0.3", config, count=1))
    result = cli("-m", *TOY, "loss=equal,dwa")
    (line,) = re.findall(r"^contradiction in a run that counts: .*$", result.out, re.M)
    assert result.code == 0 and str(directory.relative_to(tmp_path)) in line and "config.yaml" in line


def test_a_line_on_a_grid_under_way(tmp_path):
    cells = [
        {"status": "finished", "code": 0, "seconds": 0.1},  # had been there before
        {"status": "finished", "code": 0, "seconds": 60.0},
        {"status": "diverged", "code": 1, "seconds": 40.0},
        {"status": "running", "code": 0},
    ]
    (tmp_path / "grid.json").write_text(json.dumps({"started": time.time() - 102, "cells": 7}))
    for i, cell in enumerate(cells):
        text = json.dumps({"command": f"c{i}", "directory": f"d{i}", **cell})
        (tmp_path / f"cell-{i:05d}.json").write_text(text)
    (tmp_path / "cell-00003-0.json").write_text(json.dumps({"command": "single", "directory": "s", **cells[0]}))
    line = grid.progress(tmp_path)
    assert line == "grid      3 of 7 runs done (2 finished, 1 failed, 1 running), about 3m20s left"


@pytest.mark.parametrize("behind", [0, -3600])
def test_a_clock_that_stands_or_was_set_back(tmp_path, monkeypatch, behind):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    (tmp_path / "grid.json").write_text(json.dumps({"started": 1000.0 - behind, "cells": 3}))
    cell = {"command": "c", "directory": "d", "status": "finished", "code": 0, "seconds": 60.0}
    (tmp_path / "cell-00000.json").write_text(json.dumps(cell))
    assert grid.progress(tmp_path) == "grid      1 of 3 runs done (1 finished), about 2m00s left"


@pytest.mark.parametrize(("words", "cells"), [
    (["seed=0"], 1), (["seed=0,1,2", "loss=equal,dwa"], 6), (["seed=range(0,5)", "optimizer.lr=choice(0.1,0.2)"], 10),
    (["loss.weights='{a: 1, b: 2}'", "seed=0,1"], 2),
])  # fmt: skip
def test_how_many_runs_a_grid_has(words, cells):
    from mtl.cli.command import _count

    node = {"sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None},
            "overrides": {"task": words}}  # fmt: skip
    assert _count(OmegaConf.create(node)) == cells


def test_a_glob_is_counted_without_a_warning(cli, recwarn):
    plan = cli("-m", "data=toy", "arch=point", "trainer.device=cpu", "logger=none", "seed=0", "study.plan=true",
               "loss=glob(imtl*)")  # fmt: skip
    assert plan.code == 0 and "3 runs (3 new)" in plan.out and not plan.err
    assert [str(w.message) for w in recwarn if "Callback" in str(w.message)] == []


# ---------------------------------------------------------------------------------------------------------- baselines


def test_baselines_are_trained_on_demand_and_once(smoke, tmp_path):
    result = smoke("-m", "loss=equal,dwa", "seed=0", "study.baselines=auto")
    assert result.code == 0, result.err
    assert set(runs(tmp_path)) == {"singlefine/0", "singlecoarse/0", "equal/0", "dwa/0"}
    assert result.out.count("epoch 2/2") == 4
    table, _, note = result.out.partition(": test metrics\n")[2].partition("test set, ")
    assert ("†" in table) == ("; †: better than single-task learning" in note)
    # It is the very run that its own command makes.
    again = smoke("loss=single", "loss.task=coarse", "seed=0")
    assert "epoch" not in again.out and "finished" in again.out
    run = json.loads((runs(tmp_path)["singlecoarse/0"] / "run.json").read_text())
    assert run["command"].endswith("loss=single loss.task=coarse") and "study" not in run["command"]


def test_the_baseline_of_a_switched_step_is_the_plain_single_task_run(smoke, tmp_path):
    words = ("step.gradients=features", "step.scale=norm", "loss.c=0.2")
    assert smoke("loss=cagrad", *words, "seed=0", "study.baselines=auto").code == 0
    assert "finished" in smoke("loss=single", "loss.task=fine", "seed=0").out


def test_a_single_task_result_that_a_method_cannot_take_is_named_with_its_task(smoke, tmp_path):
    words = ("seed=0", "trainer.epochs=1")
    assert smoke("-m", "loss=single", "loss.task=fine,coarse", *words).code == 0
    file = runs(tmp_path)["singlecoarse/0"] / "metrics.jsonl"
    whole = file.read_text()
    for value, loss, argument in (("0.0", "amtl", "potentials"), ("null", "amtl", "potentials"),
                                  ("0.0", "pivrg", "baselines")):  # fmt: skip
        file.write_text(re.sub(r'("train/coarse_accuracy": )[\d.]+', rf"\g<1>{value}", whole))
        refused = smoke(f"loss={loss}", *words)
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert f"loss.{argument}=auto: the single-task run of coarse ended with coarse_accuracy" in refused.err


@pytest.mark.parametrize(("loss", "argument", "val"), [("amtl", "potentials", 0.5), ("pivrg", "baselines", 0)])
def test_a_method_takes_its_single_task_results_from_the_runs_of_its_seed(smoke, tmp_path, loss, argument, val):
    words = (f"loss={loss}", "seed=0,1", f"data.val_fraction={val}", "data.train_size=128", "trainer.epochs=3")
    refused = smoke(*words[:1], "seed=0", *words[2:])
    assert refused.code == 2
    assert re.fullmatch(rf"error: loss\.{argument}=auto: no finished single-task run of fine in .*\n", refused.err)
    result = smoke("-m", *words, "study.baselines=auto")
    found = runs(tmp_path)
    split = "val" if val else "train"
    for seed in (0, 1):
        results = {t: metrics(found[f"single{t}/{seed}"])[-1][f"{split}/{t}_accuracy"] for t in ("fine", "coarse")}
        if 0 in results.values():
            assert f"{argument}=auto: the single-task run of " in result.err  # a potential of 0 is refused
            continue
        assert yaml.safe_load((found[f"{loss}/{seed}"] / "config.yaml").read_text())["loss"][argument] == results
        buffers = torch.load(found[f"{loss}/{seed}"] / "last.pt", weights_only=True)["strategy"]
        assert buffers[argument].tolist() == pytest.approx(list(results.values()))
    groups = {found[name].parent for name in found if name.startswith(loss)}
    assert len(groups) <= 1  # seeds stay in one group, though their numbers differ
