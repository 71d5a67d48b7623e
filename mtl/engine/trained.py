"""Checks that a run really changes its model. If it never does, the run must not end as a success."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl.config.source import definition
from mtl.engine.names import is_users_class
from mtl.errors import UserError
from mtl.losses.base import Strategy
from mtl.metrics.tally import Tally

log = logging.getLogger("mtl")


class NothingTrained(UserError):
    """The run does not train its model: exit code 1, with the likely cause."""


class Watch:
    """Observes one epoch on the device: do gradients arrive at the model, and do its parameters change?

    Weight decay alone also changes parameters. So a change counts only if gradients have arrived as well.

    Args:
        model: the model to observe.
        optimizer: its first group contains the model's parameters.
        tally: sums up the gradients' sizes; the host reads them with the epoch's other sums.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, tally: Tally):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.before = [p.detach().clone() for p in self.parameters]
        self.optimizer, self.tally, self.rate = optimizer, tally, 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Observe a step. Call it after the step, while `.grad` is still filled."""
        self.rate = max(self.rate, float(self.optimizer.param_groups[0]["lr"]))
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:  # the largest element and not the norm, because squares of tiny gradients underflow to 0
            values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            self.tally.add("watch/gradient", torch.nn.utils.get_total_norm(values, norm_type=torch.inf))

    @torch.no_grad()
    def finish(self) -> None:
        """Compare the parameters with the start. Call it after the last step, before the sums are read."""
        changed = [(p != old).any() for p, old in zip(self.parameters, self.before, strict=True)]
        self.tally.add("watch/changed", torch.stack(changed).any())

    def cause(self, read: Mapping[str, Tensor]) -> Idle | None:
        """The reason why this epoch has changed nothing; None if it has trained.

        Args:
            read: the epoch's sums.
        """
        full = self.optimizer.param_groups[0].get("initial_lr", self.rate)
        if not read["count"].any():
            return Idle("no training sample has a label of any task", certain=True)
        if "watch/gradient" not in read:
            return Idle("no gradient reaches it, the losses or their total do not depend on it", certain=True)
        if not read["watch/gradient"]:
            return Idle("all its gradients are 0; look at the weights that the loss gives, and at the network")
        if full == 0:
            return Idle("optimizer.lr=0", certain=True)
        if self.rate == 0:
            return Idle("the schedule's rate is 0", expected=True)
        if not read["watch/changed"]:
            return Idle(f"the steps are too small to change a parameter (optimizer.lr={full:g})")
        return None


def say_unweighed(strategy: Strategy, row: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Warn of tasks that a user's own method has given the weight 0 in a whole epoch: `return losses[0]`, for example.

    Args:
        strategy: a method of ours is not looked at: `single` and `static` mean it.
        row: the epoch's row of metrics.jsonl.
        tasks: those that count in the epoch's stage.
    """
    unused = [task for task in tasks if row.get(f"weights/{task}") == 0]
    if unused and is_users_class(type(strategy)):
        what = f"has given {', '.join(unused)} the weight 0 in each step of epoch {int(row['epoch'])}"
        where = f"{type(strategy).__name__} (defined in {definition(type(strategy))})"
        log.info(f"WARNING   {where} {what}: the shared parameters learn nothing from that")


@dataclass(frozen=True)
class Idle:
    """The reason why an epoch has changed nothing.

    Args:
        why: the likely cause, as text.
        certain: whether later epochs will certainly change nothing either.
        expected: whether this was expected, such as in a warm-up that begins with rate 0.
    """

    why: str
    certain: bool = False
    expected: bool = False

    def judge(self, epoch: int, last: bool) -> None:
        """Warn, or end the run, after epoch number `epoch`, counted from 0.

        Args:
            last: whether it is the run's last one.

        Raises:
            NothingTrained: no later epoch can be expected to train.
        """
        message = f"epoch {epoch + 1} has changed no parameter of the model: {self.why}"
        if self.certain or last:
            raise NothingTrained(message)
        if not self.expected:
            log.info(f"WARNING   {message}")
