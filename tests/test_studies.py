"""The studies: the toy problem's gradients, published step counts and end points, and who is blind to loss scales."""

import csv
import random

import numpy as np
import pytest
import shipped
import torch

import mtl
from mtl.data.toy import LOWER, toy_losses
from mtl.errors import ConfigError
from mtl.losses.hooks import defines
from mtl.studies import scale_invariance, toy
from mtl.studies.toy_descent import descend, named, on_front, problem

METHODS = shipped.options("loss")


def written_with_clamps(x1, x2, scale):
    """The toy's losses as in CAGrad's and Nash-MTL's papers, for autograd."""
    floor = 5e-6
    valley1 = torch.clamp((0.5 * (-x1 - 7) - torch.tanh(-x2)).abs(), floor).log() + 6
    valley2 = torch.clamp((0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs(), floor).log() + 6
    bowl1, bowl2 = (((-x1 + c) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20 for c in (7, -7))
    up, down = torch.clamp(torch.tanh(x2 * 0.5), 0), torch.clamp(torch.tanh(-x2 * 0.5), 0)
    return scale * (valley1 * up + bowl1 * down), valley2 * up + bowl2 * down


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_the_gradients_of_the_toy_are_those_of_autograd(scale):
    draw = random.Random(0)
    for _ in range(100):
        x = torch.tensor([draw.uniform(-11, 11), draw.uniform(-11, 11)], dtype=torch.float64, requires_grad=True)
        losses, gradients = problem(*x.tolist(), scale)
        for loss, value, gradient in zip(written_with_clamps(*x, scale), losses, gradients, strict=True):
            assert value == pytest.approx(loss.item(), abs=1e-12)
            expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
            assert gradient == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-11)


def test_the_toy_has_its_published_minima():
    assert problem(0, -8.3552)[0] == pytest.approx((-15.09, -15.09), abs=0.01)
    assert problem(7, -8.3552)[0] == pytest.approx((-19.99, -0.40), abs=0.01)
    assert problem(-7, -8.3552)[0] == pytest.approx((-0.40, -19.99), abs=0.01)
    first, second = problem(0, -8.3552)[1]
    assert (first[0] + second[0], first[1], second[1]) == pytest.approx((0, 0, 0), abs=1e-4)


def test_no_method_is_caught_at_the_kink_where_nash_mtl_starts():
    for spec in ("equal", "mgda", "nash_mtl"):
        assert descend(spec, (0.0, 0.0), 50, scale=0.1).x[1] < -0.03


@pytest.mark.parametrize(("lr", "published"), [(10.0, 26), (5.0, 37), (1.0, 22), (0.5, 58)])
@pytest.mark.parametrize("dtype", [np.float32, float])
def test_equal_weighting_with_adam_takes_the_published_steps(lr, published, dtype):
    steps, each = toy.worst_start("EW", lr, True, dtype, 100)
    assert abs(steps - published) <= 2 and max(each) == steps


def test_cagrad_finds_the_average_minimum_and_mgda_another_point_of_the_pareto_set():
    start = (-8.5, -5.0)
    cagrad = descend("cagrad:c=0.5", start, 500, lr=0.05, goal=lambda losses: sum(losses) < -30)
    assert cagrad.why == "goal" and on_front(*cagrad.x) and abs(cagrad.x[0]) < 1
    mgda = descend("mgda", start, 500, lr=0.05)
    assert on_front(*mgda.x) and mgda.x[0] < -2


def test_a_cycle_of_gradient_descent_is_found():
    run = descend("pcgrad", (-8.5, 7.5), 5000, lr=10.0, adam=False, factor=0.5, dtype=np.float32)
    assert run.why == "cycle" and run.steps < 5000
    again = descend("pcgrad", run.x, 64, lr=10.0, adam=False, factor=0.5, dtype=np.float32, every=1)
    assert any((point == again.path[0]).all() for point in again.path[1:]) or again.why == "cycle"


def test_a_start_that_fails_ends_the_count():
    steps, each = toy.worst_start("EW", 0.001, True, float, 10)
    assert steps is None and each == ["skipped", "skipped", "cap"]


NEEDED = {"static": "weights={L2: 0.5}", "single": "task=L1", "amtl": "potentials={L1: 10,L2: 10}",
          "pivrg": "baselines={L1: 20,L2: 20}"}  # fmt: skip
START, RATE, STEPS = (-8.5, 7.5), 1e-3, 105  # an epoch of the toy has 100 steps


def with_the_library(spec):
    """The end of the same way with `mtl.Step` and autograd: the toy computes with plain numbers, to be quick."""
    strategy, x = named(spec).double(), torch.nn.Parameter(torch.tensor(START).double())
    groups = [{"params": [x]}]
    if own := list(strategy.parameters()):
        groups.append({"params": own, **({} if strategy.lr is None else {"lr": strategy.lr})})
    step = mtl.Step(strategy, torch.optim.SGD(groups, lr=RATE), [x], [[] for _ in strategy.names])
    which = [("L1", "L2").index(name) for name in strategy.names]

    def losses(part):
        features = x + 0  # of a network without layers
        return mtl.Losses((toy_losses(features, 1.0) - LOWER)[which], features)

    for k in range(STEPS):
        if k % 100 == 0:
            if k and defines(strategy, "epoch_end"):
                total, count = step._sums
                step.end_epoch(total / count, torch.zeros(2, dtype=torch.bool))
            step.start_epoch(k // 100, 1 + STEPS // 100, k)
        step(losses, 6)
    return x.detach()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_walks_as_the_library_does(name):
    spec = f"{name}:{NEEDED.get(name, '')}"
    try:
        run = descend(spec, START, STEPS, lr=RATE, adam=False)
    except ConfigError as error:  # one line: it needs a file, or the features of a network
        assert str(error).startswith(name) or name == "dtp"  # which needs accuracies
    else:
        assert run.why == "cap" and run.x != START
        np.testing.assert_allclose(run.x, with_the_library(spec), rtol=1e-6)


def test_a_name_is_checked_as_on_the_command_line():
    assert named("fairgrad:alpha=1,max_norm=null").max_norm is None
    for spec, message in (("cagrd", "did you mean cagrad"), ("cagrad:d=1", "unknown key"), ("cagrad:c=-1", "greater")):
        with pytest.raises(ConfigError, match=message):
            named(spec)


def test_the_toy_writes_tables_and_figures(tmp_path, capsys):
    assert toy.main(["trajectories", "equal", "graddrop", "--cap", "20", "--out", str(tmp_path)]) == 0
    assert toy.main(["steps", "EW", "--lr", "10", "1", "--cap", "90", "--out", str(tmp_path)]) == 0
    names = {"cagrad.png", "nash.png", "nash-losses.png", "steps.png", "trajectories.csv", "steps.csv",
             "trajectories.md", "steps.md"}  # fmt: skip
    assert {file.name for file in tmp_path.iterdir()} == names
    rows = list(csv.DictReader((tmp_path / "trajectories.csv").open()))
    assert len(rows) == 2 * (3 + 5) and {row["why"] for row in rows} == {"cap"}
    assert "| adam | EW | float32 | 26 | 22 |" in (tmp_path / "steps.md").read_text()
    assert toy.main(["trajectories", "rotograd", "--out", str(tmp_path)]) == 2
    assert toy.main(["steps", "PCgrad", "--out", str(tmp_path)]) == 2
    assert "did you mean PCGrad?" in capsys.readouterr().err


def test_studies_take_losses_of_ones_own(tmp_path, capsys, monkeypatch):
    """Built on one of ours, as train.py would; a name that ours hides is refused."""
    (tmp_path / "own" / "loss").mkdir(parents=True)
    (tmp_path / "my_losses.py").write_text("from mtl.losses import DWA\nclass Mine(DWA): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own" / "loss" / "strangers.yaml"
    file.write_text("defaults: [dwa]\n_target_: my_losses.Mine\n")
    words = ["--config-dir", str(tmp_path / "own"), "--out", str(tmp_path / "out")]
    mine = named("strangers:temperature=3.0", own=tmp_path / "own")
    assert type(mine).__name__ == "Mine" and mine.temperature == 3.0
    assert toy.main(["trajectories", "strangers", "--cap", "3", "--setting", "nash", *words]) == 0
    assert scale_invariance.main(["strangers/sgd", "--epochs", "2", *words]) == 0
    file.rename(file.with_name("cagrad.yaml"))
    for main, command in ((toy.main, ["trajectories", "cagrad"]), (scale_invariance.main, ["cagrad/sgd"])):
        capsys.readouterr()
        assert main([*command, *words]) == 2
        assert "hides" in capsys.readouterr().err
    assert toy.main(["trajectories", "strangers", "--config-dir", "nowhere", "--out", str(tmp_path / "new")]) == 2
    assert (
        capsys.readouterr().err == "error: --config-dir nowhere: is not a folder\n" and not (tmp_path / "new").exists()
    )


@pytest.fixture(scope="module")
def differences():
    torch.manual_seed(0)
    network, data = scale_invariance.Network().double(), torch.rand(64, 1, dtype=torch.float64)

    def call(pair, free, **options):
        runs = [
            scale_invariance.run(pair, network, data, s, free, 15, **options)
            for s in ((1.0, 1.0), scale_invariance.SCALES)
        ]
        return [scale_invariance.difference(*runs, part) for part in scale_invariance.PARTS[: 3 if free else 2]]

    return call


UWO = "uncertainty_optimal:form=laplace/sgd"


@pytest.mark.parametrize("pair", ["equal/adam", "equal/signsgd", "equal/adatask", UWO])
def test_heads_on_a_fixed_backbone_are_blind_to_scales(pair, differences):
    assert max(differences(pair, free=False)) < 1e-12


@pytest.mark.parametrize("pair", ["equal/adatask", UWO])
def test_all_parts_are_blind_to_scales(pair, differences):
    assert max(differences(pair, free=True)) < 1e-12


def test_what_is_not_blind_to_scales(differences):
    first, second = differences("equal/sgd", free=False)
    assert first > 8.9 and second == pytest.approx(0.9, abs=0.05)
    assert min(differences("equal/sgd", free=True)) > 0.1
    for pair in ("equal/adam", "equal/signsgd"):
        assert differences(pair, free=True)[2] > 0.1


def test_adams_epsilon_is_what_remains_of_the_scales(differences):
    assert 1e-6 < max(differences("equal/adam", free=False, eps=1e-8)) < 0.2


def test_the_invariance_study_writes_a_table_and_figures(tmp_path, capsys):
    assert scale_invariance.main(["famo/adam", "uncertainty/sgd", "--epochs", "3", "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"fixed.png", "free.png", "invariance.csv", "invariance.md"}
    rows = list(csv.DictReader((tmp_path / "invariance.csv").open()))
    assert len(rows) == 2 * 2 * 2 * 3 and float(rows[0]["update backbone"]) == 0
    assert scale_invariance.main(["equal/adm", "--out", str(tmp_path)]) == 2
    assert "did you mean adam?" in capsys.readouterr().err
