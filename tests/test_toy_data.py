"""The toy problem as a run: its losses against the study's analytic ones, its trajectories against the study's."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import nn

from mtl.archs.model import HardSharing
from mtl.archs.point import Point
from mtl.cli.command import describe_groups
from mtl.config.identity import CONF
from mtl.data.toy import Toy, toy_losses
from mtl.engine.build import assemble, open_batches
from mtl.losses import PIVRG, Statistics
from mtl.studies.toy_descent import descend, problem
from mtl.tasks import Classification, Regression

DRAW = random.Random(0)
ANYWHERE = [(DRAW.uniform(-11, 11), DRAW.uniform(-11, 11)) for _ in range(50)]
KINKS = [(x1, x2) for x1 in (-8.5, 0.0, 3.0) for x2 in (0.0, -0.0)]  # between the gates, and at the valleys' floor:
FLOORS = [(side * 5.0 + step, 30.0) for side in (-1, 1) for step in (0.0, 2e-6, -2e-6, 2e-5)]


def gradients(point, scale, dtype=torch.float64):
    """(2,) the losses and (2, 2) their gradients, by autograd."""
    x = torch.tensor(point, dtype=dtype, requires_grad=True)
    losses = toy_losses(x, scale)
    return losses.detach(), torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses])


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_losses_and_gradients_are_the_studys_at_the_kinks_too(scale):
    for point in (*ANYWHERE, *KINKS, *FLOORS):
        losses, slopes = gradients(point, scale)
        expected, slopes_expected = problem(*point, scale)
        assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12), point
        assert slopes.flatten().tolist() == pytest.approx([*slopes_expected[0], *slopes_expected[1]], rel=1e-9), point


def test_gradients_are_those_of_differences():
    points = torch.tensor(ANYWHERE, dtype=torch.float64, requires_grad=True)
    for k in range(2):
        (slopes,) = torch.autograd.grad(toy_losses(points)[:, k].sum(), points)
        for axis, step in enumerate(1e-6 * torch.eye(2, dtype=torch.float64)):
            difference = (toy_losses(points + step) - toy_losses(points - step))[:, k] / 2e-6
            torch.testing.assert_close(slopes[:, axis], difference.detach(), rtol=1e-5, atol=1e-6)


def test_losses_in_float32_for_many_points_and_twice_differentiable():
    points = torch.tensor(ANYWHERE).reshape(5, 10, 2)
    losses = toy_losses(points, 0.1)
    assert losses.shape == points.shape and losses.dtype == torch.float32
    expected = [problem(*point, 0.1)[0] for point in points.double().reshape(-1, 2).tolist()]
    torch.testing.assert_close(losses.reshape(-1, 2), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradgradcheck(toy_losses, torch.tensor(ANYWHERE[:4], dtype=torch.float64, requires_grad=True))


# ------------------------------------------------------------------------------------------------------- trajectories


def trajectory(*words, steps):
    """(steps + 1, 2) points of a run through the engine, an epoch being one step."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = OmegaConf.to_container(compose("config", ["experiment=toy", "data.steps=1", *words]), resolve=True)
    benchmark, learner = assemble(config)
    batches, _ = open_batches(benchmark, learner)
    points = [learner.model.backbone.x.tolist()]
    for epoch in range(steps):
        learner.train_epoch(batches, epoch)
        points.append(learner.model.backbone.x.tolist())
    return np.array(points)


@pytest.mark.parametrize("method", ["equal", "mgda"])
@pytest.mark.parametrize("start", [(-8.5, 7.5), (0.0, 0.0)])
def test_trajectories_are_the_studys(method, start):
    path = trajectory(f"loss={method}", f"arch.start={list(start)}", steps=50)
    expected = descend(method, start, 50, scale=0.1, lr=0.01, every=1).path
    assert np.abs(expected[-1] - expected[0]).max() > 0.3
    np.testing.assert_allclose(path, expected, atol=2e-5)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def run(cli, tmp_path):
    """`run("loss=mgda")`: two epochs of five steps; returns the last row and the point where it ended."""

    def call(*words):
        done = cli(
            "experiment=toy", "trainer.epochs=2", "data.steps=5", "arch.start=[-8.5,7.5]", "output_root=out", *words
        )
        assert done.code == 0, done.err
        directory = Path(done.out.partition("\noutput    ")[2].split("\n")[0])
        row = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
        return row, torch.load(directory / "best.pt", weights_only=True)["model"]["backbone.x"].tolist()

    return call


@pytest.mark.parametrize("words", [
    "loss=gls", "loss=nash_mtl", "loss=graddrop", "loss=sdmgrad", "loss=auto_lambda", "loss=rep_mtl", "loss=custom",
    "optimizer=adatask", "optimizer=mtl_io", "loss=cagrad microscope.every=2", "loss=famo data.val_fraction=0.2",
])  # fmt: skip
def test_every_kind_of_method_runs(run, tmp_path, words):
    custom = ["loss.file=mine.py"] if words == "loss=custom" else []
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nclass MultiTaskLoss(nn.Module):\n"
        "    def forward(self, fine_loss, coarse_loss, epoch, total_epochs):\n        return fine_loss + coarse_loss\n"
    )
    row, point = run(*words.split(), *custom)
    # Ten steps of Adam, about as long as the learning rate in each coordinate; twice as long with two optimizers.
    assert 0.04 < math.dist(point, (-8.5, 7.5)) < 0.3
    first, second = problem(*point, 0.1)[0]
    assert (row["test/L1_value"], row["test/L2_value"]) == pytest.approx((first, second), abs=1e-4)
    assert (row["test/L1_loss"], row["test/L2_loss"]) == pytest.approx((first + 2.1, second + 21), abs=1e-4)


