"""Whether an optimizer moves the parameters, read from their version counters: no device waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.losses.base import Strategy
from mtl.losses.hooks import PATIENCE


class Movement:
    """What happened between the backward passes of one strategy."""

    def __init__(self) -> None:
        self._versions: tuple[int, ...] | None = None  # of the model's parameters, after the last backward pass
        self._still: dict[str, tuple[Parameter, int, Tensor]] = {}  # got a gradient, and have not moved since
        self._moves: dict[str, int] = {}  # how often the model's parameters have moved in that time
        self._settled: set[str] = set()  # the method's parameters that were seen to move
        self._model: Sequence[Parameter] = ()
        self._rests = 0  # calls of after_step in a row before which the model had not moved
        self._values: list[Tensor] = []  # the model's parameters, once such calls are many

    def look(self, strategy: Strategy, parameters: Sequence[Parameter]) -> bool | None:
        """Before a backward pass.

        Args:
            parameters: of the model, which the pass fills.

        Returns:
            whether they moved since the last backward pass; None where there is nothing to compare.

        Raises:
            RuntimeError: they moved `PATIENCE` times, and a parameter of the method that got gradients never did.
        """
        if not parameters or not self._versions or self._versions[0] != id(parameters[0]):
            return None  # nothing to compare, or another model's turn
        moved = _versions(parameters) != self._versions
        own = dict(strategy.named_parameters()) if self._still else {}
        for name, (p, version, value) in list(self._still.items()):
            if own.get(name) is not p:  # another tensor took its place
                del self._still[name]
            elif p._version != version or not p.requires_grad:
                self._settle(name)
            elif moved:
                self._moves[name] += 1
                if self._moves[name] < PATIENCE:
                    continue
                if torch.equal(p, value):
                    raise RuntimeError(
                        f"{type(strategy).__name__}: its parameter {name} got gradients, but never moved in {PATIENCE} "
                        "steps of the model: add strategy.parameters() to the optimizer, or freeze them with "
                        "strategy.requires_grad_(False)"
                    )
                self._settle(name)  # a loop that writes to p.data leaves the version alone
        return moved

    def note(self, strategy: Strategy, parameters: Sequence[Parameter]) -> None:
        """After a backward pass that has filled `parameters`."""
        self._versions, self._model = _versions(parameters), parameters
        if self._rests == PATIENCE - 1:
            self._values = [p.detach().clone() for p in parameters]
        for name, p in strategy.named_parameters():
            if p.requires_grad and p.grad is not None and name not in self._settled and name not in self._still:
                self._still[name], self._moves[name] = (p, p._version, p.detach().clone()), 0

    def after_step(self, strategy: Strategy) -> None:
        """When `after_step` is called. A GradScaler may skip a step, so one without movement is no fault.

        Raises:
            RuntimeError: the model has not moved before `PATIENCE` calls in a row.
        """
        self._rests = self._rests + 1 if _versions(self._model) == self._versions else 0
        if self._rests < PATIENCE:
            return
        self._rests = 0  # a loop that writes to p.data leaves the versions alone
        if all(torch.equal(p, old) for p, old in zip(self._model, self._values, strict=False)):
            raise RuntimeError(
                f"{type(strategy).__name__} learns from what a step did, and no parameter had moved before "
                f"{PATIENCE} calls of after_step: call it after optimizer.step()"
            )

    def _settle(self, name: str) -> None:
        self._settled.add(name)
        del self._still[name]


def _versions(parameters: Sequence[Parameter]) -> tuple[int, ...]:
    return (id(parameters[0]), *(p._version for p in parameters)) if parameters else ()
