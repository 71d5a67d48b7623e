"""The state that every strategy has, so that a method's author need not care: random stream, checkpoint, dtype."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl.losses import hooks
from mtl.losses.arguments import integer, task_names
from mtl.losses.epochs import check_progress
from mtl.losses.extra import pack, unpack
from mtl.random import derive


class StrategyState(nn.Module):
    """The bookkeeping of every strategy. `Strategy` documents the arguments and attributes."""

    group: Any = "auto"
    lazy: tuple[str, ...] = ()

    def __init__(self, tasks: int | Sequence[str]):
        super().__init__()
        self.names = task_names(tasks)
        self.epoch, self.epochs = 0, 1
        self.calls = hooks.Calls()
        # For a user's own loop on several processes:
        self.across: hooks.Across | None = None  # the processes over which losses and gradients are averaged
        self.grouped = False  # whether the last step was made by all processes of torch.distributed together
        self.alone: str | None = None  # a hook that has already been called for one process only; see `hooks._known`
        # Written by the engine:
        self.looks: list[int] = []  # for each task, how often its graph was checked
        self.watch: Any = None  # negative losses, read from a GPU some steps later
        self.movement: Any = None  # notes whether an optimizer moves the parameters
        # The random stream:
        self._seed: int | None = None  # its seed since the last epoch_start
        self._base: int | None = None  # the seed from which every epoch's seed is derived
        for name in self.lazy:
            self.register_buffer(name, None)
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return len(self.names)

    # -- progress and the random stream -------------------------------------------------------------------------------

    def epoch_start(self, epoch: int, epochs: int, seed: int | None = None) -> None:
        """Announce an epoch: set the progress, and reseed the method's random stream.

        The stream is reseeded in each epoch, so its draws depend only on the seed and the epoch. So a resumed run draws
        the same numbers.

        Args:
            epoch: number of the epoch, counted from 0. If it exceeds `epochs`, methods with a schedule keep the weights
                of the planned end.
            epochs: planned number of epochs.
            seed: seed of the run. None keeps the last seed; the first time, it takes the seed of `torch.manual_seed`.

        Raises:
            ValueError: an argument is not an integer, `epoch` is negative, or `epochs` is less than 1.
            RuntimeError: the method needs `epoch_end`, and it was not called for the last epoch.
        """
        epoch, epochs = check_progress(epoch, epochs)
        hooks.check_epoch(self, epoch)
        self.epoch, self.epochs = epoch, epochs
        if seed is not None:
            self._base = integer("seed", seed)
        self.reseed(derive(self.base_seed(), "method", epoch))

    def generator(self, device: torch.device) -> torch.Generator:
        """The method's own random stream on `device`. The global stream is not used: dropout draws from it."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.stream_seed())
        return self._generators[device]

    def stream_seed(self) -> int:
        """Seed of the random stream. Without `epoch_start`, `torch.manual_seed` decides it at the first draw."""
        if self._seed is None:
            self._seed = derive(torch.initial_seed(), "method")
        return self._seed

    def base_seed(self) -> int:
        """The seed of the random streams of all epochs; `torch.manual_seed` decides if `epoch_start` was given none."""
        if self._base is None:
            self._base = derive(torch.initial_seed(), "method")
        return self._base

    def reseed(self, seed: int) -> None:
        """Begin the random stream anew."""
        self._seed = seed
        for generator in self._generators.values():
            generator.manual_seed(seed)

    def draws(self) -> dict[torch.device, Tensor]:
        """The states of the random streams on CPUs, for `redraw`."""
        return {device: g.get_state() for device, g in self._generators.items() if device.type == "cpu"}

    def redraw(self, draws: dict[torch.device, Tensor]) -> None:
        """Set the streams back to `draws`, so that the next numbers are the same again."""
        # A stream that did not exist at the time of `draws` starts from its seed.
        for device, generator in self._generators.items():
            if device in draws:
                generator.set_state(draws[device])
            elif device.type == "cpu":
                generator.manual_seed(self.stream_seed())

    # -- dtype and device ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> StrategyState:
        # `.half()` and `.bfloat16()` leave counters and averages in single precision: in bfloat16, 256 + 1 is 256.
        def at_least_single(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            low = result.is_floating_point() and result.dtype.itemsize < 4
            return tensor.to(result.device, torch.float32) if low else result

        return super()._apply(at_least_single, *args, **kwargs)

    # -- copies and checkpoints ---------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A process group can be neither copied nor pickled. So a copy starts without one.
        state = {**self.__dict__, "across": None, "watch": None, "movement": None}
        if state.get("group") is not None:
            state.pop("group")
        return state

    def memory(self) -> dict[str, Tensor]:
        """The method's parameters and buffers by name: `state_dict` without the extra state."""
        return {name: value for name, value in self.state_dict().items() if not name.endswith("_extra_state")}

    def get_extra_state(self) -> Tensor:
        """(8192,) float32: progress, calls of hooks, and random streams, for a checkpoint. See `mtl.losses.extra`."""
        streams = {str(d): b64encode(bytes(g.get_state().tolist())).decode() for d, g in self._generators.items()}
        progress = {"epoch": self.epoch, "epochs": self.epochs, "seed": self._seed, "streams": streams}
        progress |= {"names": list(self.names), "base": self._base, "method": type(self).__name__}
        progress |= {"grouped": True} if self.grouped else {}
        return pack({**progress, "calls": self.calls.state()})

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a state of `get_extra_state`. On another kind of device, the random stream starts anew.

        Raises:
            ValueError: the state belongs to another method or to other tasks, or its values were changed.
        """
        known = unpack(state)
        self._check_owner(known)
        self.epoch, self.epochs, self._seed, self._base = (known[key] for key in ("epoch", "epochs", "seed", "base"))
        self.calls, self.grouped = hooks.Calls.of(known["calls"]), known.get("grouped", False)
        self._generators = {}
        for name, saved in known["streams"].items():
            device = torch.device(name)
            if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
                self.generator(device).set_state(torch.frombuffer(bytearray(b64decode(saved)), dtype=torch.uint8))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Checked before anything is loaded, so that a refused state changes nothing.
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self._check_owner(unpack(state))
        for name in self.lazy:
            saved = state_dict.get(prefix + name)
            # torch can load only into a buffer that exists, with the right shape. A checkpoint is read on the CPU, but
            # the buffer belongs on the device of the other buffers.
            device = next((b.device for b in self.buffers() if b is not None), None)
            self.register_buffer(name, None if saved is None else torch.empty_like(saved, device=device))
        # Checkpoints of the first release have no extra state.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_owner(self, known: Mapping[str, Any]) -> None:
        """Check that a state belongs to this method and these tasks.

        Raises:
            ValueError: the extra state is of another method, or of other tasks.
        """
        mine = type(self).__name__
        if (method := known.get("method", mine)) != mine:  # states of older versions have no method
            raise ValueError(f"state_dict: of the method {method}; this strategy is {mine}")
        if known["names"] != list(self.names):
            saved, here = ", ".join(known["names"]), ", ".join(self.names)
            raise ValueError(f"state_dict: of the tasks {saved}, in this order; this strategy has {here}")
