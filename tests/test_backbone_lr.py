"""The backbone's own learning rate: values by hand, schedules and stages keep the ratio, resuming, and refusals."""

import json

import pytest
import torch

from mtl.engine.learner import Learner

WORDS = ("arch._target_=golden.problems.Net", "~arch.depth", "data=digits", "data.batch_size=8", "data.limit_train=8",
         "data.limit_test=8", "logger=none", "trainer.device=cpu", "trainer.epochs=1", "optimizer.lr=0.05")  # fmt: skip
PLAIN = ("optimizer.momentum=0", "optimizer.weight_decay=0")
TENTH = "trainer.backbone_lr_factor=0.1"


def saved(tmp_path, name: str = "last.pt") -> dict:
    return torch.load(next(tmp_path.rglob(name)), weights_only=True)


def train(cli, out, *more: str) -> dict:
    result = cli(*WORDS, f"output_root={out}", *more)
    assert result.code == 0, result.err
    return saved(out)


@pytest.mark.parametrize("loss", ["equal", "pcgrad", "uncertainty"])
def test_one_step_of_the_backbone_is_a_tenth_and_one_of_the_heads_is_whole(cli, tmp_path, monkeypatch, loss):
    start, real = [], Learner.train_epoch

    def first(self, batches, epoch):
        start.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return real(self, batches, epoch)

    monkeypatch.setattr(Learner, "train_epoch", first)
    runs = [train(cli, tmp_path / str(i), *PLAIN, f"loss={loss}", *more) for i, more in enumerate([(), (TENTH,)])]
    moved = 0
    for name, begin in start[0].items():
        whole, part = (run["model"][name] - begin for run in runs)
        factor = 0.1 if name.startswith("backbone") else 1.0
        torch.testing.assert_close(part, factor * whole, rtol=1e-3, atol=1e-7)
        moved += bool(whole.any())
    assert moved >= 4
    rates = [group["lr"] for group in runs[1]["optimizer"]["param_groups"]]
    assert rates[:2] == [0.05, 0.05 * 0.1] and len(rates) == 2 + (loss == "uncertainty")
    assert rates[2:] == [group["lr"] for group in runs[0]["optimizer"]["param_groups"]][1:]


def test_schedules_and_stages_keep_the_ratio(cli, tmp_path):
    stages = "trainer.stages=[{epochs: 2}, {epochs: 2, lr: 0.01}]"
    for epochs, expected in ((2, 0.05), (4, 0.01)):  # the second of two cosine epochs has half the rate
        more = (stages,) if epochs == 4 else ()
        groups = train(cli, tmp_path / str(epochs), TENTH, "loss=uncertainty", f"trainer.epochs={epochs}", *more)
        heads, backbone, method = groups["optimizer"]["param_groups"]
        assert heads["lr"] == pytest.approx(expected / 2) and backbone["lr"] == pytest.approx(expected / 20)
        assert method["lr"] == pytest.approx(0.05 / 2)  # a stage's rate is the model's
        rows = next((tmp_path / str(epochs)).rglob("metrics.jsonl")).read_text().splitlines()
        assert json.loads(rows[-1])["lr"] == heads["lr"]


def test_it_resumes_bit_for_bit(cli, tmp_path, monkeypatch):
    words = (TENTH, "trainer.epochs=3", "loss=uncertainty")
    whole, real = train(cli, tmp_path / "whole", *words), Learner.train_epoch

    def stop(self, batches, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, batches, epoch)

    monkeypatch.setattr(Learner, "train_epoch", stop)
    cli(*WORDS, f"output_root={tmp_path / 'parts'}", *words)
    monkeypatch.setattr(Learner, "train_epoch", real)
    resumed = train(cli, tmp_path / "parts", *words)
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())


def test_one_task_alone_and_optimizers_with_statistics_of_tasks_have_it_too(cli, tmp_path):
    for i, more in enumerate((("loss=single", "loss.task=ink"), ("optimizer=adatask", "optimizer.lr=0.05"),
                              ("optimizer=mtl_io", "optimizer.lr=0.05"))):  # fmt: skip
        groups = train(cli, tmp_path / str(i), TENTH, *more)["optimizer"]["param_groups"]
        assert [group["lr"] for group in groups] == [0.05, 0.05 * 0.1]


@pytest.mark.parametrize(("words", "said"), [
    (("trainer.backbone_lr_factor=0",), "trainer.backbone_lr_factor=0: must be greater than 0"),
    ((TENTH, "loss=auto_lambda"), "trainer.backbone_lr_factor=0.1: AutoLambda tries steps out with one rate for all "
                                  "parameters; leave it at 1"),
])  # fmt: skip
def test_what_cannot_be_is_refused(cli, words, said):
    run = cli(*WORDS, *words)
    assert run.code == 2 and said in run.err and len(run.err.strip().splitlines()) == 1


def test_a_frozen_backbone_has_no_rate(cli):
    words = [word for word in WORDS if "arch" not in word]
    run = cli(*words, TENTH, "arch=torchvision", "arch.name=shufflenet_v2_x0_5", "arch.frozen=true")
    assert run.code == 2 and "the model has no shared parameter that learns; leave it at 1" in run.err


def test_its_default_is_no_part_of_a_runs_identity(cli, tmp_path):
    train(cli, tmp_path / "a")
    train(cli, tmp_path / "b", "trainer.backbone_lr_factor=1")
    (one,), (two,) = ([p.parent.name for p in (tmp_path / name).rglob("seed42")] for name in "ab")
    assert one == two