@pytest.mark.parametrize(("words", "same"), [
    ("loss=mgda step.gradients=features", "loss=mgda"), ("loss=cagrad step.heads=weighted", "loss=cagrad"),
    ("loss=consmtl", "loss=fairgrad loss.alpha=2 loss.max_norm=1"),
])  # fmt: skip
def test_heads_without_parameters_change_no_method(words, same):
    """Gradients of features are those of the point, over as many samples; ConsMTL without heads is FairGrad."""
    ours, expected = (trajectory(*w.split(), "arch.start=[0,0]", steps=5) for w in (words, same))
    assert abs(expected[-1] - expected[0]).max() > 0.03
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_a_grid_of_starts_and_a_second_run(cli):
    words = ("experiment=toy", "trainer.epochs=1", "data.steps=2")
    hint = cli(*words, "arch.start=[9,9],[-8.5,7.5]")
    assert hint.code == 2 and hint.err.endswith(
        "python train.py -m experiment=toy trainer.epochs=1 data.steps=2 'arch.start=[9,9],[-8.5,7.5]'\n"
    )
    assert cli(*words, "loss=cagrad").code == 0  # the default start, [9.0, 9.0], is the same as [9, 9]
    grid = cli("-m", *words, "arch.start=[9,9],[-8.5,7.5]")
    assert grid.code == 0 and grid.out.count("\nepoch 1/1") == 2
    assert "toy, point, start [9, 9]: test metrics" in grid.out and "L2_value" in grid.out
    assert "9.0" not in grid.out.partition("test metrics")[2]
    configs = [yaml.safe_load(file.read_text()) for file in Path("outputs/toy/point/equal").rglob("config.yaml")]
    assert sorted(c["arch"]["start"] for c in configs) == [[-8.5, 7.5], [9, 9]]
    again = cli(*words, "arch.start=[9,9]")
    assert again.code == 0 and "finished" in again.out and "epoch" not in again.out


@pytest.mark.parametrize(("words", "code", "told"), [
    ("experiment=toy loss=rotograd", 2, ("RotoGrad", "needs parameters")),
    ("experiment=toy loss=dtp", 2, ("loss: DTP needs accuracies", "L1_value is an error; use loss=amtl")),
    ("data=rooms loss=dtp data.val_fraction=0.25", 2, ("DTP needs accuracies", "depth_abs_err is an error")),
    ("data=toy", 2, ("arch", "a point in the plane, not the shape (1,)", "arch=point")),
    ("arch=point data=digits", 2, ("1x8x8", "data=toy")),
    ("experiment=toy data.batch_size=4", 2, ("data.batch_size=4", "greater than or equal to 6")),
    ("experiment=toy arch.start=[1]", 2, ("arch.start=[1]",)),
])  # fmt: skip
def test_what_does_not_go_together_is_one_line(cli, words, code, told):
    refused = cli(*words.split(), "logger=none")
    assert refused.code == code and refused.err.startswith("error: ") and refused.err.count("\n") == 1
    assert all(text in refused.err for text in told)


def test_help_lists_it():
    lines = describe_groups().splitlines()
    assert sum(line.startswith("    toy ") for line in lines) == 2  # data, experiment
    assert sum(line.startswith("    point ") for line in lines) == 1


# ------------------------------------------------------------------------------------------------- what it rests upon


def test_heads_are_drawn_as_linear_layers_in_the_order_of_the_tasks():
    backbone = nn.Flatten()
    backbone.out_features = 4
    torch.manual_seed(0)
    model = HardSharing(backbone, (Classification("fine", 100), Regression("ink"), Classification("coarse", 20)))
    torch.manual_seed(0)
    for head, expected in zip(
        model.heads.values(), (nn.Linear(4, 100), nn.Linear(4, 1), nn.Linear(4, 20)), strict=True
    ):
        assert torch.equal(head.weight, expected.weight) and torch.equal(head.bias, expected.bias)


def test_a_point_is_the_same_for_every_image():
    tasks = Toy(scale=0.1).tasks
    model = HardSharing(Point(1, (3.0, -8.0)), tasks)
    assert [p.shape for p in model.parameters()] == [(2,)] and not list(model.own_parameters("L1"))
    for size in (0, 1, 8):
        predictions = model({"image": torch.zeros(size, 1, 1, 1)}).predictions
        for task, p, expected in zip(tasks, predictions, problem(3.0, -8.0, 0.1)[0], strict=True):
            assert p.shape == (size, 2) and task.at(p).tolist() == pytest.approx([expected] * size)
            assert (task.criterion(p, torch.zeros(size)) - task.at(p)).tolist() == pytest.approx(
                [21 * task.scale] * size
            )


def test_pivrg_serves_the_task_that_lost_most_of_a_negative_result():
    strategy = PIVRG(2, baselines=[-20.0, -20.0])
    strategy.epoch_end(Statistics(torch.ones(2), torch.tensor([-19.0, -10.0]), torch.tensor([False, False])))
    assert strategy.targets[1] > 1 > strategy.targets[0]
