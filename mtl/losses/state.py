"""What a strategy keeps so that a method's author need not: its random stream, its checkpoint, its dtype."""

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
    """The bookkeeping below every strategy. `Strategy` says what the arguments and attributes mean."""

    group: Any = "auto"
    lazy: tuple[str, ...] = ()

    def __init__(self, tasks: int | Sequence[str]):
        super().__init__()
        self.names = task_names(tasks)
        self.epoch, self.epochs = 0, 1
        self.calls = hooks.Calls()
        self.across: hooks.Across | None = None  # averages over processes, in a foreign loop that has several
        self.grouped = False  # whether its last step was one of all processes of torch.distributed
        self.alone: str | None = None  # the hook that was called before it was known over which processes to average
        self.looks: list[int] = []  # the engine's: how often it has looked at each task's graph
        self.watch: Any = None  # the engine's, for flags that arrive from a GPU some steps later
        self.movement: Any = None  # the engine's: whether an optimizer moves the parameters
        self._seed: int | None = None  # of the random stream, since the last epoch_start
        self._base: int | None = None  # from which it follows in every epoch
        for name in self.lazy:
            self.register_buffer(name, None)
        self._generators: dict[torch.device, torch.Generator] = {}

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return len(self.names)

    # -- progress and the random stream -------------------------------------------------------------------------------

    def epoch_start(self, epoch: int, epochs: int, seed: int | None = None) -> None:
        """Tell the progress and reseed the method's random stream.

        Reseeding each epoch makes the draws a function of (seed, epoch), so a resumed run needs no generator state.

        Args:
            epoch: counted from 0. A training that goes on after `epochs` keeps the weights of its planned end.
            epochs: their planned number.
            seed: of the run; None keeps the one before, and at first takes that of `torch.manual_seed`.

        Raises:
            ValueError: one of them is no integer, the epoch is negative, or `epochs` is less than 1.
            RuntimeError: the method learns from the end of each epoch, and nobody told it of the last one's.
        """
        epoch, epochs = check_progress(epoch, epochs)
        hooks.check_epoch(self, epoch)
        self.epoch, self.epochs = epoch, epochs
        if seed is not None:
            self._base = integer("seed", seed)
        self.reseed(derive(self.base_seed(), "method", epoch))

    def generator(self, device: torch.device) -> torch.Generator:
        """The method's own random stream on `device`: never the global one, which data and dropout share."""
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
        """Where the random streams of CPUs stand."""
        return {device: g.get_state() for device, g in self._generators.items() if device.type == "cpu"}

    def redraw(self, draws: dict[torch.device, Tensor]) -> None:
        """Draw again what was drawn since `draws`."""
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
        # A copy belongs to no group of processes yet; a process group can be neither copied nor pickled.
        state = {**self.__dict__, "across": None, "watch": None, "movement": None}
        if state.get("group") is not None:
            state.pop("group")
        return state

    def memory(self) -> dict[str, Tensor]:
        """What the method has learned: its parameters and buffers by name, the part of `state_dict` that has tasks."""
        return {name: value for name, value in self.state_dict().items() if not name.endswith("_extra_state")}

    def get_extra_state(self) -> Tensor:
        """(8192,) float32, what a checkpoint needs besides parameters and buffers: progress, hooks, the random stream.

        Many loops compute with every entry of a `state_dict`: halve it, or average it. So it is as `pack` writes it.
        """
        streams = {str(d): b64encode(bytes(g.get_state().tolist())).decode() for d, g in self._generators.items()}
        progress = {"epoch": self.epoch, "epochs": self.epochs, "seed": self._seed, "streams": streams}
        progress |= {"names": list(self.names), "base": self._base, "method": type(self).__name__}
        progress |= {"grouped": True} if self.grouped else {}
        return pack({**progress, "calls": self.calls.state()})

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from `get_extra_state`; on another kind of device the stream begins anew, from the same seed.

        Raises:
            ValueError: it is of another method or other tasks, or was computed with.
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
        # Before anything is loaded: a refused state leaves the strategy as it was.
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self._check_owner(unpack(state))
        for name in self.lazy:
            saved = state_dict.get(prefix + name)
            # A checkpoint is read on the CPU; the buffer belongs where the others are.
            device = next((b.device for b in self.buffers() if b is not None), None)
            self.register_buffer(name, None if saved is None else torch.empty_like(saved, device=device))
        # Checkpoints of the first release have no extra state.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_owner(self, known: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: the extra state is of another method, or of other tasks.
        """
        mine = type(self).__name__
        if (method := known.get("method", mine)) != mine:  # old states do not say
            raise ValueError(f"state_dict: of the method {method}; this strategy is {mine}")
        if known["names"] != list(self.names):
            told, here = ", ".join(known["names"]), ", ".join(self.names)
            raise ValueError(f"state_dict: of the tasks {told}, in this order; this strategy has {here}")
