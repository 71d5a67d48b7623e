"""Stages: for how long which tasks count, and which parameters learn."""

import json

import pytest
import torch

NET = ("arch._target_=golden.problems.Net", "~arch.depth", "optimizer.lr=0.05")
DIGITS = (*NET, "data=digits", "data.batch_size=8", "data.limit_train=24", "data.limit_test=16", "logger=none",
          "trainer.device=cpu")  # fmt: skip
TWO = "trainer.stages=[{epochs: 2, tasks: [digit, odd]}, {epochs: 2, tasks: [ink], train: [ink]}]"


def folder(tmp_path):
    (found,) = tmp_path.glob("*/*/*/*/seed42")
    return found


def lines(run):
    return (run / "metrics.jsonl").read_text().splitlines()


def weights(path):
    return torch.load(path, weights_only=False)["model"]


def train(cli, tmp_path, *more):
    result = cli(*DIGITS, f"output_root={tmp_path}", *more)
    assert result.code == 0, result.err
    return folder(tmp_path)


def test_a_frozen_backbone_and_absent_heads_do_not_move(cli, tmp_path):
    first = train(cli, tmp_path / "a", "trainer.epochs=2", "trainer.stages=[{epochs: 2, tasks: [digit, odd]}]")
    both = train(cli, tmp_path / "b", "trainer.epochs=4", TWO)
    one, two = weights(first / "last.pt"), weights(both / "last.pt")
    moved = {key for key in one if not torch.equal(one[key], two[key])}
    # Constant rates would make the first stages equal; the schedule of each stage is its own, so they are.
    assert moved == {"heads.ink.weight", "heads.ink.bias"}


def test_a_task_that_does_not_count_is_as_if_it_were_not_there(cli, tmp_path):
    few = train(cli, tmp_path / "a", "trainer.epochs=2", "data._target_=golden.problems.Classes")
    masked = train(cli, tmp_path / "b", "trainer.epochs=2", "data._target_=golden.problems.Missing",
                   "trainer.stages=[{epochs: 2, tasks: [digit, odd]}]")  # fmt: skip
    one, two = weights(few / "last.pt"), weights(masked / "last.pt")
    trunk = [key for key in one if key.startswith("backbone")]
    for key in trunk:
        torch.testing.assert_close(one[key], two[key])


@pytest.mark.parametrize("loss", ["uncertainty", "pcgrad", "dwa", "famo", "mgda"])
def test_it_resumes_bit_for_bit_across_the_border(cli, tmp_path, monkeypatch, loss):
    whole = train(cli, tmp_path / "a", "trainer.epochs=4", TWO, f"loss={loss}")
    from mtl.engine.learner import Learner

    real = Learner.train_epoch

    def stop(self, batches, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, batches, epoch)

    monkeypatch.setattr(Learner, "train_epoch", stop)
    cli(*DIGITS, f"output_root={tmp_path / 'b'}", "trainer.epochs=4", TWO, f"loss={loss}")
    monkeypatch.setattr(Learner, "train_epoch", real)
    resumed = train(cli, tmp_path / "b", "trainer.epochs=4", TWO, f"loss={loss}")
    one, two = weights(whole / "last.pt"), weights(resumed / "last.pt")
    assert all(torch.equal(one[key], two[key]) for key in one)
    rows = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines(p)]
        for p in (whole, resumed)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_each_stage_has_its_own_schedule_and_rate(cli, tmp_path):
    stages = "trainer.stages=[{epochs: 2}, {epochs: 2, lr: 0.01}]"
    run = train(cli, tmp_path, "trainer.epochs=4", stages, "schedule=cosine")
    rates = [json.loads(line)["lr"] for line in lines(run)]
    assert rates == pytest.approx([0.05, 0.025, 0.01, 0.005])


def test_a_frozen_batch_norm_keeps_its_averages(cli, tmp_path):
    run = train(cli, tmp_path / "a", "trainer.epochs=1", "trainer.stages=[{epochs: 1, train: [heads]}]")
    assert weights(run / "last.pt")["backbone.norm.num_batches_tracked"] == 0


@pytest.mark.parametrize("stages, message", [
    ("[{epochs: 3}]", "trainer.stages: 3 epochs in all, and trainer.epochs=2; set trainer.epochs=3"),
    ("[{epoch: 2}]", "trainer.stages[0].epoch: unknown key"),
    ("[{epochs: 2, tasks: [digits]}]", "trainer.stages[0].tasks: 'digits' is none of digit, odd, ink; did you mean"),
    ("[{epochs: 2, train: [backbone]}]", "trainer.stages[0].train: 'backbone' is none of shared, heads, digit"),
    ("[{epochs: 2, train: []}]", "trainer.stages[0]: trains nothing"),
    ("[{epochs: 2, tasks: [ink], train: [digit]}]", "task ink counts, but neither its head nor 'shared' learns"),
    ("[3]", "trainer.stages[0]=3: must be an object"),
])  # fmt: skip
def test_wrong_stages_are_refused_in_one_line(cli, tmp_path, stages, message):
    result = cli(*DIGITS, f"output_root={tmp_path}", "trainer.epochs=2", f"trainer.stages={stages}")
    assert result.code and message in result.err and result.err.count("\n") == 1


def test_a_method_that_averages_gradients_needs_the_same_parameters(cli, tmp_path):
    result = cli(*DIGITS, f"output_root={tmp_path}", "trainer.epochs=4", TWO, "loss=moco")
    assert result.code and "keeps averages of the shared parameters' gradients" in result.err
