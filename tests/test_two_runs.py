"""Two runs in one process know nothing of each other: each has the rows, weights and log of a run by itself."""

import json
import logging
import re
import threading

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from mtl.cli.command import CONF
from mtl.config.identity import identify
from mtl.engine import checkpoint, run
from mtl.tracking.console import epoch_line
from mtl.tracking.runlog import RunLog

SMALL = ("data=digits", "data.limit_train=64", "data.limit_test=40", "data.batch_size=32", "arch=wide_resnet",
         "arch.depth=10", "arch.width=1", "arch.dropout=0.2", "optimizer.lr=0.01", "trainer.epochs=3",
         "logger=none")  # fmt: skip
BOTH = ("loss=dwa seed=1", "loss=graddrop seed=2")


def execute(words: str, root) -> "run.Outcome":
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*SMALL, *words.split(), f"output_root={root}"], return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=True)
    return run.run(plain, choices, identify(plain, choices), f"python train.py {words}")


class Turns:
    """Of two threads one works at a time, and each hands over at the end of an epoch: torch's generator is global."""

    def __init__(self):
        self.free, self.left, self.turn = threading.Condition(), {0, 1}, 0
        self.number = threading.local()

    def take(self):
        with self.free:
            self.free.wait_for(lambda: self.turn == self.number.value, timeout=60)

    def give(self):
        with self.free:
            if 1 - self.number.value in self.left:
                self.turn = 1 - self.number.value
            self.free.notify_all()


def test_runs_that_take_turns_in_one_process_are_those_of_a_process_each(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    log = logging.getLogger("mtl")
    monkeypatch.setattr(log, "level", logging.DEBUG)
    monkeypatch.setattr(log, "handlers", [])
    order, turns = [], Turns()

    def between(row, *rest):
        order.append(turns.number.value)
        turns.give()
        turns.take()
        return epoch_line(row, *rest)

    def thread(number):
        turns.number.value = number
        turns.take()
        try:
            execute(BOTH[number], tmp_path / "together")
        finally:
            turns.left.discard(number)
            turns.give()

    for words in BOTH:
        assert execute(words, tmp_path / "alone").status == "finished"
    monkeypatch.setattr(run, "epoch_line", between)
    threads = [threading.Thread(target=thread, args=(number,)) for number in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert order == [0, 1, 0, 1, 0, 1] and not log.handlers
    alone = sorted((tmp_path / "alone").rglob("metrics.jsonl"))
    assert len(alone) == 2
    for file in alone:
        twin = tmp_path / "together" / file.relative_to(tmp_path / "alone")
        assert rows(twin) == rows(file)
        weights = [checkpoint.load(f.with_name("last.pt"))["model"] for f in (file, twin)]
        assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
        ours, theirs = ((f.with_name("train.log")).read_text().splitlines() for f in (file, twin))
        assert [steady(line) for line in ours] == [steady(line) for line in theirs]


def rows(file) -> list[dict]:
    lines = file.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def steady(line: str) -> str:
    """What a line of train.log says, without times and folders."""
    words = line.split(" ", 2)[2]
    return words.partition(" | lr ")[0] if words.startswith("epoch") else re.sub(r"^\d\S*", "", words.partition(" ")[0])


@pytest.mark.parametrize("inside", [True, False])
def test_a_line_of_no_run_goes_to_all(tmp_path, monkeypatch, inside):
    log = logging.getLogger("mtl")
    monkeypatch.setattr(log, "level", logging.DEBUG)
    logs = [RunLog(tmp_path / name) for name in "ab"]
    for one in logs:
        one.begin()
    if inside:
        log.info("of the second")
    else:
        library = threading.Thread(target=log.info, args=("of a library",))
        library.start()
        library.join()
    for one in reversed(logs):
        one.end()
    assert ["of " in (tmp_path / name).read_text() for name in "ab"] == [not inside, True]
