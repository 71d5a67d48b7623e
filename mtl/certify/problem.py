"""The problem on which methods are measured: a network so small that every loss and gradient in it can be set.

The features are z = a + θ for N samples. Task i has a head h_i. x_i are the features that head i receives: z itself,
except with RotoGrad.

    L_i = v_i + ⟨g_i, x_i − a⟩ + ½ ⟨b_i, (x_i − a)²⟩ + Σ_n r_in h_i·x_in.

At θ = h = 0 task i has the loss v_i, the shared gradient g_i and the curvature b_i. The gradient of its head depends on
the features. So second derivatives, look-ahead steps and terms of the heads all have an effect. L_i is linear in
(v, g, b, r)_i. To scale, reorder or leave out tasks is therefore to multiply by a matrix. Everything is in float64.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor, nn

from mtl.cli.explain import composed
from mtl.config import schema
from mtl.config.identity import CONF
from mtl.engine.step import Losses, Step
from mtl.errors import ConfigError
from mtl.losses import Statistics, Strategy

SAMPLES, WIDTH = 2, 6
SIZE = SAMPLES * WIDTH
TASKS = 3
HISTORY = 4  # number of steps before the measured one; each step is an epoch
EPOCHS = 10
RATE = 0.1  # learning rate of everything
CONFIGS = "--config-dir="
_generator = torch.Generator().manual_seed(1)
ANCHOR = torch.randn(SAMPLES, WIDTH, generator=_generator, dtype=torch.float64)
# A random orthogonal basis, so that gradients in few dimensions have no zeros in their coordinates.
BASIS = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=_generator, dtype=torch.float64)).Q
ARGUMENTS = {
    "static": {"weights": [1.0, 0.5, 2.0]},
    "single": {"task": "0"},
    "pivrg": {"baselines": [60.0, 70.0, 80.0]},
    "amtl": {"potentials": [60.0, 70.0, 80.0]},
    # These methods begin late or move slowly with their defaults. Here they show an effect within the short history.
    "annealed_calibrated": {"calibration": 2},
    "auto_lambda": {"lr": 0.03},
    "excess_mtl": {"eta": 0.3},
    "go4align": {"step_size": 0.05},
    "gradvac": {"beta": 0.3},
    "moml": {"look_ahead_lr": 0.1, "lr": 0.05},
    "rotograd": {"burn_in": 2},
    "stch": {"warmup_epochs": 1},
}


class Problem(ABC):
    """T tasks, at a point of a network.

    Attributes:
        values: (T,) the losses.
        again: (T,) the losses after the step.
        slopes: (T, P) the gradients of the shared parameters.
    """

    values: Tensor
    again: Tensor
    slopes: Tensor

    @abstractmethod
    def mixed(self, matrix: Tensor) -> Problem:
        """S new tasks whose losses are linear combinations of these; matrix: (S, T)."""

    @abstractmethod
    def turned(self, matrix: Tensor) -> Problem:
        """Tasks with the same values of the losses, and with linear combinations of the gradients; matrix: (T, T)."""

    @abstractmethod
    def batches(self, samples: int) -> list[Any]:
        """1, 2 or 3 independent batches, as `ProblemNetwork.losses` takes them.

        The update uses the mean of two batches or the third of three. Both have the gradients `slopes`.
        """

    @abstractmethod
    def network(self, strategy: Strategy, present: Tensor | None = None) -> ProblemNetwork:
        """The network; with the strategy's tasks only. `present` (T,) is False for absent tasks."""

    def scaled(self, factors: Tensor | float) -> Problem:
        """The losses times `factors` (T,)."""
        return self.mixed(torch.eye(len(self.values), dtype=torch.float64) * factors)

    def taken(self, index: Sequence[int]) -> Problem:
        """The tasks `index` in that order."""
        return self.mixed(torch.eye(len(self.values), dtype=torch.float64)[list(index)])


