"""Early stopping: by validation results that the tests script, so that the epoch is known by hand."""

import json
from contextlib import nullcontext
from math import nan
from types import SimpleNamespace

import pytest
import torch
from test_stages import DIGITS, folder, lines, weights

from mtl.cli.plan import plan_table
from mtl.data.digits import Digits
from mtl.engine.device import Execution
from mtl.engine.follow import Follower
from mtl.engine.learner import Learner
from mtl.engine.run import Job
from mtl.engine.stopping import stops
from mtl.engine.summary import Selection, best
from mtl.report.notes import excuses
from mtl.report.protocols import benchmarks
from mtl.report.runs import load
from mtl.report.scores import Scores
from mtl.tasks import Classification
from mtl.tracking.pictures import epochs, path_of

# Of digit, by which best.pt is chosen. The best is epoch 3; 4 and 5 are no better. Patience 2 stops after epoch 5.
SCORES = [30.0, 20.0, 40.0, 40.0, 35.0, 99.0, 99.0, 99.0]
RUN = (*DIGITS, "data.limit_train=30", "data.val_fraction=0.2", "trainer.epochs=8", "trainer.patience=2")


class Unlabelled(Digits):
    """No validation sample has a digit."""

    def splits(self):
        splits = super().splits()
        splits["val"].columns["digit"][splits["val"].rows] = -100
        return splits


@pytest.fixture
def scripted(monkeypatch):
    real = Learner.evaluate

    def evaluate(self, batches, name):
        row = real(self, batches, name)
        return {**row, "val/digit_accuracy": SCORES[self.strategy.epoch]} if name == "val" else row

    monkeypatch.setattr(Learner, "evaluate", evaluate)
    grey = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    monkeypatch.setattr(Classification, "draw", lambda *a: (grey, grey))


def timeless(run):
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines(run)]


def read(run, name="run.json"):
    return json.loads((run / name).read_text())


@pytest.mark.parametrize("scores, patience, higher, stages, expected", [
    (SCORES, 2, True, [], 5),
    (SCORES, 1, True, [], 2),
    (SCORES, 3, True, [], None),  # epoch 6 is better
    (SCORES, 3, False, [], 5),
    (SCORES, 8, True, [], None),
    (SCORES, None, True, [], None),
    ([1, nan, 2, nan, nan, 3, 0, 0], 2, True, [], 5),
    ([nan] * 8, 3, False, [], 4),  # what chooses best.pt takes the first epoch then
    ([float("inf"), 5, 6, 4, 4, 4, 4, 4], 2, True, [], 5),  # an infinite result is never the best
    ([8, 7, 6, 5, 4, 3, 2, 1], 7, True, [], None),  # 8 epochs were all that was asked for
    ([9, 1, 1, 1, 1, 1, 1, 1], 2, True, [{"epochs": 5}, {"epochs": 3}], 7),  # the last stage has epochs 6 to 8
    ([9, 1, 1, 1, 1, 10, 1, 1], 2, True, [{"epochs": 5}, {"epochs": 3}], None),
])  # fmt: skip
def test_the_epoch_is_known_by_hand(scores, patience, higher, stages, expected):
    rows, chosen = [{"epoch": i + 1, "val/a": v} for i, v in enumerate(scores)], Selection("val/a", ("val/a",), higher)
    trainer = Execution(len(scores), patience=patience, stages=stages)
    found = [e for e in range(1, len(rows) + 1) if stops(rows[:e], trainer, chosen)]
    assert next(iter(found), None) == expected
    if expected and not stages:
        assert expected - best(rows[:expected], chosen)["epoch"] == patience


