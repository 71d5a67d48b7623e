"""Follows a strategy down CAGrad's toy problem, outside the engine.

`mtl.studies.toy` uses it; `mtl.data.toy` explains the problem. Gradients are analytic, in float64. They are plain
Python numbers, because tensors with two elements would be far slower. So this is the one caller of the methods that
does not use `mtl.Step`; a test walks every method both ways. (`data=toy` trains with `mtl.Step`.)

Strategies get G = J Jᵀ, or the losses minus their lower bounds −21 · scale and −21. For methods that learn from epochs,
an epoch is 100 steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl.cli.explain import translate
from mtl.cli.overrides import refuse_second
from mtl.config.identity import CONF
from mtl.config.schema import build, check
from mtl.data.toy import FLOOR, LOWER, toy_losses
from mtl.errors import ConfigError, one_line, suggest
from mtl.losses.base import GramianWeighting, LossWeighting, Statistics, Strategy
from mtl.losses.hooks import defines
from mtl.losses.signatures import taken

FRONT = -8.3552  # x₂ of the Pareto set
EPOCH, REST = 100, 2000  # steps of an epoch; steps between two checks whether a trajectory has settled
Point = tuple[float, float]
TASKS = ("L1", "L2")


def problem(x1: float, x2: float, scale: float = 1.0) -> tuple[Point, tuple[Point, Point]]:
    """The two losses at x, and their gradients. `scale` multiplies the first loss.

    At x₂ = 0 the derivatives of both gates are one-sided; `mtl.data.toy.toy_loss` says why.
    """
    tanh, half, depth = math.tanh(x2), math.tanh(x2 / 2), x2 + 8
    up, down, slope = max(half, 0.0), max(-half, 0.0), (1 - half * half) / 2
    losses, gradients = [], []
    for sign, factor in ((1.0, scale), (-1.0, 1.0)):
        u, gap = sign * (tanh - 3.5) - x1 / 2, x1 - 7 * sign
        valley = math.log(max(abs(u), FLOOR)) + 6
        bowl = (gap * gap + 0.1 * depth * depth) / 10 - 20
        # Below FLOOR the logarithm is clamped, so its derivative is 0.
        steep = up / u if abs(u) > FLOOR else 0.0
        gates = slope * ((valley if x2 >= 0 else 0.0) - (bowl if x2 <= 0 else 0.0))
        losses.append(factor * (up * valley + down * bowl))
        along = down * gap / 5 - steep / 2
        across = sign * (1 - tanh * tanh) * steep + down * depth / 50 + gates
        gradients.append((factor * along, factor * across))
    return tuple(losses), tuple(gradients)


def named(spec: str, tasks: Sequence[str] = TASKS, own: Path | None = None) -> Strategy:
    """The strategy for a word such as "cagrad" or "fairgrad:alpha=1,max_norm=null": conf/loss/*.yaml and overrides.

    Args:
        spec: the word.
        tasks: names of the tasks.
        own: a folder with more methods, own/loss/*.yaml, as --config-dir of train.py.

    Raises:
        ConfigError: there is no such method, two files have its name, or an argument is wrong.
    """
    name, _, overrides = spec.partition(":")
    folders = [CONF, *([] if own is None else [own])]
    files = {file.stem: file for folder in reversed(folders) for file in (folder / "loss").glob("*.yaml")}
    if name not in files:
        raise ConfigError(f"{name}: no such method; one of {', '.join(sorted(files))}{suggest(name, files)}")
    refuse_second("loss", name, folders)
    changes = OmegaConf.create("{" + re.sub(r"(\w+)=", r"\1: ", overrides) + "}")
    node = OmegaConf.load(files[name]) if files[name].is_relative_to(CONF) else _composed(name, own)
    node = OmegaConf.to_container(OmegaConf.merge(node, changes), resolve=True)
    check(node, name, supplied=("tasks",))
    return build(node, name, tasks=tasks)


def _composed(name: str, own: Path) -> DictConfig:
    """The node of a user's own method. Hydra composes it, because it may build on another YAML."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", [f"hydra.searchpath=[file://{own.absolute()}]", f"loss={name}"]).loss
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error) from error


def folder_of_configs(folder: Path | None) -> Path | None:
    """Return `folder`, the value of --config-dir, after a check.

    Raises:
        ConfigError: it is not a folder.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: is not a folder")
    return folder


class Guide:
    """A strategy on one trajectory: it turns the losses and gradients at a point into a direction.

    Args:
        spec: as in `named`.
        scale: factor of the first loss.
        lr, adam: learning rate, and whether Adam is the optimizer. The strategy's own parameters follow it as well.
        steps: number of steps of the whole run.
        own: as in `named`.
    """

    def __init__(self, spec: str, scale: float, lr: float, adam: bool, steps: int, own: Path | None = None):
        self.strategy = named(spec, own=own).double()
        self.scale, self.lr, self.epochs = scale, lr, 1 + steps // EPOCH
        self.tasks = [TASKS.index(name) for name in self.strategy.names]  # loss=single has one of them
        if self.strategy.gradients == "features" or defines(self.strategy, "regulariser"):
            raise ConfigError(f"{spec}: needs the features of a network, and the toy has none")
        self.parameters = list(self.strategy.parameters())
        if self.parameters:
            rate = lr if self.strategy.lr is None else self.strategy.lr
            self.own = (torch.optim.Adam if adam else torch.optim.SGD)(self.parameters, lr=rate)
        self.steps, self.seen = 0, []
        self.tries, self.looks, self.learns = (
            defines(self.strategy, hook) for hook in ("after_step", "look_ahead", "epoch_end")
        )
        # Without a state, x alone decides the next step. A point that is met twice then proves a cycle.
        self.stateless = not any((self.parameters, list(self.strategy.buffers()), self.tries, self.looks, self.learns))

    def __call__(self, x1: float, x2: float, losses: Point, gradients: tuple[Point, Point]) -> Point:
        """The direction d at x; the step moves against it."""
        strategy = self.strategy
        # Methods that take logarithms need positive losses, and the toy's are negative.
        above = [losses[0] - LOWER * self.scale, losses[1] - LOWER]
        above, (a, b) = [above[k] for k in self.tasks], gradients
        if self.tries and self.steps:  # the losses here are the losses after the last step
            strategy.after_step(torch.tensor(above, dtype=torch.float64))
        if self.steps % EPOCH == 0:
            self._epoch()
        if self.learns:
            self.seen.append(above)
        self.steps += 1
        if self.looks:
            x, lower = torch.nn.Parameter(torch.tensor([x1, x2]).double()), torch.tensor([LOWER * self.scale, LOWER])
            strategy.look_ahead(lambda half: toy_losses(x, self.scale) - lower, [x], self.lr)
        if isinstance(strategy, LossWeighting):
            values = torch.tensor(above, dtype=torch.float64, requires_grad=True)
            weights, *own = torch.autograd.grad(strategy(values), [values, *self.parameters])
            if self.parameters:
                for p, gradient in zip(self.parameters, own, strict=True):
                    p.grad = gradient
                self.own.step()
            found = dict(zip(self.tasks, weights.tolist(), strict=True))
            v, w = found.get(0, 0.0), found.get(1, 0.0)
            return v * a[0] + w * b[0], v * a[1] + w * b[1]
        # Inference mode is faster. But its tensors cannot become gradients of the strategy's own parameters.
        with torch.no_grad() if self.parameters else torch.inference_mode():
            facts = taken(strategy, strategy.rule, losses=torch.tensor(above, dtype=torch.float64))
            if isinstance(strategy, GramianWeighting):
                both = a[0] * b[0] + a[1] * b[1]
                gramian = [[a[0] * a[0] + a[1] * a[1], both], [both, b[0] * b[0] + b[1] * b[1]]]
                v, w = strategy.weights(torch.tensor(gramian, dtype=torch.float64), **facts).tolist()
                d = v * a[0] + w * b[0], v * a[1] + w * b[1]
            else:
                result = strategy.aggregate(torch.tensor(gradients, dtype=torch.float64), **facts)
                d = (result[0] if isinstance(result, tuple) else result).tolist()
            if self.parameters:  # for example the scales of IMTL; `weights` has written their gradients
                self.own.step()
                self.own.zero_grad()
            norm = math.hypot(*d)
            share = strategy.max_norm / norm if strategy.max_norm is not None and norm > strategy.max_norm else 1.0
            return share * d[0], share * d[1]

    def _epoch(self) -> None:
        if self.seen:
            mean = torch.tensor(self.seen, dtype=torch.float64).mean(0)
            try:
                self.strategy.epoch_end(Statistics(mean, mean, torch.zeros(2, dtype=torch.bool)))
            except ValueError as error:
                raise ConfigError(one_line(error)) from error
            self.seen.clear()
        self.strategy.epoch_start(self.steps // EPOCH, self.epochs, self.steps)


@dataclass(frozen=True)
class Descent:
    """A trajectory.

    Attributes:
        x: its last point.
        steps: number of steps.
        why: why it ended. "goal": the goal was reached. "settled": it rests on the Pareto set. "cycle": gradient
            descent came back to an earlier point. "diverged": x became infinite or NaN. "cap": all steps were made.
        path: (K, 2) every k-th point.
    """

    x: Point
    steps: int
    why: str
    path: np.ndarray


@np.errstate(over="ignore", invalid="ignore")
def descend(
    spec: str,
    start: Point,
    steps: int,
    scale: float = 1.0,
    lr: float = 1e-3,
    adam: bool = True,
    factor: float = 1.0,
    goal: Callable[[Point], bool] | None = None,
    dtype: type = float,
    every: int = 0,
    own: Path | None = None,
) -> Descent:
    """Follow a strategy from a start.

    Args:
        spec: as in `named`.
        start: the first x.
        steps: largest number of steps.
        scale: factor of the first loss.
        lr, adam: learning rate; Adam with its default betas, or plain gradient descent.
        factor: factor of every direction.
        goal: a function of the losses that ends the trajectory when it is true. None: the trajectory ends when it rests
            on the Pareto set.
        dtype: float or np.float32; parameters and the optimizer's state are rounded to it.
        every: the path keeps every k-th point; 0 keeps none.
        own: as in `named`.
    """
    guide = Guide(spec, scale, lr, adam, steps, own)
    # Adam has a state of its own, so a point that is met twice proves nothing.
    can_cycle = guide.stateless and not adam
    (x1, x2), path, why, t = start, [], "cap", 0
    m1 = m2 = v1 = v2 = 0.0
    seen, rest = None, start
    while True:
        if not (math.isfinite(x1) and math.isfinite(x2)):
            why = "diverged"
            break
        losses, gradients = problem(x1, x2, scale)
        if every and t % every == 0:
            path.append((x1, x2))
        if goal is not None and goal(losses):
            why = "goal"
        elif can_cycle and (x1, x2) == seen:
            why = "cycle"
        elif goal is None and t % REST == 0:
            if t and on_front(x1, x2) and abs(x1 - rest[0]) < 0.01 and abs(x2 - rest[1]) < 0.01:
                why = "settled"
            rest = x1, x2
        if why != "cap" or t == steps:
            break
        if t & (t - 1) == 0:  # t is a power of two: Brent's method, which finds a cycle of any length
            seen = x1, x2
        d1, d2 = guide(x1, x2, losses, gradients)
        d1, d2, t = factor * d1, factor * d2, t + 1
        if adam:
            m1, m2 = float(dtype(0.9 * m1 + 0.1 * d1)), float(dtype(0.9 * m2 + 0.1 * d2))
            v1, v2 = float(dtype(0.999 * v1 + 0.001 * d1 * d1)), float(dtype(0.999 * v2 + 0.001 * d2 * d2))
            rate, root = 1 / (1 - 0.9**t), math.sqrt(1 - 0.999**t)
            d1, d2 = rate * m1 / (math.sqrt(v1) / root + 1e-8), rate * m2 / (math.sqrt(v2) / root + 1e-8)
        x1, x2 = float(dtype(x1 - lr * d1)), float(dtype(x2 - lr * d2))
    return Descent((x1, x2), t, why, np.array(path))


def on_front(x1: float, x2: float) -> bool:
    """Whether x lies within 0.3 of the Pareto set."""
    return abs(x2 - FRONT) < 0.3 and abs(x1) < 7.3