class ProblemNetwork(ABC):
    """The parameters of one step: the shared ones, and a head for each task.

    Attributes:
        tasks: the tasks that the strategy trains.
        theta: (P,) the shared parameters.
        heads: T vectors (F,).
    """

    tasks: Problem
    theta: nn.Parameter
    heads: list[nn.Parameter]

    @abstractmethod
    def losses(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """T losses and the features (N, …). An absent task's loss is a constant 0."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradient of each loss for the shared parameters (T, P), and for its own head (T, F)."""
        losses = self.losses(*self.tasks.batches(1))[0]
        pairs = [
            torch.autograd.grad(x, [self.theta, h], retain_graph=True) for x, h in zip(losses, self.heads, strict=True)
        ]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


@dataclass(frozen=True)
class Tasks(Problem):
    """Tasks whose losses and gradients are set.

    Attributes:
        values: (T,) the losses v.
        again: (T,) the losses after the step.
        slopes, bends: (T, P) the gradients g and the curvatures b.
        residuals: (T, N) the factors r of the heads' terms.
        noise: (T, P) the gradient of one half of the batch is g + noise, that of the other g − noise.
    """

    values: Tensor
    again: Tensor
    slopes: Tensor
    bends: Tensor
    residuals: Tensor
    noise: Tensor

    def mixed(self, matrix: Tensor) -> Tasks:
        return Tasks(*(matrix @ field for field in vars(self).values()))

    def taken(self, index: Sequence[int]) -> Tasks:
        return Tasks(*(field[list(index)] for field in vars(self).values()))

    def turned(self, matrix: Tensor) -> Tasks:
        return replace(self, slopes=matrix @ self.slopes, noise=matrix @ self.noise)

    def batches(self, samples: int) -> list[Tensor]:
        """The gradients (T, P) of each batch."""
        pair = [self.slopes + self.noise, self.slopes - self.noise]
        return {1: [self.slopes], 2: pair, 3: [*pair, self.slopes]}[samples]

    def network(self, strategy: Strategy, present: Tensor | None = None) -> CertificateNetwork:
        return CertificateNetwork(strategy, self, present)


Change = Callable[[Problem], Problem]
Source = Callable[..., Problem]  # makes random problems of (seed, dimensions, kind), as `problem` does


def same(tasks: Problem) -> Problem:
    """No change."""
    return tasks


def problem(seed: int, dimensions: int = SIZE, kind: str = "") -> Tasks:
    """Three random tasks with losses in [0.5, 2.5].

    Args:
        seed: seed of all numbers.
        dimensions: number of dimensions that the gradients span. With few dimensions, conflicts are frequent.
        kind: "short": one gradient is ten times shorter, another one for each seed. "opposite": two gradients also
            nearly cancel out.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(TASKS, *size, generator=generator, dtype=torch.float64)

    uniform = torch.rand(2, TASKS, generator=generator, dtype=torch.float64)
    bends, residuals, directions = draw(SIZE), draw(SAMPLES), BASIS[:dimensions]
    slopes, noise = draw(dimensions) @ directions, 0.3 * draw(dimensions) @ directions
    if kind == "opposite":
        slopes[1] = 0.1 * slopes[1] - slopes[0]
    if kind:
        for rows in (slopes, bends, noise, residuals):
            rows[seed % TASKS] *= 0.1
    values = 0.5 + 2 * uniform[0]
    # Every loss falls by 5 to 30 % in the step, so that FAMO learns something.
    return Tasks(values, values * (0.7 + 0.25 * uniform[1]), slopes, bends, residuals, noise)


@cache
def _read(name: str) -> dict:
    """The method's node; cached, because composing a config is slow. `config` returns copies."""
    choice, *words = shlex.split(name)
    if not words:
        return OmegaConf.to_container(OmegaConf.load(CONF / "loss" / f"{choice}.yaml"), resolve=True)
    words = [f"hydra.searchpath=[{w[len(CONFIGS) :]}]" if w.startswith(CONFIGS) else w for w in words]
    # Hydra keeps one global instance; an earlier command of this process may have left it.
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = composed(lambda words: compose("config", words).loss, [f"loss={choice}", *words])
    return OmegaConf.to_container(found, resolve=True)


def config(name: str) -> dict:
    """A copy of the method's config node.

    Args:
        name: as after `loss=` on the command line. Options may follow, such as "custom loss.file=my_loss.py", or
            --config-dir=DIR for your own methods.

    Raises:
        ConfigError: there is no such method or key.
    """
    return dict(_read(name))


def arguments(name: str, tasks: int = TASKS) -> dict:
    """The method's node, with example values for required arguments. Options in `name` come first."""
    choice, *words = shlex.split(name)
    typed = {word.lstrip("+~").partition("=")[0].removeprefix("loss.") for word in words}
    needed = {key: value for key, value in ARGUMENTS.get(choice, {}).items() if key not in typed}
    return config(name) | {key: value[:tasks] if isinstance(value, list) else value for key, value in needed.items()}


@cache
def count(name: str) -> int:
    """The number of tasks with which the method is measured: three, or fewer if it does not take three.

    Raises:
        ConfigError: the method cannot be built.
    """
    if _fits(name, TASKS) is None:
        return TASKS
    if (error := _fits(name, 2)) is None:
        return 2
    if _fits(name, 1) is None:
        return 1
    raise error


@cache
def fixed(name: str) -> bool:
    """Whether the method does not take one task fewer. A user's loss with two arguments is an example."""
    return _fits(name, count(name) - 1) is not None


def _fits(name: str, tasks: int) -> ConfigError | None:
    """The error of building the method for `tasks` tasks; None if it can be built."""
    node = arguments(name, tasks)
    try:
        schema.check(node, "loss", supplied=("tasks",))
        _build(node, tasks, seed=0)
    except ConfigError as error:
        return error


def _build(node: dict, tasks: int, seed: int) -> Strategy:
    with torch.random.fork_rng(devices=[]):  # a user's loss may start at random; it gets the same draws each time
        torch.manual_seed(seed)
        return schema.build(node, "loss", tasks=[str(i) for i in range(tasks)])


def make(name: str, tasks: int | None = None, seed: int = 0) -> Strategy:
    """The method with its defaults, in float64, for the tasks "0", "1", …; None means `count(name)` tasks."""
    tasks = count(name) if tasks is None else tasks
    strategy = _build(arguments(name, tasks), tasks, seed)
    strategy.prepare(WIDTH)
    strategy.double()
    strategy.epoch_start(0, EPOCHS, seed)
    return strategy


@dataclass(frozen=True)
class Update:
    """The result of one step: the gradients of shared parameters (P,) and heads (T, F), and weights (T,) or None."""

    shared: Tensor
    heads: Tensor
    weights: Tensor | None


class CertificateNetwork(ProblemNetwork):
    """A network with θ and the heads at 0. The heads receive the features from the strategy's `views`."""

    def __init__(self, strategy: Strategy, tasks: Tasks, present: Tensor | None = None):
        self.tasks = tasks if len(tasks.values) == strategy.tasks else tasks.taken(range(strategy.tasks))  # loss=single
        self.strategy, self.present = strategy, present
        self.theta = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
        self.heads = [nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64)) for _ in self.tasks.values]

    def losses(self, batch: Tensor) -> tuple[list[Tensor], Tensor]:
        """T losses and the features (N, F), from the gradients (T, P) of a batch."""
        t, features, losses = self.tasks, ANCHOR + self.theta.view(SAMPLES, WIDTH), []
        for i, (seen, head) in enumerate(zip(self.strategy.views(features), self.heads, strict=True)):
            if self.present is not None and not self.present[i]:
                losses.append(torch.zeros((), dtype=torch.float64))
                continue
            moved = (seen - ANCHOR).flatten()
            loss = t.values[i] + batch[i] @ moved + 0.5 * t.bends[i] @ moved.square() + t.residuals[i] @ (seen @ head)
            losses.append(loss)
        return losses, features