def test_a_run_stops_and_is_finished(cli, tmp_path, monkeypatch, scripted):
    first = cli(*RUN, f"output_root={tmp_path}")
    assert first.code == 0, first.err
    assert "stopped after epoch 5: no better val/digit_accuracy for 2 epochs (best: epoch 3)" in first.out
    assert "at most 8 epochs" in first.out and "last (5)" in first.out
    run = folder(tmp_path)
    info, summary = read(run), read(run, "summary.json")
    assert (info["status"], info["stopped_early"], len(lines(run))) == ("finished", 5, 5)
    assert (summary["epochs"], summary["selected"]["epoch"]) == (5, 3)
    assert [torch.load(run / f"{name}.pt", weights_only=True)["epoch"] for name in ("last", "best")] == [5, 3]
    assert epochs(run) == [1, 2, 4, 5]

    (found,) = benchmarks((loaded := load([tmp_path])).runs)
    assert not loaded.damaged and not loaded.doubtful
    (strategy,) = found.groups
    assert strategy.runs[0].value("digit_accuracy") == json.loads(lines(run)[4])["test/digit_accuracy"]
    assert "Stopped early, by trainer.patience: equal after 5 epochs." in excuses(Scores(found, found.archs[0]))

    monkeypatch.setattr(Learner, "train_epoch", lambda *a: pytest.fail("it is finished"))
    again = cli(*RUN, f"output_root={tmp_path}")
    assert again.code == 0 and "finished" in again.out and "WARNING" not in again.out
    planned = cli(*RUN, f"output_root={tmp_path}", "study.plan=true")
    assert "1 finished" in planned.out and "may stop" not in planned.out
    assert "may stop 1 of the runs" in plan_table([{"name": "a", "state": "new", "epochs": 8, "seconds": 1.0,
                                                    "source": "", "may_stop": True}])  # fmt: skip
    # Who cuts rows off and changes the number does not get a finished run of four epochs.
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines(run)[:4]))
    (run / "run.json").write_text(json.dumps({**info, "stopped_early": 4}))
    cut = cli(*RUN, f"output_root={tmp_path}")
    assert cut.code and "was edited after the run had finished" in cut.err


def test_a_killed_run_stops_after_the_same_epoch(cli, tmp_path, monkeypatch, scripted):
    """It is killed in epoch 4, and again between its last checkpoint and its end."""
    assert cli(*RUN, f"output_root={tmp_path / 'a'}").code == 0
    real, finish, calls = Learner.train_epoch, Job._finish, []

    def train(self, batches, epoch):
        calls.append(epoch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batches, epoch)

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "train_epoch", train)
    monkeypatch.setattr(Job, "_finish", killed)
    command = (*RUN, f"output_root={tmp_path / 'b'}")
    assert cli(*command).code == 130 and cli(*command).code == 130
    whole, resumed = folder(tmp_path / "a"), folder(tmp_path / "b")
    assert (read(resumed)["status"], read(resumed).get("stopped_early")) == ("interrupted", None)
    for epoch in epochs(resumed):
        path_of(resumed, epoch).unlink()
    monkeypatch.setattr(Job, "_finish", finish)
    assert cli(*command).code == 0
    assert calls == [0, 1, 2, 3, 3, 4]
    assert timeless(whole) == timeless(resumed) and read(resumed)["stopped_early"] == 5
    for name in ("last.pt", "best.pt"):
        one, two = weights(whole / name), weights(resumed / name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert epochs(resumed) == [5]  # the last one's, which the kill had lost


TWO = "trainer.stages=[{epochs: 4}, {epochs: 4, tasks: [ink]}]"


@pytest.mark.parametrize("options, message", [
    (["data.val_fraction=0"], "trainer.patience=2: needs validation data, since test data must not decide when a run "
                              "stops; set data.val_fraction=0.1"),
    (["trainer.patience=0"], "trainer.patience=0: must be greater than or equal to 1"),
    ([TWO], "trainer.patience=2: val/digit_accuracy decides, and the last stage does not train digit; name it in "
            "trainer.stages[1].tasks"),
    (["data._target_=test_early_stopping.Unlabelled"], "no validation sample has a label of digit"),
])  # fmt: skip
def test_what_cannot_tell_when_to_stop_is_refused(cli, tmp_path, options, message):
    result = cli(*RUN, *options, f"output_root={tmp_path / 'out'}")
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_trains_nothing_does_not_end_as_a_success(cli, tmp_path):
    """Its validation results stay the same, so it stops early."""
    result = cli(*RUN, "optimizer.lr=1e-60", f"output_root={tmp_path}")
    run = folder(tmp_path)
    assert result.code == 1 and "epoch 3 has changed no parameter" in result.err
    assert (read(run)["status"], len(lines(run))) == ("failed", 2)


def test_all_processes_stop_together():
    """The other processes do as the first one says, whatever their own results are."""
    trained, said = [], iter([{"epoch": 1}, {"stop": False}, {"stop": False}, {"stop": True}])
    processes = SimpleNamespace(leads=False, hand_out=lambda state: next(said), guard=nullcontext)
    learner = SimpleNamespace(
        processes=processes, trainer=Execution(8, patience=1), load_state=lambda state: None,
        train_epoch=lambda batches, epoch: trained.append(epoch) or {}, epoch_end=lambda row: None,
    )  # fmt: skip
    assert Follower(learner, None, {}, "").execute().status == "finished"
    assert trained == [1, 2]
