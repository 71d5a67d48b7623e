"""What leaves a run: the W&B file as W&B reads it, TensorBoard events, the console, and the closing table of a grid."""

import io
import json
import logging
import math
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.sdk.lib import wbauth

from mtl.config.identity import Identity
from mtl.engine.learner import Learner
from mtl.tracking import RunInfo, console, flatten
from mtl.tracking import wandb as tracking
from mtl.tracking.wandb import WandbTracker

SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=40", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "optimizer.lr=0.01", "trainer.epochs=3")  # fmt: skip
TESTS = {"test/digit_accuracy": "max", "test/odd_accuracy": "max", "test/ink_mae": "min"}
KEY = {"WANDB_API_KEY": "0" * 40}


@pytest.fixture
def run(cli, tmp_path, monkeypatch):
    """`run("logger=wandb")` as in a new process: W&B neither logged in nor told to be offline, stdin closed."""
    torch.set_num_threads(1)
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", None)
    # An absolute root: W&B's service outlives a test, and its working directory with it.
    return lambda *options: cli(*SMALL, f"output_root={tmp_path / 'outputs'}", *options)


def results() -> SimpleNamespace:
    """The files of the only run."""
    (file,) = Path("outputs").rglob("run.json")
    rows = [json.loads(line) for line in (file.parent / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(path=file.parent, rows=rows, **json.loads(file.read_text()))


def fragments() -> list[SimpleNamespace]:
    """What `wandb leet inspect` reads in each run folder under outputs/wandb, oldest first."""
    found = []
    for folder in sorted(Path("outputs/wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        (run,), (end,) = ([r[kind] for r in records if r["type"] == kind] for kind in ("run", "exit"))
        rows = [r["history"]["item"] for r in records if r["type"] == "history"]
        summary = {k: v for r in records if r["type"] == "summary" for k, v in r["summary"]["update"].items()}
        found.append(SimpleNamespace(run=run, rows=rows, summary=summary, code=end["exit_code"]))
    return found


def test_wandb_holds_the_run(run):
    """Identity, flat config, tags, a row an epoch, last and best in the summary; no word on stderr."""
    result = run("loss=dwa", "logger=wandb", "logger.tags=[mine]")
    assert (result.code, result.err) == (0, "") and "wandb sync" in result.out
    files, (fragment,) = results(), fragments()
    names = tuple(fragment.run[key] for key in ("run_id", "display_name", "run_group", "tags"))
    assert names == (files.name, files.name, files.group, ["digits", "wide_resnet", "dwa", "mine"])
    config = fragment.run["config"]["update"]
    assert {"loss._target_": "mtl.losses.DWA", "optimizer.lr": 0.01, "seed": 42}.items() <= config.items()
    assert not [key for key, value in config.items() if isinstance(value, dict) and key != "_wandb"]
    for row, logged in zip(files.rows, fragment.rows, strict=True):
        assert {key: logged[key] for key in (*row, "_step")} == pytest.approx({**row, "_step": row["epoch"]})
    assert {"weights/odd", *TESTS} <= set(files.rows[0])
    for key, better in TESTS.items():
        column = [row[key] for row in files.rows]
        assert fragment.summary[key] == pytest.approx({"last": column[-1], better: getattr(np, better)(column)})
    assert (fragment.code, fragment.summary["status"], fragment.summary["epochs"]) == (0, "finished", 3)


def test_a_failed_wandb_run_goes_on_where_it_was(run, monkeypatch):
    """Marked as failed; then the same id, the steps that follow, and none twice."""
    train_epoch = Learner.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", lambda *a: train_epoch(*a) if a[2] < 1 else 1 / 0)
        assert run("logger=wandb").code == 1
    time.sleep(1.1)  # W&B names a folder by the second
    assert run("logger=wandb").code == 0
    first, second = fragments()
    assert first.run["run_id"] == second.run["run_id"]
    assert [[row["_step"] for row in f.rows] for f in (first, second)] == [[1], [2, 3]]
    assert [(f.code, f.summary["status"]) for f in (first, second)] == [(1, "failed"), (0, "finished")]


def test_two_runs_of_a_grid_are_two_wandb_runs(run):
    assert run("-m", "logger=wandb", "seed=0,1").code == 0
    assert [(f.run["run_id"].split("-")[2], len(f.rows), f.code) for f in fragments()] == [("s0", 3, 0), ("s1", 3, 0)]


def test_a_grid_is_one_more_wandb_run_with_its_ranks(run):
    """What only several runs together say: Δm, where there are baselines, and mean ranks."""
    assert run("-m", "logger=wandb", "loss=equal,dwa", "seed=0", "trainer.epochs=1").code == 0
    (grid,) = (f for f in fragments() if f.run["run_id"].startswith("summary-digits"))
    assert len(fragments()) == 3 and grid.code == 0
    ranks = {key: value for key, value in grid.summary.items() if key.startswith("mean_rank")}
    assert set(ranks) == {"mean_rank/equal", "mean_rank/dwa"} and sum(ranks.values()) == pytest.approx(3)


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "summary", "finish"])
def test_wandb_cannot_stop_a_run(run, monkeypatch, broken):
    """Whichever of its calls raises: one line says so, and all files are written."""
    fake, error = mock.MagicMock(), mock.Mock(side_effect=wandb.Error("no service"))
    if broken == "init":
        monkeypatch.setattr(wandb, broken, error)
    else:
        fake.configure_mock(**{"summary.update" if broken == "summary" else broken: error})
        monkeypatch.setattr(wandb, "init", lambda **settings: fake)
    result = run("logger=wandb")
    assert result.code == 0 and error.called and result.out.count("without it") == 1
    assert results().status == "finished" and len(results().rows) == 3


def test_a_malformed_key_means_offline(run, monkeypatch):
    """W&B raises when it sees a key of 3 characters."""
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    result = run("logger=[tensorboard,wandb]", "trainer.epochs=1")
    assert (result.code, result.err) == (0, "") and re.search("refused the key .*, so offline; upload with", result.out)
    (fragment,) = fragments()
    assert [row["_step"] for row in fragment.rows] == [1]
    assert next(results().path.glob("tensorboard/events*")).stat().st_size > 0  # several loggers at once


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_wandb_never_asks(run, monkeypatch, mode):
    """On a terminal, not logged in."""

    class Keyboard(io.StringIO):
        isatty, asked = (lambda self: True), False

        def readline(self, *arguments):
            self.asked = True
            return ""

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = run("logger=wandb", f"logger.mode={mode}")
    assert result.code == 0 and not sys.stdin.asked


def arguments_of_init(monkeypatch, mode: str) -> dict:
    monkeypatch.setattr("mtl.tracking.wandb._reachable", lambda url: True)
    monkeypatch.setattr(wandb, "init", init := mock.MagicMock())
    identity = Identity("digits", "resnet20", "dwa", "0a1b2c3d", 7)
    WandbTracker(mode=mode).start(RunInfo(identity, Path("run"), Path("outputs"), {"a.b": 1}, {"test/ink_mae": False}))
    return init.call_args.kwargs


@pytest.mark.parametrize(
    ("environment", "login", "mode", "expected"),
    [({}, "", "auto", "offline"), (KEY, "", "auto", "online"), ({}, "0" * 40, "auto", "online"),
     (KEY, "", "offline", "offline"), ({**KEY, "WANDB_MODE": "offline"}, "", "auto", "offline")],
)  # fmt: skip
def test_wandb_is_online_when_logged_in_and_not_told_otherwise(run, monkeypatch, environment, login, mode, expected):
    """By key or by `wandb login`; W&B's own variable counts too."""
    wandb.teardown()
    for name, value in {"WANDB_SILENT": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    if login:
        host = urlparse(wandb.Settings().base_url).hostname
        Path("netrc").write_text(f"machine {host}\n  login user\n  password {login}\n")
        Path("netrc").chmod(0o600)
    try:
        assert arguments_of_init(monkeypatch, mode)["mode"] == expected
    finally:
        wbauth.unauthenticate_session()
        wandb.teardown()


def test_wandbs_service_is_given_an_absolute_path(run, monkeypatch):
    """Another process, which may be older than this run and work in another directory, writes the files."""
    assert Path(arguments_of_init(monkeypatch, "offline")["dir"]).is_absolute()


class Busy(BaseHTTPRequestHandler):
    """A server that is there and cannot help."""

    def do_GET(self):
        self.send_error(500)

    do_POST, log_message = do_GET, lambda *arguments: None


@pytest.mark.parametrize("server", ["absent", "silent", "busy"])
def test_a_key_without_a_network_means_offline(run, monkeypatch, server):
    """Nobody listens, somebody who never answers, somebody who answers with errors: bounded, and nothing is lost."""
    monkeypatch.setattr(tracking, "PROBE", 1.0)
    monkeypatch.setattr(tracking, "BEGIN", 2.0)
    url, http = "http://127.0.0.1:9", None
    if server == "busy":
        http = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
    listener = socket.create_server(("127.0.0.1", 0))
    if server == "silent":
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    wandb.teardown()
    for name, value in {"WANDB_BASE_URL": url, "WANDB_SILENT": "true", **KEY}.items():
        monkeypatch.setenv(name, value)
    try:
        tracker, info = (
            WandbTracker(),
            RunInfo(Identity("d", "a", "l", "0a1b2c3d", 7), Path("run"), Path("outputs"), {}, {}),
        )
        line = tracker.start(info)
        tracker.log({"epoch": 1, "test/ink_mae": 0.5})
        tracker.finish({"status": "finished"}, ok=True)
    finally:
        wbauth.unauthenticate_session()
        wandb.teardown()
        listener.close()
        if http:
            http.shutdown()
    why = "W&B refused" if server == "busy" else f"{url} cannot be reached"
    assert line.startswith(why) and "offline; upload with: wandb sync" in line
    (fragment,) = fragments()
    assert [row["test/ink_mae"] for row in fragment.rows] == [0.5] and fragment.summary["status"] == "finished"


def test_a_sweep_is_told_of_a_run_that_was_there_before(run, monkeypatch):
    """W&B chooses the id, one per point: the finished run is told from its start, the sweep's own values stand."""
    assert run("logger=none", "loss=dwa").code == 0
    Path("point.yaml").write_text("wandb_version: 1\nloss:\n  value: dwa\nseed:\n  value: 42\n")
    sweep = {
        "WANDB_SWEEP_ID": "s",
        "WANDB_RUN_ID": "point1",
        "WANDB_SWEEP_PARAM_PATH": str(Path("point.yaml").resolve()),
    }
    wandb.teardown()
    for name, value in sweep.items():
        monkeypatch.setenv(name, value)
    try:
        result = run("logger=wandb", "loss=dwa")
    finally:
        wandb.teardown()
    assert result.code == 0 and "finished 2" in result.out and "run    " not in result.out
    (fragment,) = fragments()
    assert fragment.run["run_id"] == "point1" and fragment.code == 0
    assert [row["test/digit_accuracy"] for row in fragment.rows] == [r["test/digit_accuracy"] for r in results().rows]
    assert fragment.run["config"]["update"]["loss"] == "dwa" and "max" in fragment.summary["test/digit_accuracy"]


def test_the_best_checkpoint_is_an_artifact_on_request(run):
    assert run("logger=wandb", "logger.artifact=best").code == 0
    (folder,) = Path("outputs/wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    records = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (artifact,) = (r["artifact"] for r in map(json.loads, records) if r["type"] == "artifact" and "model" in str(r))
    assert (artifact["name"], artifact["type"], "best" in artifact["aliases"]) == (results().name, "model", True)
    metadata = json.loads(artifact["metadata"])
    assert metadata["loss"] == "equal" and metadata["best/digit_accuracy"] == max(
        row["test/digit_accuracy"] for row in results().rows
    )
    (entry,) = artifact["manifest"]["contents"]
    assert (
        entry["path"] == "best.pt"
        and Path(entry["local_path"]).read_bytes() == (results().path / "best.pt").read_bytes()
    )


def test_tensorboard_holds_the_rows(run):
    result = run("logger=tensorboard")
    assert (result.code, result.err) == (0, "") and f"tensorboard --logdir {Path('outputs').resolve()}" in result.out
    events = EventAccumulator(str(results().path / "tensorboard")).Reload()
    for row in results().rows:
        values = {key: e.value for key in row for e in events.Scalars(key) if e.step == row["epoch"]}
        assert values == pytest.approx(row, rel=1e-6)
    # The config as text, and a row of the tab HPARAMS.
    (text,) = events.Tensors("config/text_summary")
    assert "optimizer.lr: 0.01" in text.tensor_proto.string_val[0].decode()
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert b"optimizer.lr" in plugin.content and b"wide_resnet" in plugin.content
    (last,) = events.Scalars("last/test/odd_accuracy")
    assert last.value == pytest.approx(results().rows[-1]["test/odd_accuracy"])


def test_tensorboard_missing_is_one_line_and_leaves_nothing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = run("logger=tensorboard")
    assert result.code == 1 and re.fullmatch(r"error: .*pip install tensorboard\n", result.err)
    assert not Path("outputs").exists()


def test_flatten_keeps_lists_and_empty_nodes():
    nested = {"seed": 0, "loss": {"a": {"b": None}, "w": [1, 2]}, "args": {}}
    assert flatten(nested) == {"seed": 0, "loss.a.b": None, "loss.w": [1, 2], "args": {}}


def test_an_epoch_is_one_line_of_what_there_is():
    row = {"epoch": 7, "train/fine_loss": 1.23456, "train/fine_accuracy": 61.5, "lr": 0.1}
    row |= {"train/size_loss": 0.5, "train/size_mae": 0.12345, "time/images_per_second": 12345.6}
    tasks = {"fine": ("accuracy", "%"), "size": ("mae", "")}
    line = console.epoch_line(row, tasks, 200, 75)
    assert line == "epoch   7/200 | train fine 1.235 61.5%, size 0.500 0.1235 | lr 0.1 | 12,346 img/s | ETA 1m15s"
    tests = {key.replace("train", "test"): 2 * value for key, value in row.items() if key.startswith("train/")}
    line = console.epoch_line({**row, **tests, "weights/fine": 1.5, "weights/size": 0.5}, tasks, 7, 0)
    assert line == ("epoch 7/7 | train fine 1.235 61.5%, size 0.500 0.1235 | test fine 2.469 123%, size 1.000 0.2469 | "
                    "w 1.50/0.50 | lr 0.1 | 12,346 img/s")  # fmt: skip


def epoch(names):
    row = {"epoch": 3, "lr": 0.1, "time/images_per_second": 12345.6}
    for i, name in enumerate(names):
        for split in ("train", "test"):
            row |= {f"{split}/{name}_loss": 1.0 + i, f"{split}/{name}_accuracy": 50.0 + i}
        row[f"weights/{name}"] = 0.1 * i
    return row, {name: ("accuracy", "%", True) for name in names}


@pytest.mark.parametrize("names", [["a"], ["digit", "odd", "ink"], [f"attribute_{i}" for i in range(40)]])
@pytest.mark.parametrize("width", [60, 80, 100, 110, 300])
def test_an_epoch_fits_the_terminal(names, width):
    row, tasks = epoch(names)
    line = console.epoch_line(row, tasks, 200, 75)
    short = line if len(line) <= width else line.fit(width)
    assert len(short) <= width and short.startswith("epoch   3/200 | ") and "test " in short
    assert f"{row[f'test/{names[-1]}_accuracy']:.4g}" in short  # dropped first: what the training batches say


def test_many_tasks_are_shown_by_their_mean_the_worst_and_the_best():
    row, tasks = epoch([f"t{i}" for i in range(40)])
    tasks["t0"], row["test/t0_mae"], row["train/t0_mae"] = ("mae", "", False), 0.25, 0.5
    line = console.epoch_line(row, tasks, 5, 0)
    assert "test t0 mae 0.25, 39 accuracy 70% (worst t1 51, best t39 89)" in line and "w 0.00 to 3.90" in line
    errors = {name: ("mae", "", False) for name in "abcde"}
    row |= {f"test/{n}_mae": float(i) for i, n in enumerate(errors)} | {f"test/{n}_loss": 0.0 for n in errors}
    assert "test 5 mae 2 (worst e 4, best a 0)" in console.epoch_line(row, errors, 5, 0)
    # Errors in different units have no common mean.
    errors |= {"a": ("mae", " D", False), "b": ("mae", " meV", False), "c": ("mae", " meV", False)}
    line = console.epoch_line(row, errors, 5, 0)
    assert "test a mae 0 D, 2 mae 1.5 meV (worst c 2, best b 1), 2 mae 3.5 (worst e 4, best d 3)" in line


def test_what_was_not_measured_is_not_said():
    row, tasks = epoch([f"t{i}" for i in range(6)])
    tasks["t5"], row["test/t5_ap"] = ("ap", "%", True), 0.5  # average precision is not measured in training
    line = console.epoch_line(row, tasks, 5, 0)
    assert "train 5 accuracy 52% (worst t0 50, best t4 54) | test 5 accuracy" in line and ", t5 ap 0.5%" in line
    boxes = {name: ("ap", "%", True) for name in tasks}
    row |= {f"test/{name}_ap": 1.0 for name in tasks}
    assert "train mean loss 3.500 | test 6 ap 1%" in console.epoch_line(row, boxes, 5, 0)
    # A split without labels, and an undefined value, have a dash: of few tasks and of many.
    row |= {"test/t5_ap": math.nan, "test/t5_loss": math.nan, "test/t1_accuracy": math.nan}
    assert "t5 ap –" in console.epoch_line(row, tasks, 5, 0)
    few = {name: tasks[name] for name in ("t0", "t1", "t5")}
    assert "| test t0 1.000 50%, t1 2.000 –, t5 – | w" in console.epoch_line(row, few, 5, 0)


def test_five_tasks_of_different_kinds_fit_a_terminal_without_losing_one():
    kinds = {"boxes_boxes": "ap", "boxes_segmentation": "miou", "rooms_segmentation": "miou"}
    kinds |= {"rooms_depth": "abs_err", "rooms_normals": "mean"}
    tasks = {name: (kind, "%" if kind in ("ap", "miou") else "", True) for name, kind in kinds.items()}
    row = {"epoch": 3, "lr": 0.1, "time/images_per_second": 12345.6}
    row |= {f"{s}/{t}_loss": 1.25 for s in ("train", "test") for t in tasks}
    row |= {f"{s}/{t}_{kind}": 21.25 for s in ("train", "test") for t, kind in kinds.items()}
    short = console.epoch_line(row, tasks, 200, 75).fit(118)
    assert len(short) <= 118 and "…" not in short and "rooms_normals mean 21.25" in short


def test_a_wide_table_is_folded():
    header, rows = ["strategy", *(f"metric_{i}" for i in range(12))], [["equal", *("1.5" for _ in range(12))]]
    text = f"title\n{console.table(header, rows)}"
    assert console.fold(text, None) == console.fold(text, 500) == text
    lines = console.fold(text, 60).splitlines()
    assert max(map(len, lines)) <= 60 and lines[0] == "title"
    assert sum(line.startswith("strategy") for line in lines) == 3
    assert [f"metric_{i}" for i in range(12)] == re.findall(r"metric_\d+", "\n".join(lines))


def test_a_line_is_no_wider_than_the_terminal_and_removes_the_live_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", live := io.StringIO())
    monkeypatch.setattr(console.Progress, "drawn", True)
    handler = console.Console(out := io.StringIO())
    logger = logging.Logger("a")
    logger.addHandler(handler)
    logger.info(console.wrapped("data      " + "word " * 20, 10))
    logger.info("a command that is to be copied stays as it is, though it is long")
    lines = out.getvalue().splitlines()
    assert live.getvalue() == "\r\033[K" and not console.Progress.drawn
    assert len(lines) == 5 and all(len(line) <= 40 for line in lines[:4]) and lines[1].startswith(" " * 10 + "word")


def test_a_header_is_said_again_where_it_differs_only():
    logger = logging.Logger("a")
    logger.addHandler(console.Console(out := io.StringIO()))
    for loss in ("equal", "equal", "dwa"):
        logger.info(console.Heading("data", "digits"))
        logger.info(console.Heading("strategy", loss))
        logger.info("trained")
    said = ["data      digits", "strategy  equal", "trained", "trained", "strategy  dwa", "trained"]
    assert out.getvalue().splitlines() == said


def test_the_live_line_shows_the_loss(monkeypatch):
    stream, clock = io.StringIO(), iter([0.0, 10.0, 11.0])
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setenv("COLUMNS", "30")
    progress = console.Progress(4, "epoch 1/2")
    progress.update(2, [torch.tensor(1.5), torch.tensor(0.25)])
    assert stream.getvalue() == "\r\033[Kepoch 1/2: step 2/4, loss 1.75"[: 4 + 29]


def test_numbers_of_things():
    assert [console.count(n, "epoch") for n in (0, 1, 1200)] == ["0 epochs", "1 epoch", "1,200 epochs"]


def test_tables_and_durations():
    expected = "loss  accuracy\n----  --------\ndwa       67.5\nx            8"
    assert console.table(["loss", "accuracy"], [["dwa", "67.5"], ["x", "8"]]) == expected
    durations = {0: "0s", 59.4: "59s", 59.6: "1m00s", 75: "1m15s", 3599.7: "1h00m", 4000: "1h06m"}
    assert {seconds: console.duration(seconds) for seconds in durations} == durations


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_line_is_for_terminals_only(monkeypatch, terminal):
    """Redrawn in place when a fifth of a second has gone by, and removed in the end."""
    stream, clock = io.StringIO(), iter([0.0, 0.1, 10.0, 10.1])
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    progress = console.Progress(4, "epoch 1/2")
    for done in (1, 2, 3):
        progress.update(done)
    progress.clear()
    assert stream.getvalue() == ("\r\033[Kepoch 1/2: step 2/4, 10s left\r\033[K" if terminal else "")


def test_a_grid_ends_with_a_table_a_figure_and_what_failed(run):
    """Mean and sample standard deviation over the seeds that finished; the exit code is the refused cell's."""
    result = run("-m", "logger=none", "seed=0,1,-1")
    assert result.code == 2 and "2 of 3 runs finished" in result.out
    assert re.search(r"refused: python train.py .*seed=-1.*: seed=-1: must be .*0", result.out)
    seeds = [[json.loads(line) for line in f.read_text().splitlines()] for f in Path("outputs").rglob("metrics.jsonl")]
    cells = ["equal", "2"]
    for key, better in TESTS.items():
        columns = np.array([[row[key] for row in rows] for rows in seeds])
        for values in (columns[:, -1], getattr(columns, better)(axis=1)):
            digits = 2 if values.mean() >= 10 else 4
            cells.append(f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}")
    (line,) = (line for line in result.out.splitlines() if line.startswith("equal "))
    assert re.split(r"\s{2,}", line) == cells
    figure = Path(re.search(r"figure: (.*)", result.out)[1])
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
