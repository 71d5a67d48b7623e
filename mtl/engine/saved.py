"""What a run saves of its model, optimizer and method, so that it can be resumed exactly."""

from __future__ import annotations

import logging

import torch

from mtl.archs.model import Model
from mtl.engine.pystate import PythonState, Unsavable
from mtl.errors import SetupError, one_line
from mtl.losses import Strategy

log = logging.getLogger("mtl")


class Saved:
    """Saves and restores the state of a model, its optimizer and its method, with a user's own attributes.

    A run's seed and the number of its epoch give all random numbers, so no random state is saved.
    """

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, strategy: Strategy, device: torch.device):
        self._parts = {"model": model, "optimizer": optimizer, "strategy": strategy}
        self._python = PythonState(strategy, model, device)
        self._unsavable: str | None = None  # why a user's own attributes cannot be saved, if they cannot

    def state(self) -> dict:
        """The state of all three, and of a user's attributes.

        If a user's attributes cannot be saved, the entry "unsavable" says why. The run goes on, but cannot be resumed.
        """
        state = {name: part.state_dict() for name, part in self._parts.items()}
        if python := self.python_state():
            state["python"] = python
        if self._unsavable:
            state["unsavable"] = self._unsavable
        return state

    def load(self, state: dict) -> None:
        """Restore what `state` returned.

        Raises:
            SetupError: a part of the state could not be saved, or the state belongs to other classes.
        """
        if (why := state.get("unsavable")) and state.get("epoch"):
            raise SetupError(
                f"the run cannot be resumed exactly: {why}; keep it in a buffer, a number, a list, a dict or a tensor, "
                "and delete the run's folder to start afresh"
            )
        if python := state.get("python"):
            # This comes first. Some modules create parameters in their first batch; these must exist before
            # load_state_dict can fill them.
            try:
                self._python.restore(python)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SetupError(f"last.pt does not fit the classes of this run: {one_line(error)}") from error
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def python_state(self) -> dict | None:
        """The attributes of a user's own classes. If they cannot be saved: None, and one warning."""
        try:
            return self._python.save()
        except Unsavable as error:
            if self._unsavable is None:
                self._unsavable = str(error)
                log.info(f"WARNING   {error}: this run cannot be resumed after an interruption")
            return None
