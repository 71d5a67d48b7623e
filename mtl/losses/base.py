"""What a strategy sees and returns: the three families, told apart by what a method needs.

Shapes: T tasks, P shared parameters. losses (T,), jacobian (T, P), gramian (T, T), weights (T,), present (T,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mtl.config.constructors import checked
from mtl.losses import hooks
from mtl.losses.arguments import integer, task_names
from mtl.losses.epochs import Statistics, check_progress, once_an_epoch
from mtl.losses.extra import pack, unpack
from mtl.random import derive

HEADS = ("own", "weighted")
FLOOR = 1e-12  # losses are held above it where a logarithm or a ratio is taken of them
Mean = Literal["arithmetic", "geometric"]


class Strategy(nn.Module, ABC):
    """Base of every method. All state lives in parameters and buffers, so that a checkpoint holds it.

    Args:
        tasks: the number of tasks, or their names (then weights may be given by name).

    Attributes:
        family: one of the three, in words.
        claims: properties that its paper claims, by their names in `mtl.certify`.
        needs_positive: whether it takes logarithms or ratios of the losses, and so cannot see log-losses.
        gradients: of what the method takes per-task gradients: "parameters" or "features".
        heads: what task-specific parameters receive under a gradient method: the gradient of their own loss
            ("own"), or that gradient times the task's weight ("weighted"); each paper's way. Loss weighting always
            weights them.
        max_norm: norm to which the shared parameters' gradient is clipped, where that is part of the method.
        lazy: names of buffers whose shape the first step decides (such as (T, P) averages, see
            `JacobianAggregation.kept`); None until then.
        samples: how many independent batches a step needs: 1, or 2 or 3 for the double-sampling methods.
        single_task_argument: name of the argument that takes single-task results, where a method needs them.
        epoch, epochs: training progress, epoch counted from 0; set by `epoch_start`.
        uses_progress: whether its weights depend on `epoch` and `epochs`.
        flat: whether it takes features of shape (N, F) only.
        lr, weight_decay: of the method's own parameters; None follows the optimizer's.
    """

    family: str
    claims: tuple[str, ...] = ()
    needs_positive: bool = False
    gradients: str = "parameters"
    heads: str = "own"
    max_norm: float | None = None
    samples: int = 1
    lazy: tuple[str, ...] = ()
    lr: float | None = None
    weight_decay: float | None = 0.0
    single_task_argument: str | None = None
    uses_progress: bool = False
    flat: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A loop that forgets a hook must not train on in silence: every hook that a method defines notes its call.
        for hook in hooks.HOOKS:
            if hook in cls.__dict__:
                function = cls.__dict__[hook]
                setattr(cls, hook, hooks.noted(hook, once_an_epoch(function) if hook == "epoch_end" else function))
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__init__, but=("tasks",))

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

    def prepare(self, features: int) -> None:
        """Create the parameters whose shape depends on the width of the features; before the optimizer is built."""

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

    def epoch_end(self, statistics: Statistics) -> None:
        """Learn from the epoch that has ended (DWA and its kin)."""

    def after_step(self, losses: Tensor, present: Tensor | None = None) -> None:
        """Learn from what the step did (FAMO): losses (T,) of the same batch under the new parameters.

        The engine makes the extra forward pass for the methods that define this; a foreign loop does so itself.
        """

    def views(self, features: Tensor) -> list[Tensor]:
        """What each head sees of the backbone's features (N, F): the features themselves, but for RotoGrad."""
        return [features] * self.tasks

    def look_ahead(
        self,
        losses_of: Callable[[int], Tensor],
        parameters: Sequence[nn.Parameter],
        lr: float,
        present: Tensor | None = None,
    ) -> None:
        """Try steps out before the real one (the bilevel methods).

        Args:
            losses_of: losses_of(k) is a fresh forward pass over half k (0 or 1) of the batch: (T,) with a graph, and
                with the same dropout masks at every call.
            parameters: all trainable parameters of the model; to be left as they were.
            lr: the optimizer's current learning rate.
            present: (T,) bool, False where one of the halves holds no label of that task; None when all are present.
        """

    def head_weights(self, weights: Tensor | None) -> Tensor | None:
        """(T,) what the heads' own gradients are multiplied by; None leaves them alone.

        Args:
            weights: (T,) of this step's gradients, as the method returned them.
        """
        return weights if self.heads == "weighted" else None

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Strategy:
        # `.half()` and `.bfloat16()` leave counters and averages in single precision: in bfloat16, 256 + 1 is 256.
        def at_least_single(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            low = result.is_floating_point() and result.dtype.itemsize < 4
            return tensor.to(result.device, torch.float32) if low else result

        return super()._apply(at_least_single, *args, **kwargs)

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

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to no group of processes yet; a process group can be neither copied nor pickled.
        return {**self.__dict__, "across": None, "watch": None, "movement": None}

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


class LossWeighting(Strategy):
    """Family 1: combines the losses into one scalar; one backward pass."""

    family = "loss weighting"

    @abstractmethod
    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine the losses.

        Args:
            losses: (T,) differentiable; an absent task's entry is a constant 0.
            present: (T,) bool, False where the batch holds no label of that task; None when all are present.

        Returns:
            () the scalar to differentiate.
        """

    def regulariser(
        self, losses: Sequence[Tensor], features: Tensor | None, present: Tensor | None = None
    ) -> Tensor | None:
        """() a further term that reaches the parameters by other ways than the losses (Rep-MTL), or None."""
        return None


class GramianWeighting(Strategy):
    """Family 2: the update is `jacobian.T @ weights` with weights a function of the Gramian alone."""

    family = "Gramian weighting"

    def head_terms(
        self,
        losses: Sequence[Tensor],
        features: Tensor | None,
        weights: Tensor,
        heads: Sequence[Sequence[nn.Parameter]],
        own: Sequence[Sequence[Tensor | None]],
    ) -> list[list[Tensor | None]] | None:
        """What is added to each head's own gradients (ConsMTL), or None.

        Args:
            losses: T scalars with their graph.
            features: as in `mtl.backward`.
            weights: (T,) of this step.
            heads: each head's parameters.
            own: their gradients, as they stand.
        """
        return None

    @abstractmethod
    def weights(self, gramian: Tensor, present: Tensor | None = None, losses: Tensor | None = None) -> Tensor:
        """Weigh the tasks.

        Args:
            gramian: (T, T) inner products of the task gradients, J Jᵀ. An absent task's row and column are 0. With
                `samples` > 1 it is J₁ J₂ᵀ of the first two batches. The weights are then applied to the mean of both
                Jacobians (2 batches), or to the third Jacobian (3 batches).
            present: (T,) bool as in `LossWeighting.forward`.
            losses: (T,) values, without a graph; a few methods read them, and say so when they are missing.

        Returns:
            (T,) the weight of each task's gradient.
        """


class JacobianAggregation(Strategy):
    """Family 3: the update is a function of the whole Jacobian.

    Attributes:
        has_weights: whether `aggregate` returns task weights, too.
    """

    family = "Jacobian aggregation"
    has_weights: bool = False

    def kept(self, name: str, like: Tensor) -> Tensor:
        """The `lazy` buffer `name`, which holds a number for each one in the Jacobian; zeros at first.

        It follows the Jacobian to another device or precision.

        Args:
            like: (T, P) the Jacobian.

        Raises:
            RuntimeError: the buffer is of another shape: P has changed since the first step.
        """
        buffer = getattr(self, name)
        if buffer is None:
            buffer = torch.zeros_like(like)
        elif buffer.shape != like.shape:
            raise RuntimeError(
                f"{type(self).__name__}: `{name}` holds {buffer.shape[1]} numbers for each task from the steps before, "
                f"and the gradients now have {like.shape[1]}. Was a shared parameter frozen or unfrozen, or is it "
                f"another model? Make a new strategy for it: what this one has learned does not fit"
            )
        elif buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = buffer.to(like)
        setattr(self, name, buffer)
        return buffer

    @abstractmethod
    def aggregate(
        self,
        jacobian: Tensor,
        present: Tensor | None = None,
        losses: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Merge the task gradients.

        Args:
            jacobian: (T, P) one task gradient a row; an absent task's row is 0.
            present, losses: as in `GramianWeighting.weights`.
            features: (N, …) the representation, when the Jacobian is of it; then P = N · ….

        Returns:
            (P,) the direction; parameters move against it. A method that has task weights returns (direction, weights).
        """


def overrides(strategy: Strategy, base: type[Strategy], method: str) -> bool:
    """Whether the strategy belongs to the family `base` and has its own `method`."""
    return isinstance(strategy, base) and getattr(type(strategy), method) is not getattr(base, method)


def masked(values: Tensor, present: Tensor | None) -> Tensor:
    """`values` (T,) with 0 where the task is absent; never multiplies, so a NaN there cannot leak."""
    return values if present is None else torch.where(present, values, torch.zeros_like(values))


def count(present: Tensor | None, like: Tensor) -> Tensor:
    """() the number of present tasks, at least 1, in the dtype of `like` (T,)."""
    return torch.full_like(like[0], len(like)) if present is None else present.sum().clamp(min=1).to(like)


def uniform(present: Tensor | None, like: Tensor) -> Tensor:
    """(T,) weights 1/T of the mean over the present tasks, in the dtype of `like`."""
    return masked(torch.ones_like(like), present) / count(present, like)


def renormalised(weights: Tensor, present: Tensor | None) -> Tensor:
    """(T,) `weights`, whose sum is T, of the present tasks alone, whose number is then the sum; 0 elsewhere."""
    if present is None:
        return weights
    kept = masked(weights, present)
    return kept * (count(present, kept) / kept.sum().clamp(min=FLOOR))


def softmax(scores: Tensor, present: Tensor | None) -> Tensor:
    """(T,) softmax over the present tasks, 0 elsewhere."""
    if present is None:
        return torch.softmax(scores, 0)
    return torch.softmax(torch.where(present, scores, -torch.inf), 0).nan_to_num(0.0)


def logs(values: Tensor, present: Tensor | None) -> Tensor:
    """(T,) log of values >= 0, 0 where the task is absent. A value of 0 counts as `FLOOR` and has gradient 0."""
    if present is not None:
        values = torch.where(present, values, torch.ones_like(values))
    return values.clamp(min=FLOOR).log()


def combine(losses: Tensor, weights: Tensor, present: Tensor | None, mean: Mean = "arithmetic") -> Tensor:
    """() Σ_i w_i L_i, or the geometric mean Π_i L_i^{w_i/Σw}, over the present tasks.

    The geometric mean (Yun & Cho, ICCV 2023) goes through logs: the product of many losses over- or underflows, and an
    absent task's 0^w would make the total 0 and its gradient NaN.
    """
    weights = masked(weights.to(losses), present)
    if mean == "arithmetic":
        return (weights * masked(losses, present)).sum()
    return (weights / weights.sum().clamp(min=FLOOR) * logs(losses, present)).sum().exp()


def moving_average(average: Tensor, values: Tensor, share: float) -> Tensor:
    """(T,) `average` moved to `values` by `share`; NaN there is "no value yet", here "no value this time"."""
    moved = torch.where(average.isnan(), values, share * values + (1 - share) * average)
    return torch.where(values.isnan(), average, moved)
