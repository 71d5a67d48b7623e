"""Faults of machine and hand: damaged, foreign, missing and unwritable files, signals at bad moments, lost loggers.

Every one ends in the right numbers or in one line that names the file; nothing that was there is overwritten.
"""

import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import stat
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl.cli.command import launch
from mtl.config.identity import Identity
from mtl.data.digits import Digits
from mtl.engine import checkpoint, files
from mtl.engine.build import assemble
from mtl.engine.directory import RunDirectory
from mtl.engine.learner import Learner
from mtl.engine.replay import inspect
from mtl.engine.resume import resume
from mtl.errors import SetupError
from mtl.tracking import RunInfo, Tracker, flatten
from mtl.tracking import wandb as tracking
from mtl.tracking.wandb import WandbTracker

SMALL = ("data=digits", "data.limit_train=50", "data.limit_test=40", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "optimizer.lr=0.01", "trainer.epochs=3", "logger=none")  # fmt: skip


@pytest.fixture
def run(cli):
    """`run("a", "seed=1")` runs the small command into the output root a."""
    torch.set_num_threads(1)
    return lambda root="a", options="": cli(*SMALL, f"output_root={root}", *options.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Output roots made once: `finished`, `parts` (two of three epochs, then an error), `other` (of another seed)."""
    import train

    torch.set_num_threads(1)
    folder, real = tmp_path_factory.mktemp("made"), Learner.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed, epochs in (("finished", 42, 3), ("parts", 42, 2), ("other", 1, 2)):
            patch.setattr(Learner, "train_epoch", lambda *a, last=epochs: real(*a) if a[2] < last else 1 / 0)
            patch.setattr(sys, "argv", ["train.py", *SMALL, f"output_root={name}", f"seed={seed}"])
            GlobalHydra.instance().clear()
            logging.getLogger("mtl").handlers = []
            assert launch(train.main) == (0 if epochs == 3 else 1)
    return folder


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """`copy("parts")` puts a copy of that root here and returns the directory of its only run."""
    monkeypatch.chdir(tmp_path)

    def call(name: str) -> Path:
        shutil.copytree(made / name, tmp_path / name)
        return only(name)

    return call


@pytest.fixture(scope="module")
def learner(made):
    """Of the runs that `made` holds."""
    config = yaml.safe_load(next((made / "parts").rglob("config.yaml")).read_text())
    return assemble(config)[1]


@pytest.fixture
def resumed(learner):
    """`resumed(directory, "words")`: the run is refused with these words, and no file changes."""

    def call(directory: Path, words: str) -> None:
        before, name = content(directory), json.loads((directory / "run.json").read_text())["name"]
        with pytest.raises(SetupError, match=words) as error:
            if "finished" in directory.parts:
                inspect(RunDirectory(directory), name, 3, lambda: pytest.fail("nothing to build"))
            resume(RunDirectory(directory), name, learner)
        assert content(directory) == before and "\n" not in str(error.value)

    return call


def only(root: str) -> Path:
    (file,) = Path(root).rglob("metrics.jsonl")
    return file.parent


def content(directory: Path) -> dict[str, bytes]:
    """The files of a directory; what is no regular file only by its kind."""
    return {
        f.name: f.read_bytes() if f.is_file() else str(stat.S_IFMT(f.lstat().st_mode)).encode()
        for f in directory.iterdir()
        if f.name != ".lock"
    }


def refused(result, *words: str) -> None:
    """One line on stderr, exit code 1."""
    assert result.code == 1, (result.out, result.err)
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert all(word in result.err for word in words), result.err


def same_numbers(a: str, b: str) -> None:
    """Two finished runs agree in their rows, times aside, and in every bit of their checkpoints."""
    rows, states = [], []
    for root in (a, b):
        directory = only(root)
        assert json.loads((directory / "run.json").read_text())["status"] == "finished"
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        rows.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines])
        states.append([checkpoint.load(directory / name) for name in ("last.pt", "best.pt")])
    assert rows[0] == rows[1]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ damaged checkpoints


def flip(data: bytes) -> bytes:
    """One bit of the largest tensor: what lies between the members of the file, padding, holds nothing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        middle = data.index(archive.read(largest)) + largest.file_size // 2
    return data[:middle] + bytes([data[middle] ^ 64]) + data[middle + 1 :]


DAMAGE = {
    "a bit": flip,
    "zeros": lambda data: data[:50_000] + bytes(4096) + data[54_096:],
    "cut": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "text": lambda data: b"hello",
    "all zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed(resumed, copy, damage):
    last = copy("parts") / "last.pt"
    data = DAMAGE[damage](last.read_bytes())
    last.unlink()  # best.pt may be the same file
    last.write_bytes(data)
    resumed(last.parent, re.escape(str(last)) + ".*delete it")


def test_a_flipped_bit_is_one_line_of_the_command(run, copy):
    last = copy("parts") / "last.pt"
    data = flip(last.read_bytes())
    last.unlink()
    last.write_bytes(data)
    before = content(last.parent)
    refused(run("parts"), str(last), "delete it")
    assert content(last.parent) == before


def legacy(path: Path) -> None:
    torch.save({"epoch": 1}, path, _use_new_zipfile_serialization=False)


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def changed(path: Path, **fields) -> None:
    state = {**checkpoint.load(path), **fields}
    torch.save({k: v for k, v in state.items() if v is not None}, path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


FOREIGN = {
    "a raw pickle": legacy,
    "another zip": a_zip,
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "no epoch": lambda path: changed(path, epoch=None),
    "no model": lambda path: changed(path, model=None),
    "no optimizer": lambda path: changed(path, optimizer=None),
    "no strategy": lambda path: changed(path, strategy=None),
    "epoch 1": lambda path: changed(path, epoch=1),
    "epoch 0": lambda path: changed(path, epoch=0),
    "epoch -1": lambda path: changed(path, epoch=-1),
    "epoch 7": lambda path: changed(path, epoch=7),
    "a word as epoch": lambda path: changed(path, epoch="two"),
    "another network": lambda path: changed(path, model={"weight": torch.ones(3)}),
    "another optimizer": lambda path: changed(path, optimizer={"state": {}, "param_groups": []}),
    "another optimizer's shape": lambda path: changed(path, optimizer={"param_groups": 3}),
    "another method": lambda path: changed(path, strategy={"s": torch.ones(3)}),
    "a folder": folder,
    "a FIFO": fifo,
    "a link to nothing": dangling,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_no_checkpoint_of_this_run_is_refused(resumed, copy, what):
    """Without another word, such as a warning of torch's; no file changes."""
    last = copy("parts") / "last.pt"
    (last.parent / "best.pt").unlink()
    FOREIGN[what](last)
    resumed(last.parent, "last.pt")


@pytest.mark.parametrize("what", ["a raw pickle", "another network"])
def test_a_foreign_checkpoint_is_one_line_of_the_command(run, copy, what):
    last = copy("parts") / "last.pt"
    (last.parent / "best.pt").unlink()
    FOREIGN[what](last)
    refused(run("parts"), "last.pt")


@pytest.mark.parametrize("file", ["last.pt", "metrics.jsonl", "run.json"])
def test_a_file_of_another_run_is_noticed(run, copy, file):
    """The same architecture, the same number of epochs, another seed."""
    here, other = copy("parts"), copy("other")
    (here / file).unlink()
    shutil.copy(other / file, here / file)
    before = content(here)
    refused(run("parts"), file)
    assert content(here) == before


def test_an_older_checkpoint_without_a_name_goes_on(run, copy, made):
    last = copy("parts") / "last.pt"
    changed(last, run=None, rows=None)
    assert run("parts").code == 0
    shutil.copytree(made / "finished", "finished")
    same_numbers("parts", "finished")


# --------------------------------------------------------------------------------------------------- damaged metrics


def lines(change):
    """Damage to the list of a file's lines."""

    def apply(path: Path) -> None:
        path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))

    return apply


def row(change):
    """Damage to the first row."""

    def apply(all_lines: list[bytes]) -> list[bytes]:
        first = json.loads(all_lines[0])
        change(first)
        return [json.dumps(first).encode(), *all_lines[1:]]

    return lines(apply)


METRICS = {
    "not UTF-8": lines(lambda x: [b"\xff\xfe" + x[0], *x[1:]]),
    "a number": lines(lambda x: [b"3", *x[1:]]),
    "null": lines(lambda x: [b"null", *x[1:]]),
    "a list": lines(lambda x: [b"[1, 2]", *x[1:]]),
    "a number at the end": lines(lambda x: [*x, b"3"]),
    "no JSON": lines(lambda x: [b"{", *x[1:]]),
    "nested": lines(lambda x: [b"[" * 100_000, *x[1:]]),
    "no epoch": row(lambda r: r.pop("epoch")),
    "a word as epoch": row(lambda r: r.update(epoch="1")),
    "no metric": row(lambda r: r.pop("test/digit_accuracy")),
    "a word as metric": row(lambda r: r.update({"test/odd_accuracy": "good"})),
    "an edited metric": row(lambda r: r.update({"test/odd_accuracy": 99.0})),
    "null as metric": row(lambda r: r.update({"test/odd_accuracy": None})),
    "twice": lines(lambda x: [x[0], *x]),
    "swapped": lines(lambda x: [x[1], x[0]]),
    "too few": lines(lambda x: x[:1]),
    "empty": lines(lambda x: []),
    "a folder": folder,
    "a FIFO": fifo,
    "a link to nothing": dangling,
}


@pytest.mark.parametrize("what", METRICS)
def test_damaged_metrics_are_refused(resumed, copy, what):
    """Of a run that would go on, and of one that is finished."""
    for root in ("parts", "finished"):
        directory = copy(root)
        METRICS[what](directory / "metrics.jsonl")
        resumed(directory, "metrics.jsonl")


@pytest.mark.parametrize("root", ["parts", "finished"])
def test_damaged_metrics_are_one_line_of_the_command(run, copy, root):
    directory = copy(root)
    METRICS["an edited metric"](directory / "metrics.jsonl")
    before = content(directory)
    refused(run(root), "metrics.jsonl")
    assert content(directory) == before


def test_a_torn_last_row_is_left_out(run, copy, made):
    """As a kill or a power cut leaves it."""
    metrics = copy("parts") / "metrics.jsonl"
    whole = metrics.read_bytes()
    for tail in (b'{"epoch": 3, "tr', b"\xff\xfe", bytes(40), b'{"epoch": 3, \xff'):
        metrics.write_bytes(whole + tail)
        assert [row["epoch"] for row in files.read_rows(metrics)] == [1, 2]
    assert run("parts").code == 0
    shutil.copytree(made / "finished", "finished")
    same_numbers("parts", "finished")


# ------------------------------------------------------------------------------------------ damaged run.json, summary


RUN_JSON = {text: lambda path, t=text: path.write_text(t) for text in ("null", "[]", '"x"', "3", "{}")} | {
    "incomplete": lambda path: path.write_text('{"status": "finished"}'),
    "a number as status": lambda path: path.write_text('{"status": 3}'),
    "deep": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "not UTF-8": lambda path: path.write_bytes(b'\xff\xfe{"status": "finished"}'),
    "a folder": folder,
    "a FIFO": fifo,
    "a link to nothing": dangling,
}


@pytest.mark.parametrize("what", RUN_JSON)
def test_a_damaged_run_json_is_refused(copy, what):
    directory = copy("parts")
    RUN_JSON[what](directory / "run.json")
    with pytest.raises(SetupError, match=r"run\.json"):
        _ = RunDirectory(directory).run


@pytest.mark.parametrize("what", ["null", "incomplete", "a FIFO"])
def test_a_damaged_run_json_is_one_line_of_the_command(run, copy, what):
    directory = copy("finished")
    RUN_JSON[what](directory / "run.json")
    before = content(directory)
    refused(run("finished"), "run.json")
    assert content(directory) == before


def test_a_damaged_summary_is_written_anew(run, copy):
    """From the rows; only the peak memory, which they do not hold, is lost."""
    file = copy("finished") / "summary.json"
    before = json.loads(file.read_text())
    edited = json.dumps({**before, "last": dict.fromkeys(before["last"], 100.0)})
    before.pop("peak_memory_gib")
    for damage in ('{"epochs": 2, "la', "null", edited, None):
        file.unlink() if damage is None else file.write_text(damage)
        result = run("finished")
        assert result.code == 0 and "summary.json was damaged" in result.out and result.err == ""
        assert json.loads(file.read_text()) == before
    assert "summary.json" not in run("finished").out


# ----------------------------------------------------------------------------------------------------------- best.pt


def best_is(root: str, epoch: int) -> None:
    """Let `epoch` be the best of a root's run, in the rows and in the digest that last.pt holds of them."""
    directory = only(root)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for each in rows:
        each["test/digit_accuracy"] = 101.0 if each["epoch"] == epoch else 1.0
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    changed(directory / "last.pt", rows=torch.tensor(list(files.digest(rows)), dtype=torch.uint8))


BEST = {
    "missing": lambda directory: None,
    "cut": lambda directory: (directory / "best.pt").write_bytes((directory / "last.pt").read_bytes()[:1000]),
    "of another epoch": lambda directory: shutil.copy(directory / "last.pt", directory / "best.pt"),
}


@pytest.mark.parametrize("what", BEST)
def test_a_lost_best_checkpoint_is_said_and_never_claimed(run, copy, what):
    """Epoch 1 was the best of two, and no later one is better."""
    directory = copy("parts")
    best_is("parts", 1)
    (directory / "best.pt").unlink()
    BEST[what](directory)
    result = run("parts")
    assert result.code == 0 and "WARNING   best.pt" in result.out and "epoch 1, the best, are lost" in result.out
    assert not (directory / "best.pt").exists() and "last.pt and best.pt" not in result.out
    again = run("parts")
    assert again.code == 0 and "best.pt is missing" in again.out


@pytest.mark.parametrize("what", ["missing", "cut"])
def test_a_lost_best_checkpoint_is_linked_anew_where_last_pt_is_that_epoch(run, copy, what):
    directory = copy("parts")
    best_is("parts", 2)
    (directory / "best.pt").unlink()
    BEST[what](directory)
    assert run("parts").code == 0
    assert checkpoint.load(directory / "best.pt")["epoch"] == 2


def test_a_finished_run_says_which_checkpoint_is_damaged(run, copy):
    directory = copy("finished")
    for name in ("last.pt", "best.pt"):
        (directory / name).unlink()
    (directory / "last.pt").write_bytes(b"PK")
    result = run("finished")
    assert result.code == 0 and "last.pt is damaged" in result.out and "best.pt is missing" in result.out
    assert (directory / "last.pt").read_bytes() == b"PK"


# -------------------------------------------------------------------------------------------------------- divergence


def evaluate_as(patch, **values) -> None:
    """Let evaluation report these values."""
    real = Learner.evaluate
    patch.setattr(Learner, "evaluate", lambda self, b, name: {**real(self, b, name), **values})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["test/ink_mae", "val/odd_loss"])
def test_a_metric_that_is_no_number_is_divergence(run, monkeypatch, key, value):
    """Task, metric, data and epoch are named; no row and no checkpoint holds it."""
    real = Learner.evaluate

    def evaluate(self, batches, name):
        row = real(self, batches, name)
        return {**row, key: value} if key in row and (only("a") / "last.pt").exists() else row

    monkeypatch.setattr(Learner, "evaluate", evaluate)
    result = run("a", "data.val_fraction=0.2")
    split, _, name = key.partition("/")
    refused(
        result, f"{name.replace('_', ' ')} on {split} data became {value} in epoch 2 (last.pt holds the epoch before)"
    )
    info = json.loads((only("a") / "run.json").read_text())
    assert info["status"] == "diverged" and checkpoint.load(only("a") / "last.pt")["epoch"] == 1
    assert len((only("a") / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_too_large_rate_never_ends_as_finished(cli):
    """It did, with an error of nan in the table."""
    result = cli("data=digits", "data.limit_train=64", "data.limit_test=20", "data.batch_size=32", "logger=none",
                 "trainer.epochs=1", "optimizer.lr=30", "seed=0", "output_root=a")  # fmt: skip
    refused(result, " on test data became nan in epoch 1")
    (file,) = Path("a").rglob("run.json")
    assert json.loads(file.read_text())["status"] == "diverged"


def test_a_weight_that_is_no_number_is_divergence(run, monkeypatch):
    """The metrics of a head that nothing reads may stay finite."""

    def spoil(self, batches, name):
        with torch.no_grad():
            next(iter(self.model.heads["ink"].parameters())).fill_(math.nan)
        return {f"{name}/{t.name}_{m}": 1.0 for t in self.tasks for m in ("loss", t.scores[0].name)}

    monkeypatch.setattr(Learner, "evaluate", spoil)
    refused(run("a"), "a weight became nan or inf in epoch 1")
    assert not list(Path("a").rglob("last.pt"))


class Blind(Digits):
    """Not one label of `odd` to train or to test with."""

    def load(self):
        for split in (splits := super().load()).values():
            split.columns["odd"][:] = -100
        return splits


def test_a_task_without_labels_is_null_and_no_divergence(run):
    """In strict JSON, after an interruption too."""
    strict = {"parse_constant": lambda word: pytest.fail(f"{word} is not JSON")}
    assert run("a", f"data._target_={__name__}.Blind").code == 0
    rows = [json.loads(line, **strict) for line in (only("a") / "metrics.jsonl").read_text().splitlines()]
    assert [r["test/odd_accuracy"] for r in rows] == [None] * 3 == [r["train/odd_loss"] for r in rows]
    summary = json.loads((only("a") / "summary.json").read_text(), **strict)
    assert summary["last"]["test/odd_accuracy"] is None and summary["last"]["test/ink_mae"] > 0
    json.loads((only("a") / "run.json").read_text(), **strict)
    assert all(math.isnan(r["test/odd_accuracy"]) for r in RunDirectory(only("a")).rows())
    assert "finished" in run("a", f"data._target_={__name__}.Blind").out


# ---------------------------------------------------------------------------------------------------- unwritable disks


class Disk:
    """A disk that refuses one file, from its nth write on, as an operating system does."""

    def __init__(self, patch, name: str, number: int, code: int):
        self.name, self.left, self.code = name, number, code
        real, replace = Path.open, os.replace
        patch.setattr(Path, "open", lambda path, mode="r", *a, **k: self.check(path, mode) or real(path, mode, *a, **k))
        patch.setattr(os, "replace", lambda a, b: self.check(Path(b), "w") or replace(a, b))

    def check(self, path: Path, mode: str) -> None:
        if path.name == self.name and any(letter in mode for letter in "wa+"):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code), str(path))


@pytest.mark.parametrize(
    ("file", "code"),
    [("metrics.jsonl", errno.ENOSPC), ("last.pt", errno.EIO), ("last.tmp", errno.ENOSPC), ("best.pt", errno.EACCES),
     ("summary.json", errno.EROFS), ("run.json", errno.ENOSPC)],
)  # fmt: skip
def test_a_disk_that_takes_no_more_is_one_line(run, made, monkeypatch, file, code):
    """File, folder and reason; no second error, nothing half-written; the same command goes on to the same bits."""
    with monkeypatch.context() as patch:
        first = {"metrics.jsonl": 2, "run.json": 1, "summary.json": 0}.get(file, 1)
        Disk(patch, file, first, code)
        result = run("a")
    named = "last.pt" if file == "last.tmp" else file
    refused(result, f"cannot write {named} in ", str(only("a")), os.strerror(code), "epochs are saved")
    assert "Traceback" not in result.out and not list(Path("a").rglob("*.tmp"))
    info = json.loads((only("a") / "run.json").read_text())
    if file != "run.json":
        assert info["status"] == "failed" and file.replace("tmp", "pt") in info["error"]
    assert run("a").code == 0
    shutil.copytree(made / "finished", "finished")
    same_numbers("a", "finished")


@pytest.mark.parametrize("file", ["config.yaml", "run.json"])
def test_a_run_that_cannot_begin_leaves_nothing(run, monkeypatch, file):
    with monkeypatch.context() as patch:
        Disk(patch, file, 0, errno.ENOSPC)
        refused(run("a"), f"cannot write {file}")
    assert not Path("a").exists()


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_folder_that_goes_away_is_one_line(run, made, monkeypatch, how):
    real = Learner.train_epoch

    def train_epoch(self, batches, epoch):
        if epoch == 1:
            shutil.rmtree("a") if how == "deleted" else os.rename("a", "b")
        return real(self, batches, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "train_epoch", train_epoch)
        result = run("a")
    refused(result, "cannot write metrics.jsonl in ", "No such file or directory")
    assert not Path("a").exists()
    if how == "moved":
        assert run("b").code == 0
        shutil.copytree(made / "finished", "finished")
        same_numbers("b", "finished")


def test_a_full_disk_keeps_the_status_true(tmp_path, monkeypatch):
    """No room for a second file: then run.json is written over, in its own blocks."""
    file = tmp_path / "run.json"
    files.write_json(file, {"status": "running", "error": None})

    def full(path, *arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    files.write_json(file, {"status": "failed"})
    assert json.loads(file.read_text()) == {"status": "failed"} and [f.name for f in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(files.WriteError, match=r"cannot write run.json in .*: No space left"):
        files.write_json(file, {"status": "x" * 100_000})


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("method", "number", "code"),
    [("start", signal.SIGINT, 130), ("start", signal.SIGTERM, 143), ("finish", signal.SIGTERM, 143)],
)
def test_a_signal_while_the_tracker_works_is_an_interruption(run, made, monkeypatch, method, number, code):
    """While W&B starts or uploads, too; and a second one does not change that."""
    real = getattr(Tracker, method)

    def interrupted(self, *arguments, **settings):
        signal.raise_signal(number)
        return real(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, method, interrupted)
        assert run("a").code == code
    (file,) = Path("a").rglob("run.json")
    assert json.loads(file.read_text())["status"] == "interrupted"
    assert run("a").code == 0
    shutil.copytree(made / "finished", "finished")
    same_numbers("a", "finished")


@pytest.mark.parametrize("function", ["save", "link"])
def test_a_signal_waits_until_an_epochs_files_agree(run, monkeypatch, function):
    """Between row and checkpoint, or checkpoint and best.pt: the epoch counts, in files and in the summary."""
    real = getattr(checkpoint, function)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(checkpoint, function, interrupted)
    assert run("a").code == 143
    summary, rows = json.loads((only("a") / "summary.json").read_text()), RunDirectory(only("a")).rows()
    assert summary["epochs"] == len(rows) == checkpoint.load(only("a") / "last.pt")["epoch"] == 1
    assert checkpoint.load(only("a") / "best.pt")["epoch"] == 1


class Notes(Tracker):
    """Remembers what it was told, run after run."""

    told: list[tuple[str, object]] = []

    def start(self, info):
        self.told.append(("start", [row["epoch"] for row in info.rows]))
        return ""

    def log(self, row):
        self.told.append(("log", row["epoch"]))

    def finish(self, summary, ok):
        self.told.append(("finish", ok))


def test_an_epoch_that_is_saved_is_told_whatever_comes_between(run, monkeypatch):
    """A signal between checkpoint and log: the tracker gets the row before the run ends."""
    real = checkpoint.save

    def interrupted(*arguments):
        real(*arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Notes, "told", [])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        assert run("a", f"logger._target_={__name__}.Notes").code == 143
    assert run("a", f"logger._target_={__name__}.Notes").code == 0
    assert Notes.told == [("start", []), ("log", 1), ("finish", False),
                          ("start", [1]), ("log", 2), ("log", 3), ("finish", True)]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- lock


def test_a_look_at_a_run_never_keeps_it_from_starting(run, copy):
    """`busy`, in a tight loop, while the run is resumed again and again."""
    directory, done = RunDirectory(copy("parts")), threading.Event()
    thread = threading.Thread(target=lambda: [directory.busy for _ in iter(done.is_set, True)])
    thread.start()
    try:
        for _ in range(200):
            with RunDirectory(directory.path):
                pass
    finally:
        done.set()
        thread.join()
    with RunDirectory(directory.path):
        assert directory.busy
    assert not directory.busy


# ---------------------------------------------------------------------------------------------------------------- W&B


def fake_wandb(monkeypatch, run_step: int = 0):
    """W&B's `init` as a mock; returns it."""
    from unittest import mock

    import wandb

    init = mock.MagicMock()
    init.return_value.step, init.return_value.id = run_step, "name"
    init.return_value.settings.sync_dir = "a/wandb/offline-run-9-name"
    monkeypatch.setattr(wandb, "init", init)
    return init


def info(rows=(), **names) -> RunInfo:
    identity = Identity(**{"data": "d", "arch": "a", "loss": "l", "digest": "0a1b2c3d", "seed": 7, **names})
    return RunInfo(identity, Path("run"), Path("a"), {}, {}, rows)


ROWS = tuple({"epoch": epoch, "x": 0.5} for epoch in (1, 2, 3, 4))


def test_wandb_is_given_the_epochs_that_earlier_folders_lack(cli, monkeypatch):
    """One folder holds epochs 1 and 2, one is empty, as a kill leaves it, one cannot be read."""
    for number, size in ((1, 500), (2, 7), (3, 500)):
        (Path("a/wandb") / f"offline-run-{number}-name").mkdir(parents=True)
        (Path("a/wandb") / f"offline-run-{number}-name" / "run-name.wandb").write_bytes(bytes(size))
    lines = [{"type": "history", "history": {"item": {"_step": step}}} for step in (1, 2)]
    output = "\n".join(json.dumps(line) for line in [{"type": "run"}, *lines]).encode()

    def answer(command, **settings):
        if "run-3" in command[-1]:
            raise tracking.subprocess.TimeoutExpired(command, 1)
        return type("Done", (), {"stdout": output if "run-1" in command[-1] else b""})

    monkeypatch.setattr(tracking.subprocess, "run", answer)
    init = fake_wandb(monkeypatch)
    WandbTracker(mode="offline").start(info(ROWS))
    assert [call.kwargs for call in init.return_value.log.call_args_list] == [
        {"step": 3, "commit": True}, {"step": 4, "commit": True}
    ]  # fmt: skip


def test_wandb_online_is_given_the_epochs_that_the_server_lacks(cli, monkeypatch):
    monkeypatch.setattr(tracking, "_reachable", lambda url: True)
    monkeypatch.setattr("wandb.login", lambda **settings: True)
    monkeypatch.delenv("WANDB_MODE")
    init = fake_wandb(monkeypatch, run_step=3)  # the next step
    WandbTracker(mode="online").start(info(ROWS))
    assert [call.kwargs["step"] for call in init.return_value.log.call_args_list] == [3, 4]


@pytest.mark.parametrize("loss", ["custom-a:b#c?d%e/f", "custom-" + "x" * 200, "custom-漢字 'x'", " "])
def test_wandb_accepts_every_name(cli, monkeypatch, loss):
    """As its own settings check them; two long names stay two."""
    import wandb

    init = fake_wandb(monkeypatch)
    for end in ("1", "2"):
        WandbTracker(mode="offline").start(info(loss=loss + end))
    first, second = (call.kwargs for call in init.call_args_list)
    wandb.Settings(run_id=first["id"], run_name=first["name"], run_group=first["group"], run_tags=tuple(first["tags"]))
    assert len(first["id"]) <= 64 and len(first["name"]) <= 128 and len(first["group"]) <= 128
    assert not set(first["id"]) & set(":;,#?/'%\\ ")
    assert all(first[key] != second[key] for key in ("id", "name", "group"))


@pytest.mark.parametrize("option", ["logger.project=a:b", "logger.tags=['']", f"logger.tags=[{'x' * 65}]"])
def test_what_wandb_cannot_accept_is_refused_before_training(run, option):
    result = run("a", f"logger=wandb {option}")
    assert result.code == 2 and option.partition("=")[0] in result.err and result.err.count("\n") == 1
    assert not Path("a").exists()


def test_wandb_without_a_best_checkpoint_says_so(cli, monkeypatch, caplog):
    init = fake_wandb(monkeypatch)
    tracker = WandbTracker(mode="offline", artifact="best")
    tracker.start(info())
    tracker.finish({}, ok=True)
    assert "best.pt is missing" in caplog.text and not init.return_value.log_artifact.called


# --------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_each_epoch_once_after_a_kill(run, monkeypatch):
    """The first process dies between checkpoint and log; the reader sees all epochs, in order, none twice."""

    class Killed(BaseException):
        pass

    from mtl.tracking.tensorboard import TensorBoardTracker

    def kill(self, row):
        if row["epoch"] == 2:
            raise Killed
        real(self, row)

    real = TensorBoardTracker.log
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TensorBoardTracker, "log", kill)
        run("a", "logger=tensorboard")
    assert run("a", "logger=tensorboard").code == 0
    events = EventAccumulator(str(only("a") / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("test/ink_mae")] == [1, 2, 3]


def test_a_broken_tensorboard_takes_no_run_down(run, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    result = run("a", "logger=tensorboard")
    assert result.code == 0 and result.out.count("TensorBoard stopped") == 1


def test_flatten_is_strict_json():
    assert files.plain({"a": [math.nan, 1.0], "b": {"c": math.inf}}) == {"a": [None, 1.0], "b": {"c": None}}
    assert flatten({"a": {"b": 1}}) == {"a.b": 1}
