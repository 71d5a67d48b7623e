"""Grids that run in other processes: the same numbers, the same table, the same exit code."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import shipped
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins

from mtl.cli import launchers
from mtl.cli.command import CONF
from mtl.data import cifar100
from mtl.errors import Busy

PRESETS = {"parallel": "joblib", "slurm": "submitit", "slurm_local": "submitit", "ray_cluster": "ray"}
TINY = ("experiment=smoke", "data.train_size=64", "data.test_size=32", "data.batch_size=32")


def needs(plugin: str):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason=f"hydra-{plugin}-launcher is not installed")


@pytest.fixture
def one_thread():
    """Sums in another order round differently: what is compared runs on as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def runs(root: Path) -> dict[str, Path]:
    """Run directories by everything but their root."""
    return {str(file.parent.relative_to(root)): file.parent for file in sorted(root.rglob("run.json"))}


def metrics(directory: Path) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def table(output: str) -> str:
    return output.split(": test metrics\n")[1].split("\n\n")[0]


def test_every_preset_has_a_test():
    assert {*shipped.options("hydra/launcher")} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compose_into_a_launcher(preset):
    needs(PRESETS[preset])
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("config", [f"hydra/launcher={preset}"], return_hydra_config=True)
    launcher = Plugins.instance()._instantiate(config.hydra.launcher)
    assert type(launcher).__module__.startswith(f"hydra_plugins.hydra_{PRESETS[preset]}_launcher")


