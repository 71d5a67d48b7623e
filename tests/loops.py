"""A training loop as a stranger writes it: an own model, own losses, a plain optimizer, and all hooks of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import shipped
import torch
from torch import Tensor, nn

import mtl
from mtl.certify.problem import WIDTH, make
from mtl.losses import Statistics, Strategy
from mtl.losses.hooks import defines

TASKS = 3
METHODS = [name for name in shipped.options("loss") if name not in ("custom", "single")]


class Net(nn.Module):
    """A shared layer, three heads, and positive losses of which no two are alike."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Linear(4, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(TASKS))
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.trunk(x).tanh()

    def forward(self, x: Tensor, y: Tensor, views: Callable = lambda f: [f] * TASKS) -> tuple[list[Tensor], Tensor]:
        features = self.features(x)
        seen = zip(views(features), self.heads, strict=True)
        return [(head(view)[:, 0] - y[:, i]).square().mean() + 0.1 for i, (view, head) in enumerate(seen)], features


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 4, generator=draws, dtype=torch.float64)
    return x, torch.randn(size, TASKS, generator=draws, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.5])


class Loop:
    """Trains `Net` with a method; `step` is what the README says, hooks included.

    Args:
        wrap: the model as it is called, such as DistributedDataParallel around it.
        part: which samples of a batch this process sees.
    """

    def __init__(
        self,
        strategy: str | Strategy,
        wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
        part: slice = slice(None),
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        group: Any = "auto",
        **options,
    ):
        self.strategy = make(strategy) if isinstance(strategy, str) else strategy
        self.strategy.group = group
        self.net, self.part, self.options = Net(), part, options
        self.model = wrap(self.net)
        self.optimizer = optimizer([*self.net.parameters(), *self.strategy.parameters()], lr=0.05)

    def losses(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.model(x, y, self.strategy.views)

    def fill(self, step: int, factors: Sequence[float] = (1.0,) * TASKS, **options):
        """Everything of a step but the optimizer's: `.grad` is filled. `factors` multiply the losses."""
        x, y = (t[self.part] for t in batch(step))
        if defines(self.strategy, "look_ahead"):
            halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
            self.strategy.look_ahead(lambda k: torch.stack(self.losses(*halves[k])[0]), self.net.parameters(), 0.05)
        if self.strategy.samples == 1:
            losses, features = self.losses(x, y)
            losses = [loss * factor for loss, factor in zip(losses, factors, strict=True)]
        else:
            chunks = zip(x.tensor_split(self.strategy.samples), y.tensor_split(self.strategy.samples), strict=True)
            losses = [[x * s for x, s in zip(self.losses(*c)[0], factors, strict=True)] for c in chunks]
            features = None
        self.optimizer.zero_grad()
        heads = [head.parameters() for head in self.net.heads]
        more = {"features": features} if features is not None else {}
        return mtl.backward(losses, self.strategy, self.net.trunk, heads, **more, **self.options, **options)

    def finish(self, step: int) -> None:
        """The optimizer's step, and what follows it."""
        self.optimizer.step()
        self.look_back(step)

    def look_back(self, step: int) -> None:
        """What some methods learn from the step."""
        if defines(self.strategy, "after_step"):
            with torch.no_grad():
                self.strategy.after_step(torch.stack(self.losses(*(t[self.part] for t in batch(step)))[0]))

    def epoch(self, epoch: int, steps: int = 3) -> None:
        self.strategy.epoch_start(epoch, 4)
        for step in range(epoch * steps, (epoch + 1) * steps):
            self.fill(step)
            self.finish(step)
        with torch.no_grad():
            means = torch.stack([torch.stack(self.net(*(t[self.part] for t in batch(k)))[0]) for k in range(2)]).mean(0)
        scores = 90 - means  # linear, so that the mean over processes is the score of the whole
        self.strategy.epoch_end(Statistics(means, scores, torch.ones(TASKS, dtype=torch.bool)))

    def gradients(self) -> list[Tensor]:
        parameters = [*self.net.parameters(), *self.strategy.parameters()]
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    def numbers(self) -> Tensor:
        """All parameters and the method's buffers, in one vector."""
        state = [*self.net.state_dict().values(), *self.strategy.memory().values()]
        return torch.cat([t.detach().double().flatten() for t in state])
