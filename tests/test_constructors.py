"""Methods, optimizers and schedules that are built from Python: their arguments are checked as train.py checks them."""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import pytest
import torch
from annotated_types import Gt
from torch import Tensor, nn

from mtl import losses as m
from mtl.optim import schedules
from mtl.optim.signum import Signum
from mtl.optim.taskwise import MTLIO, AdaTask

PARAMETERS = [nn.Parameter(torch.ones(2))]


class Smooth(m.DBMTL):
    """A user's own method: a subclass with arguments of its own."""

    def __init__(
        self,
        tasks,
        smooth: Annotated[float, Gt(0)] = 0.5,
        net: nn.Module | None = None,
        shape: Callable[[float], float] | None = None,
        scale: Tensor | None = None,
        limit: float = None,  # noqa: RUF013
    ):
        super().__init__(tasks, beta=smooth)


class Smoother(Smooth):
    """Without a constructor of its own."""


@pytest.mark.parametrize("build, message", [
    (lambda: m.MoCo(3, beta=-1), r"^beta: -1 must be greater than 0 \(MoCo\)$"),
    (lambda: m.MoCo(3, -1), r"^beta: -1 must"),
    (lambda: m.DBMTL(3, beta=2), r"^beta: 2 must be less than or equal to 1 \(DBMTL\)$"),
    (lambda: m.DBMTL(3, beta="0.5"), r"^beta: '0.5' must be a valid number"),
    (lambda: m.DBMTL(3, beta=float("nan")), "^beta: nan must be a finite number"),
    (lambda: m.DWA(3, temperature=float("inf")), "^temperature: inf must be a finite number"),
    (lambda: m.DWA(3, temperature=1e300), "^temperature=.*within"),
    (lambda: m.DWA(3, temperature=True), "^temperature: True must be a valid number"),
    (lambda: m.DWA(3, temperature=None), "^temperature: None must"),
    (lambda: m.DWA(3, temperature=torch.ones(2)), "^temperature: tensor"),
    (lambda: m.RLW(3, "cauchy"), "^distribution: 'cauchy' is none of normal, uniform, dirichlet"),
    (lambda: m.RLW(3, ["normal"]), "^distribution: "),
    (lambda: m.MoCo(3, normalise="no"), "^normalise: 'no' must be a valid boolean"),
    (lambda: m.SDMGrad(3, steps=2.5), "^steps: 2.5 must be a valid integer"),
    (lambda: m.Static(3, [1.0, float("nan"), 1.0]), r"^weights: \[1.0, nan"),
    (lambda: m.Static(3, {"0": "a"}), "^weights: "),
    (lambda: m.AMTL(2, [-1.0, 1.0]), "^potentials: "),
    (lambda: m.AutoLambda(["a", "b"], primary="a"), "^primary: 'a'"),
    (lambda: m.Annealed(2, main=0), "^main: 0 must be a valid string"),
    (lambda: m.NashMTL(2, max_norm=0), "^max_norm: 0 must be greater than 0"),
    (lambda: m.RotoGrad(2, features=4.0), "^features: 4.0"),
    (lambda: m.ConsMTL(2, max_norm=-1), r"^max_norm: -1 must be greater than 0 \(ConsMTL\)"),  # the outer, once
    (lambda: m.Custom(2, file=3), "^file: 3 must be a valid string"),
    (lambda: Smooth(3, smooth=0), r"^smooth: 0 must be greater than 0 \(Smooth\)"),
    (lambda: Smoother(3, smooth="a"), r"^smooth: 'a' .*\(Smooth\)"),
    (lambda: Smooth(3, smooth=2), r"^beta: 2 must be less than or equal to 1 \(DBMTL\)"),
    (lambda: Smooth(3, net=3), "^net: 3 is not a"),
    (lambda: Smooth(3, shape=3), "^shape: 3 must be callable"),
    (lambda: AdaTask(PARAMETERS, lr=-1), r"^lr: -1 must be greater than 0 \(AdaTask\)"),
    (lambda: AdaTask(PARAMETERS, base="adm"), "^base: 'adm' is none of adam, "),
    (lambda: MTLIO(PARAMETERS, betas=(0.9, 1.0)), "^betas: "),
    (lambda: Signum(PARAMETERS, momentum=1), "^momentum: 1"),
    (lambda: schedules.Cosine(final=2), r"^final: 2 must be less than or equal to 1 \(Cosine\)"),
    (lambda: schedules.StepDecay(every=0), "^every: 0"),
    (lambda: schedules.MultiStep(milestones=[1, "a"]), "^milestones: "),
    (lambda: schedules.OneCycle(interval="epoc"), "^interval: 'epoc' is none of epoch, step"),
])  # fmt: skip
def test_wrong_arguments_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("build", [
    lambda: m.MoCo(3, beta=np.float32(0.5)), lambda: m.MoCo(3, beta=torch.tensor(0.5)), lambda: m.MoCo(3, beta=1),
    lambda: m.SDMGrad(3, steps=np.int64(2)), lambda: m.Static(3, torch.ones(3)), lambda: m.Static(3, np.ones(3)),
    lambda: m.Static(3, (1, 2, 3)), lambda: m.Static(["a", "b"], {"a": torch.tensor(2.0)}),
    lambda: m.AutoLambda(["a", "b"], primary={"a"}), lambda: m.NashMTL(3, max_norm=None),
    lambda: Smoother(3, 0.5, nn.Linear(1, 1), abs, torch.ones(2), None), lambda: m.Annealed(2, main=None),
    lambda: AdaTask(PARAMETERS, lr=torch.tensor(0.1), betas=[0.9, 0.99]),
    lambda: schedules.MultiStep(milestones=(1, 2)),
])  # fmt: skip
def test_what_can_be_understood_is_accepted(build):
    build()


@pytest.mark.parametrize("tasks", [-1, 0, 2.0, True, None, torch.tensor(2.0)])
def test_tasks_are_an_integer_or_names(tasks):
    with pytest.raises(ValueError, match=r"^tasks: "):
        m.PCGrad(tasks)


@pytest.mark.parametrize("tasks", [2, np.int64(2), torch.tensor(2), {"0": 1, "1": 2}.keys(), (n for n in "01")])
def test_tasks_in_every_form(tasks):
    assert m.PCGrad(tasks).names == ("0", "1")


def test_unknown_and_missing_arguments_are_pythons_own_message():
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_nrm'"):
        m.NashMTL(2, max_nrm=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'potentials'"):
        m.AMTL(2)


def test_an_integer_for_a_real_number_stays_a_real_number():
    """`init=1` made integer weights, which learning rounded back to 1."""
    assert m.AutoLambda(2, init=1).task_weights.tolist() == [1.0, 1.0]
    assert m.AutoLambda(2, init=1).task_weights.is_floating_point()
    assert m.Uncertainty(2, init=1).log_variances.is_floating_point()


def test_tasks_without_names_may_be_numbered_by_integers():
    assert m.Static(3, {0: 1.0, 2: 3.0}).weights.tolist() == [1, 1, 3]
    assert m.AMTL(2, {1: 70.0, 0: 60.0}).potentials.tolist() == [60, 70]


@pytest.mark.parametrize("features", [0, 1, 2.5, None])
def test_rotations_need_a_width(features):
    with pytest.raises(ValueError, match="features"):
        m.RotoGrad(3).prepare(features)