def test_parallel_cells_give_what_cells_one_after_another_give(smoke, tmp_path, one_thread, monkeypatch):
    """A good cell, one that diverges, and one that is the first once more."""
    needs("joblib")
    from joblib.externals.loky import get_reusable_executor

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    grid = ("-m", "optimizer.lr=0.1,1e9,1e-1")
    try:
        parallel = smoke(*grid, "hydra/launcher=parallel", "hydra.launcher.n_jobs=2")
    finally:
        get_reusable_executor(reuse=True).shutdown(kill_workers=True)
    shutil.move(tmp_path / "out", tmp_path / "parallel")
    one_by_one = smoke(*grid)

    assert parallel.code == one_by_one.code == 1
    assert table(parallel.out) == table(one_by_one.out)
    ours, theirs = runs(tmp_path / "parallel"), runs(tmp_path / "out")
    assert len(ours) == 2
    assert {k: metrics(d) for k, d in ours.items()} == {k: metrics(d) for k, d in theirs.items()}
    # The console has no epochs of several cells in disorder; the log of the run that did not diverge at once has them.
    assert "epoch 1/2" not in parallel.out and "epoch 1/2" in one_by_one.out
    assert any("epoch 1/2" in (d / "train.log").read_text() for d in ours.values())
    assert [parallel.out.count(f"cell {i}    started") for i in range(3)] == [1, 1, 1]
    assert parallel.err.count("error: ") == 1 and "became" in parallel.err


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job's process in /proc")
def test_a_preempted_job_is_requeued_and_ends_as_if_undisturbed(smoke, tmp_path, one_thread):
    needs("submitit")
    words = [*TINY, "logger=none", "trainer.epochs=3"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, "hydra/launcher=slurm_local"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        # As soon as an epoch is complete, what Slurm does before it takes the node away.
        os.kill(_job_with_an_epoch(tmp_path / "outputs", time.monotonic() + 300), signal.SIGUSR2)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output
    ((name, preempted),) = runs(tmp_path / "outputs").items()
    log = (preempted / "train.log").read_text()
    assert "interrupted after" in log and "resumed   after epoch" in log
    assert json.loads((preempted / "run.json").read_text())["status"] == "finished"

    assert smoke("trainer.epochs=3").code == 0
    assert metrics(preempted) == metrics(tmp_path / "out" / name)
    assert "1 of 1 runs finished" in output and table(output)


def _job_with_an_epoch(root: Path, deadline: float) -> int:
    """The id of the process of the only job under `root`, once it has written an epoch."""
    while time.monotonic() < deadline:
        if any(root.rglob("last.pt")):
            for process in Path("/proc").glob("[0-9]*"):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"submitit.core._submit" in words and (process / "cwd").resolve() == root.parent:
                    return int(process.name)
        time.sleep(0.02)
    raise AssertionError("no job wrote an epoch")


def test_slurm_gets_what_the_preset_says(smoke, tmp_path, monkeypatch):
    """A `sbatch` that keeps the script and refuses it: also what a user sees who names a wrong partition."""
    needs("submitit")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "srun": "",
        "sbatch": f'cp "$1" {tmp_path}/script\necho no such partition >&2\nexit 1\n',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    result = smoke("-m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90",
                   "hydra.launcher.array_parallelism=2", "seed=0,1,2")  # fmt: skip
    options = {line.removeprefix("#SBATCH --") for line in (tmp_path / "script").read_text().splitlines()}
    assert {"partition=gpu", "time=90", "array=0-2%2", "gpus-per-node=1", "cpus-per-task=4", "mem=16GB"} <= options
    assert {"requeue", "open-mode=append", "signal=USR2@120", "job-name=mtl"} <= options
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: submitit could not run the cells: no such partition")
    assert not runs(tmp_path / "out")


def test_a_cell_waits_for_the_process_that_works_on_the_same_run(caplog):
    tries = []

    def start():
        tries.append(1)
        if len(tries) < 3:
            raise Busy("another process is training here; this one leaves it alone")
        return "outcome"

    with caplog.at_level(logging.INFO, "mtl"):
        logging.getLogger("mtl").propagate = True
        assert launchers.when_free(start, seconds=0) == "outcome"
    assert caplog.messages == ["waiting   another process is training here"]


WORKER = """
import os, sys, time
from mtl.cli import launchers
from mtl.errors import Terminated
if child := os.fork():
    os.waitpid(child, 0)
launchers.POLL = 0.05
launchers.end_with_parent()
print(os.getpid(), flush=True)
if sys.argv[1] == "idle":
    time.sleep(60)
with launchers.at_work():
    try:
        time.sleep(60)
    except Terminated:
        print("noted", flush=True)
        raise
"""


@pytest.mark.parametrize("what", ["idle", "at work"])
def test_a_worker_ends_with_the_command_that_started_it(what):
    """Its pipe is closed: it is gone; a run at work has noted before that it was interrupted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WORKER, what], env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    try:
        assert process.communicate(timeout=30)[0] == ("" if what == "idle" else "noted\n")
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_processes_take_the_gpus_in_turn(tmp_path, monkeypatch):
    taken = []
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
        launchers._take_gpu(tmp_path)
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    launchers._slots.pop(1).release()  # a process ends: the next takes its place
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    launchers._take_gpu(tmp_path)
    taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    launchers._slots.clear()
    assert taken == ["4", "7", "4", "7"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["hydra/launcher=paralel"], 2, "did you mean parallel?"),
        (["hydra/launcher=parallel", "hydra.launcher.n_jobs=two"], 2, "hydra.launcher.n_jobs: Value 'two'"),
        (["hydra/launcher=parallel", "hydra.launcher.n_job=2"], 2, "did you mean n_jobs?"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(smoke, tmp_path, words, code, said):
    needs("joblib")
    result = smoke("-m", *words, "seed=0,1")
    assert (result.code, result.out) == (code, "")
    assert len(result.err.splitlines()) == 1 and said in result.err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(smoke, tmp_path, monkeypatch):
    Plugins.instance()  # so that what is installed has registered its configs
    options = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.setitem(options, "joblib.yaml", None)
    monkeypatch.delitem(options, "joblib.yaml")
    result = smoke("-m", "hydra/launcher=parallel", "seed=0,1")
    assert result.code == 1
    assert result.err == "error: hydra/launcher needs a package: pip install hydra-joblib-launcher\n"
    assert not list(tmp_path.iterdir())


def test_the_error_of_another_process_is_one_line():
    """What submitit raises in the command for a job that failed in its own process, and for one that died."""
    needs("submitit")
    from submitit.core.utils import FailedJobError, UncompletedJobError

    trace = "Job (task=0) failed during processing with trace:\n---\nTraceback (most recent call last):\n  File x\n"
    failed = launchers.explain(
        FailedJobError(f"{trace}ModuleNotFoundError: No module named 'mtl'\n---\nsee job.stdout()")
    )
    assert (
        failed.exit_code == 1
        and "submitit" in str(failed)
        and "ModuleNotFoundError: No module named 'mtl'" in str(failed)
    )
    died = launchers.explain(
        UncompletedJobError("Job 7 has not produced any output (state: NODE_FAIL)\n\nNo error stream")
    )
    assert "state: NODE_FAIL" in str(died) and "\n" not in str(died)
    assert launchers.explain(ValueError("of a run")) is None


def test_two_processes_fetch_cifar100_once(tmp_path, monkeypatch):
    root, count = tmp_path / "new" / "data", tmp_path / "count"

    def download(url, work, filename, md5):
        with count.open("a") as f:
            f.write("once\n")
        time.sleep(0.5)
        folder = Path(work) / cifar100.FOLDER
        folder.mkdir()
        for name in cifar100.MD5:
            (folder / name).touch()

    monkeypatch.setattr(cifar100, "download_and_extract_archive", download)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=cifar100._download, args=(root,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0, 0]
    assert count.read_text() == "once\n"
    assert [p.name for p in root.iterdir()] == [cifar100.FOLDER]
