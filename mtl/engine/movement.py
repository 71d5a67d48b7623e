"""Checks that an optimizer changes the parameters. It reads version counters, so the host does not wait.

A tensor's `_version` counts its changes in place. A common mistake: the method's own parameters, such as log
variances, are missing in the optimizer. Nothing would fail, and the method would never learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from mtl.losses.base import Strategy
from mtl.losses.hooks import PATIENCE


class Movement:
    """The changes of parameters between the backward passes of one strategy."""

    def __init__(self) -> None:
        self._versions: tuple[int, ...] | None = None  # the model's, after the last backward pass
        self._still: dict[str, tuple[Parameter, int, Tensor]] = {}  # have got a gradient, and not moved since
        self._moves: dict[str, int] = {}  # how often the model has moved meanwhile
        self._settled: set[str] = set()  # the method's parameters that have moved; not watched any more
        self._model: Sequence[Parameter] = ()
        self._rests = 0  # calls of after_step in a row without a change of the model before
        self._values: list[Tensor] = []  # the model's values, copied after many such calls

    def look(self, strategy: Strategy, parameters: Sequence[Parameter]) -> bool | None:
        """Check before a backward pass.

        Args:
            strategy: the method.
            parameters: the model's shared parameters.

        Returns:
            whether the model has changed since the last backward pass; None if there is nothing to compare.

        Raises:
            RuntimeError: the model has changed `PATIENCE` times, but a parameter of the method never has, although it
                got gradients.
        """
        if not parameters or not self._versions or self._versions[0] != id(parameters[0]):
            return None  # the first pass, or one strategy used for two models in turn
        moved = _versions(parameters) != self._versions
        own = dict(strategy.named_parameters()) if self._still else {}
        for name, (p, version, value) in list(self._still.items()):
            if own.get(name) is not p:  # the parameter was replaced by another tensor
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
                self._settle(name)  # the values have changed: writing to p.data does not count as a version
        return moved

    def note(self, strategy: Strategy, parameters: Sequence[Parameter]) -> None:
        """Note the versions after a backward pass that has written to `parameters`."""
        self._versions, self._model = _versions(parameters), parameters
        if self._rests == PATIENCE - 1:
            self._values = [p.detach().clone() for p in parameters]
        for name, p in strategy.named_parameters():
            if p.requires_grad and p.grad is not None and name not in self._settled and name not in self._still:
                self._still[name], self._moves[name] = (p, p._version, p.detach().clone()), 0

    def after_step(self, strategy: Strategy) -> None:
        """Check when the hook `after_step` is called. A single call without a change is fine: a GradScaler skips steps.

        Raises:
            RuntimeError: the model has not changed before `PATIENCE` calls in a row.
        """
        self._rests = self._rests + 1 if _versions(self._model) == self._versions else 0
        if self._rests < PATIENCE:
            return
        self._rests = 0
        # Writing to p.data changes no version, so the values decide.
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
