"""Two runs in one process know nothing of each other: each has the rows, weights and log of a run by itself."""

import json
import logging
import random
import re
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

import mtl.random
from mtl.cli.command import CONF
from mtl.config.identity import identify
from mtl.engine import checkpoint, run
from mtl.engine.device import Execution
from mtl.engine.learner import Learner
from mtl.engine.outcome import Outcome
from mtl.optim.schedules import Constant
from mtl.tracking import Tracker
from mtl.tracking.runlog import RunLog

SMALL = ("data=digits", "data.limit_train=64", "data.limit_test=40", "data.batch_size=32", "optimizer.lr=0.01",
         "trainer.epochs=3", "logger=none")  # fmt: skip
WIDE = "arch=wide_resnet arch.depth=10 arch.width=1 arch.dropout=0.2"
OWN = (f"arch=vgg16_bn ~arch.dropout arch._target_={__name__}.Drawing "
       f"schedule=constant schedule._target_={__name__}.Jittered")  # fmt: skip
# Both methods draw. The second run's network and schedule draw from all global generators.
BOTH = (f"loss=graddrop seed=2 trainer.deterministic=true {WIDE}", f"loss=rlw seed=1 {OWN}")


class Drawing(nn.Module):
    """A user's network that draws from every global generator, when it is built and in each forward pass."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.linear, self.out_features = nn.Linear(in_channels * 64, 8), 8
        self.gain = random.uniform(0.5, 1.5) * np.random.uniform(0.5, 1.5)

    def forward(self, images):
        x = nn.functional.dropout(self.linear(images.flatten(1)), 0.1, self.training)
        return self.gain * x.tanh() + random.gauss(0, 0.1) + np.random.normal(0, 0.1) + 0.1 * torch.randn_like(x)


class Jittered(Constant):
    """A user's schedule that draws when it is built, and in each epoch."""

    def __post_init__(self):
        super().__post_init__()
        self.peak = random.uniform(0.5, 1)

    def factor(self, progress, epochs):
        return self.peak * random.uniform(0.9, 1)


class Turns:
    """Two threads, of which one works at a time. Whoever hands over draws, as any other code of the process may."""

    def __init__(self):
        self.free, self.left, self.turn, self.order = threading.Condition(), {0, 1}, 0, []
        self.local = threading.local()

    def hand_over(self):
        """Let the other thread work until it hands over, too."""
        self.order.append(self.local.number)
        self.give()
        self.take()

    def take(self):
        with self.free:
            assert self.free.wait_for(lambda: self.turn == self.local.number, timeout=60)

    def give(self):
        random.random(), np.random.rand(), torch.rand(1)
        with self.free:
            if 1 - self.local.number in self.left:
                self.turn = 1 - self.local.number
            self.free.notify_all()

    @contextmanager
    def between_blocks(self):
        """In place of the lock of `mtl.random`: hand over before each block that has the generators to itself."""
        depth = self.local.__dict__.setdefault("depth", 0)
        if not depth:
            self.hand_over()
        self.local.depth += 1
        yield
        self.local.depth -= 1

    def work(self, number: int, config: tuple):
        self.local.number = number
        self.take()
        try:
            execute(config)
        finally:
            self.left.discard(number)
            self.give()


def compose_config(words: str, root) -> tuple:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*SMALL, *words.split(), f"output_root={root}"], return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    plain = OmegaConf.to_container(config, resolve=True)
    return plain, choices, identify(plain, choices), f"python train.py {words}"


def execute(config: tuple) -> Outcome:
    with run.prepare(*config) as job:
        return job.execute()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of both runs, each executed by itself."""
    root = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        log_to_files(patch)
        for words in BOTH:
            assert execute(compose_config(words, root)).status == "finished"
    return root


def log_to_files(patch):
    torch.set_num_threads(1)
    log = logging.getLogger("mtl")
    patch.setattr(log, "level", logging.DEBUG)
    patch.setattr(log, "handlers", [])


@pytest.mark.parametrize("where", ["epochs", "blocks", "free"])
def test_two_runs_in_one_process_are_those_of_a_process_each(alone, tmp_path, monkeypatch, where):
    """They take turns after each epoch, or before each block that draws; or nobody tells them when to work."""
    log_to_files(monkeypatch)
    turns = Turns()
    if where == "epochs":
        monkeypatch.setattr(Tracker, "log", lambda self, row: turns.hand_over())
    elif where == "blocks":
        monkeypatch.setattr(mtl.random, "alone", turns.between_blocks)
        monkeypatch.setattr("mtl.engine.device.alone", turns.between_blocks)
    configs = [compose_config(words, tmp_path) for words in BOTH]
    if where == "free":
        threads = [threading.Thread(target=execute, args=(config,)) for config in configs]
    else:
        threads = [threading.Thread(target=turns.work, args=both) for both in enumerate(configs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not logging.getLogger("mtl").handlers
    if where == "epochs":
        assert turns.order == [0, 1, 0, 1, 0, 1]
    elif where == "blocks":
        assert len(turns.order) > 30 and turns.order[:30] == [0, 1] * 15
    files = sorted(alone.rglob("metrics.jsonl"))
    assert len(files) == 2
    for file in files:
        twin = tmp_path / file.relative_to(alone)
        assert rows(twin) == rows(file)
        weights = [checkpoint.load(f.with_name("last.pt"))["model"] for f in (file, twin)]
        assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
        ours, theirs = ((f.with_name("train.log")).read_text().splitlines() for f in (file, twin))
        assert [steady(line) for line in ours] == [steady(line) for line in theirs]


def test_a_run_gives_back_what_belongs_to_the_process(tmp_path, monkeypatch):
    """The generators and flags of the process are each run's own while it works, and afterwards as they were."""
    log_to_files(monkeypatch)
    seen, predict = {}, Learner.predict

    def note(learner, images):
        seen.setdefault(learner.seed, set()).add(flags())
        return predict(learner, images)

    monkeypatch.setattr(Learner, "predict", note)
    before = (flags(), *generators())
    for words in BOTH:
        assert execute(compose_config(words, tmp_path)).status == "finished"
    assert seen == {2: {(True, False)}, 1: {(False, True)}}
    after = (flags(), *generators())
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_later_command_in_the_process_begins_with_nothing(smoke):
    """Neither with the exit codes of the command before, nor with its grid."""
    assert smoke("-m", "logger=none", "trainer.epochs=1", "seed=0,-1").code == 2
    again = smoke("logger=none", "trainer.epochs=1", "seed=0")
    assert again.code == 0 and "finished" in again.out and "runs finished" not in again.out


def test_a_run_has_left_the_memory_when_the_next_one_begins(smoke, monkeypatch):
    """The single-task baselines of a command, too, are never in memory together."""
    learners, build = [], run.assemble

    def assemble(*arguments):
        assert not [r for r in learners if r() is not None]
        found = build(*arguments)
        learners.append(weakref.ref(found[1]))
        return found

    monkeypatch.setattr(run, "assemble", assemble)
    assert smoke("logger=none", "trainer.epochs=1", "study.baselines=auto").code == 0
    assert len(learners) == 3


def flags() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def generators() -> tuple:
    return torch.get_rng_state(), np.random.get_state()[1], np.random.get_state()[2], random.getstate()[1]


@pytest.mark.parametrize("deterministic", [True, False])
def test_flags_that_the_process_has_set_come_back_after_an_error(deterministic):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(ZeroDivisionError), Execution(deterministic=deterministic).flags():
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise ZeroDivisionError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


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