def step(strategy: Strategy, tasks: Problem, present: Tensor | None = None) -> Update:
    """One step as in the engine: look-ahead, backward pass, the strategy's own parameters, the pass after the step."""
    net = tasks.network(strategy, present)
    tasks, parameters = net.tasks, [net.theta, *net.heads]
    # `Step` divides a batch into halves or thirds. Six virtual samples can be divided both ways, and each part gets the
    # gradients of an independent batch.
    starts = {count: range(0, 6, 6 // count) for count in (1, 2, 3)}
    batches = {(a, a + 6 // n): batch for n in starts for a, batch in zip(starts[n], tasks.batches(n), strict=True)}
    there = torch.ones_like(tasks.again) if present is None else present.to(tasks.again)

    def forward(part: slice) -> Losses:
        if not torch.is_grad_enabled() and part == slice(0, 6):  # the forward pass after the step (FAMO)
            return Losses(tasks.again * there)
        return Losses(*net.losses(batches[part.start, part.stop]))

    groups = [{"params": parameters}]
    if own := list(strategy.parameters()):
        groups.append({"params": own})
    one = Step(strategy, torch.optim.SGD(groups, lr=RATE), [net.theta], [[h] for h in net.heads])
    info = one(forward, 6, None if present is None else present.expand(6, -1))
    # The step has already moved the strategy's parameters. Their gradients must not add up.
    for p in own:
        p.grad = None
    shared, *heads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return Update(shared, torch.stack(heads), info.weights)


def scores(epoch: int, tasks: int = TASKS) -> Tensor:
    """(T,) the accuracies in per cent after an epoch of the history."""
    return torch.linspace(30 + 10 * epoch, 60, TASKS, dtype=torch.float64)[:tasks]


def end_epoch(strategy: Strategy, tasks: Problem, epoch: int, seed: int = 0) -> None:
    """Report the epoch's losses and scores to the strategy, and begin the next epoch."""
    T = strategy.tasks
    strategy.epoch_end(Statistics(tasks.values[:T], scores(epoch, T), torch.ones(T, dtype=torch.bool)))
    strategy.epoch_start(epoch + 1, EPOCHS, seed)


def experienced(
    name: str, change: Change = same, steps: int = HISTORY, seed: int = 0, start: int = 0, source: Source = problem
) -> Strategy:
    """The method after a history of steps, at the start of an epoch.

    Args:
        name: as in loss=NAME.
        change: applied to every problem of the history.
        steps: length of the history; each step is an epoch. 0 gives a fresh strategy.
        seed: seed of the method's draws.
        start: seed of the first problem.
        source: makes the problems.
    """
    strategy = make(name, seed=seed)
    for k in range(steps):
        tasks = change(source(start + k, dimensions=4 if k % 2 else SIZE))
        step(strategy, tasks)
        end_epoch(strategy, tasks, k, seed)
    return strategy
