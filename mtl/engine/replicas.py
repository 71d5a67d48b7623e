"""Several processes in a user's own loop with DistributedDataParallel: each has a replica and a part of the batch.

DistributedDataParallel averages the gradients of `Tensor.backward`, but not the gradients of single tasks. So the
losses, the Jacobian and the heads' gradients are averaged here. If the parts of the batch are equally large, every
process then makes the step that one process would make with the whole batch.

Each call first sends one message of a fixed size: the losses, whether this process has failed, and a fingerprint of the
call. This rule avoids deadlocks: no process decides on a collective by something that only it knows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from mtl.engine import agreement
from mtl.engine.agreement import Call
from mtl.engine.reach import EVERY, reach
from mtl.errors import one_line
from mtl.losses import hooks
from mtl.losses.base import GramianWeighting, LossWeighting, Strategy
from mtl.losses.extra import pack

Group = Any  # torch.distributed.ProcessGroup, which some builds of torch do not have
FIELDS = 7  # numbers at the start of a message, before its losses; see `Replicas._send`
ROWS, TASKS = 4, 16  # a message has room for 4 rows of 16 tasks (32, 48, …): most wrong numbers of tasks fit in


@dataclass
class Replicas:
    """The processes that share a batch.

    Args:
        group: the process group.
        steps: steps of this process since all have compared model and strategy; -1 before that.
        sent: whether this step's message was sent, so that the others no longer wait for it.
        tied: the last result of `any_of`.
    """

    group: Group
    steps: int = -1
    sent: bool = False
    tied: tuple[bool, ...] = ()

    @property
    def size(self) -> int:
        """The number of processes."""
        return dist.get_world_size(self.group)

    def check(self, strategy: Strategy, of_features: bool, shared: Sequence[Parameter]) -> None:
        """Check that the method works with parts of a batch, and that each process holds whole parameters.

        Raises:
            ValueError: the method needs features or steps on the whole batch, or parameters are divided (FSDP).
        """
        name = type(strategy).__name__
        if hooks.defines(strategy, "look_ahead"):
            raise ValueError(f"group: {name} tries steps out on parts of the batch, which works in one process only")
        merges = not isinstance(strategy, LossWeighting | GramianWeighting)
        if hooks.differentiates(strategy) or (of_features and merges):
            raise ValueError(f"group: {name} works on the features of the whole batch, which needs one process")
        if any(_sharded(p) for p in shared):
            raise ValueError("shared: parameters of FSDP, of which each process holds a part; use "
                             "DistributedDataParallel")  # fmt: skip
        if strategy.alone is not None:
            raise ValueError(
                f"group: {strategy.alone} was called before the first mtl.backward in this process, so it saw the "
                "values of this process only; call it after"
            )

    def check_constants(self, losses: Sequence[Tensor], names: Sequence[str], heads: Sequence[Sequence[Any]]) -> None:
        """Check that DistributedDataParallel will get all the gradients for which it waits.

        Raises:
            ValueError: some losses have a graph and others have none, so that gradients of heads would be missing.
        """
        constant = [i for i, loss in enumerate(losses) if not loss.requires_grad]
        if not constant or len(constant) == len(losses):  # if no loss has a graph, `_judge` decides
            return
        if any("_DDPSinkBackward" in reach(loss).nodes for loss in losses if loss.requires_grad):
            return  # find_unused_parameters=True: it knows that no gradients will come
        waits = [i for i in constant if heads[i] or not any(heads)]
        if waits:
            raise ValueError(
                f"losses[{waits[0]}] ({names[waits[0]]}): has no graph in this process, and DistributedDataParallel "
                "waits for the gradient of its head; add 0 * prediction.sum(), or set find_unused_parameters=True"
            )

    @property
    def all(self) -> bool:
        """Whether these are all processes that torch.distributed has started."""
        return self.group is dist.group.WORLD

    # -- messages -----------------------------------------------------------------------------------------------------

    def step(
        self,
        strategy: Strategy,
        call: Call,
        values: Tensor,
        present: Tensor | None,
        model: tuple[Sequence[Parameter], Sequence[Sequence[Parameter]]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange the message of a step. In the first step, all take over the first process's strategy.

        Args:
            strategy: the method.
            call: the facts that must be equal in all processes.
            values: (T,) losses.
            present: (T,) bool.
            model: the shared parameters, and the parameters of each head.

        Returns:
            (T,) this process's share of each task's mean loss; (T,) whether the task is present in any process; and
            (T,) the mean losses over the processes in which the task is present.

        Raises:
            ValueError: the processes do not belong together.
            RuntimeError: another process cannot take this step.
        """
        # Models and calls are compared in the first steps and in every 100th: a comparison waits for the device.
        looks = self.steps <= 1 or strategy.calls.steps % EVERY == 0
        here = torch.ones_like(values) if present is None else present.to(values)
        first = self._send(strategy, call, [(here, values)], looks)
        if (looks or first) and not _capturing(values.device):
            self._compare(strategy, call, model, first, values.device)
        self.steps = 0 if first else self.steps + 1
        there, total = self._received[:2].to(values)
        return here / there.clamp(min=1), there > 0, total / there.clamp(min=1)

    def means(
        self, strategy: Strategy, hook: str, values: Sequence[Tensor | None], present: Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """Average the arguments of a hook over the processes.

        Args:
            strategy: the method.
            hook: name of the hook.
            values: the arguments, each (T,), or None if this process has no such values.
            present: for each argument, (T,) bool: which of its values are known; None means all.

        Returns:
            for each argument, the (T,) means over the processes that know a value, and (T,) bool: whether any does.
        """
        like = next(v for v in values if v is not None)
        rows = []
        for value, known in zip(values, present, strict=True):
            value = torch.zeros_like(like) if value is None else value
            rows.append((torch.ones_like(value) if known is None else known.to(value), value))
        self._send(strategy, Call(hook, {}), rows, looks=False)
        result = []
        for known, total in self._received.split(2)[: len(rows)]:
            result.append(((total / known.clamp(min=1)).to(like), (known > 0).to(like.device)))
        return result

    @torch.no_grad()
    def _send(self, strategy: Strategy, call: Call, rows: Sequence[tuple[Tensor, Tensor]], looks: bool) -> bool:
        """Sum `rows` of (known, value) over the processes, into `_received` (4, T).

        Returns:
            whether any process is new, so that all must compare models and take over the first process's strategy.
        """
        device, tasks = self.carrier(rows[0][0].device), strategy.tasks
        new = call.name == "mtl.backward" and self.steps < 0
        marks = [_mark(agreement.facts_of(strategy, call)), 0 if new else _mark(agreement.progress(strategy))]
        # One sum can compare numbers: n marks are all equal if and only if n · Σ mark² = (Σ mark)². After the marks and
        # their squares come three counts of processes: failed, new, with a graph.
        fields = [*marks, *(mark**2 for mark in marks), 0, int(new), int(call.graph)]
        table = torch.zeros(ROWS, -(-tasks // TASKS) * TASKS, dtype=torch.float64, device=device)
        for i, (known, value) in enumerate(rows):
            table[2 * i, :tasks] = known
            table[2 * i + 1, :tasks] = torch.where(known > 0, value, 0.0)
        message = self._sum(torch.cat([_numbers(fields, device), table.flatten()]))
        self.sent = True
        self._received = message[FIELDS:].view(ROWS, -1)[:, :tasks]
        # On a GPU the host reads nothing in an ordinary step: it would wait for the device.
        if _capturing(device) or not (device.type == "cpu" or looks or not call.graph):
            return False
        return self._judge(strategy, call, message[:FIELDS].tolist(), device)

    def _judge(self, strategy: Strategy, call: Call, fields: list[float], device: torch.device) -> bool:
        """Compare the processes by the sums in a message.

        Returns:
            whether any process is new.

        Raises:
            ValueError: the processes differ.
            RuntimeError: a process has failed.
        """
        facts, known, fact_squares, known_squares, failed, new, graphs = fields
        if failed:
            self._explain(None, device)
        if self.size * fact_squares != facts**2:
            self._differ(agreement.facts_of(strategy, call), device)
        # If a process is new, all take over the first process's progress. Until then it may differ.
        if not new and self.size * known_squares != known**2:
            self._differ(agreement.progress(strategy), device)
        if 0 < graphs < self.size:
            raise ValueError(
                f"group: {self.size - graphs:.0f} of {self.size} processes have no label of any task, so their losses "
                "have no graph, and DistributedDataParallel waits for it; add 0 * prediction.sum() to a loss"
            )
        return new > 0

    def _differ(self, facts: dict[str, Any], device: torch.device) -> None:
        difference = agreement.first_difference(self._gather(facts, device))
        raise ValueError(
            f"group: the processes differ in {difference}; all must call mtl.backward and the hooks alike and equally "
            f"often; {agreement.ALONE}"
        )

    def fail(self, strategy: Strategy, error: Exception, device: torch.device) -> None:
        """Send that this process has failed, and why, in place of this step's message."""
        device = self.carrier(device)
        if _capturing(device) or not (device.type == "cpu" or self.steps <= 1 or strategy.calls.steps % EVERY == 0):
            return  # the others do not read this step's message
        room = FIELDS + ROWS * -(-strategy.tasks // TASKS) * TASKS
        with suppress(RuntimeError):  # if the others are gone, this process's own error is still raised
            message = torch.zeros(room, dtype=torch.float64, device=device)
            message[4] = 1
            self._sum(message)
            self._gather(one_line(error), device)

    def _explain(self, ours: str | None, device: torch.device) -> None:
        for rank, text in enumerate(self._gather(ours, device)):
            if text is not None:
                raise RuntimeError(f"group: process {rank} has ended this step: {text}")

    def _compare(
        self, strategy: Strategy, call: Call, model: tuple[Any, Any], first: bool, device: torch.device
    ) -> None:
        """Check that the processes hold the same model. In the first step, all take over the first strategy."""
        ours = {"model": agreement.describe_model(*model)}
        if first:
            ours["strategy"] = agreement.describe_strategy(strategy)
        everyone = self._gather(ours, self.carrier(device))
        agreement.check_models([other["model"] for other in everyone])
        if not first:
            return
        strategies = [other["strategy"] for other in everyone]
        agreement.check_strategies(strategies)
        source = dist.get_global_rank(self.group, 0) if self.group is not dist.group.WORLD else 0
        with torch.no_grad():
            for tensor in agreement.prepare_tensors(strategy, strategies[0]):
                value = tensor.detach().to(self.carrier(tensor.device), copy=True).contiguous()
                with _apart():
                    dist.broadcast(value, source, group=self.group)
                tensor.copy_(value)
        strategy.set_extra_state(pack(strategies[0]["extra"]))

    # -- collectives --------------------------------------------------------------------------------------------------

    def carrier(self, device: torch.device) -> torch.device:
        """The device for a message about a tensor on `device`. For example, NCCL can send only tensors on a GPU."""
        kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(self.group).split(",")]
        if device.type in kinds:
            return device
        return torch.device(kinds[0], torch.cuda.current_device()) if kinds[0] == "cuda" else torch.device(kinds[0])

    def _sum(self, tensor: Tensor) -> Tensor:
        with _apart():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _gather(self, ours: Any, device: torch.device) -> list[Any]:
        """Collect one object from every process. It must be picklable."""
        found: list[Any] = [None] * self.size
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), _apart():
            dist.all_gather_object(found, ours, group=self.group)
        return found

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """The sum of each tensor over all processes. There is one message for each dtype and device."""
        results: list[Tensor] = [t.detach().clone() for t in tensors]
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in results:
            kinds.setdefault((t.dtype, t.device), []).append(t)
        for (_, device), alike in kinds.items():
            flat = self._sum(torch.cat([t.reshape(-1) for t in alike]).to(self.carrier(device)))
            for t, piece in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
                t.copy_(piece.view(t.shape))
        return results

    def any_of(self, flags: Sequence[bool], device: torch.device) -> tuple[bool, ...]:
        """Which flags are raised in any process. All processes must give equally many."""
        # On a GPU, reading the result makes the host wait. So after the first steps, the last result is reused.
        device = self.carrier(device)
        if device.type == "cpu" or self.steps <= 1 or len(self.tied) != len(flags):
            self.tied = tuple(self._sum(_numbers(flags, device)).gt(0).tolist())
        return self.tied

    def everywhere(self, flag: Tensor) -> Tensor:
        """() whether the flag is raised in all processes. The host does not wait."""
        (lowered,) = self.total((~flag).float())
        return lowered == 0

    def heads(
        self, heads: Sequence[Sequence[Parameter]], own: Sequence[Sequence[Tensor | None]], shares: Tensor
    ) -> list[list[Tensor | None]]:
        """The heads' gradients of the losses averaged over all processes."""
        # Zeros for missing gradients: all processes must send tensors of the same sizes.
        dense = [
            (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g)
            * share.to(p.device, p.real.dtype)
            for parameters, gradients, share in zip(heads, own, shares, strict=True)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        summed = iter(self.total(*dense))
        return [[next(summed) for _ in parameters] for parameters in heads]


def replicas(group: Group | Literal["auto"] | None) -> Replicas | None:
    """The processes to average over: of `group`, or for "auto" all processes that torch.distributed has started.

    Returns:
        None if there is only this process.

    Raises:
        ValueError: `group` is not an open process group that contains this process.
    """
    if group is None or (group == "auto" and not hooks.several()):
        return None
    if group != "auto":
        try:
            dist.get_backend_config(group)
        except Exception as error:  # torch has several: not initialised, not a group, not a member, closed
            wrong = f"group: {group!r} is no open process group to which this process belongs"
            raise ValueError(f"{wrong}; use auto or None") from error
    found = Replicas(dist.group.WORLD if group == "auto" else group)
    return found if found.size > 1 else None


def _of_all() -> Replicas:
    return Replicas(dist.group.WORLD)


hooks.of_all = _of_all


@contextmanager
def heard(strategy: Any, losses: Any) -> Iterator[Replicas | None]:
    """Yield the processes of `strategy.group`. If this block raises an error, send it to the others.

    Otherwise they would wait for this step's message.

    Args:
        strategy: the method, or whatever the caller gave in its place.
        losses: the losses of the step, in any form.
    """
    found = replicas(strategy.group) if isinstance(strategy, Strategy) else None
    if found is None:
        yield None
        return
    if strategy.across is not None and strategy.across.group is found.group:
        found = strategy.across
    found.sent = False
    try:
        yield found
    except Exception as error:
        if not found.sent:
            found.fail(strategy, error, _device(losses))
        raise


@contextmanager
def _apart() -> Iterator[None]:
    """Turn the error of a failed collective into one that says what to check."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo: a connection was closed, or messages of unequal size; either: the timeout
        raise RuntimeError(
            "group: a process has left, or makes another call; all must call mtl.backward and the hooks equally often. "
            f"join() of uneven inputs does not help here ({one_line(error).partition(' Exception raised')[0]})"
        ) from error


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _mark(facts: dict[str, Any]) -> int:
    """A hash of 16 bits: so small that sums of squares over a thousand processes are exact in float64."""
    return zlib.crc32(repr(facts).encode()) & 0xFFFF


def _numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """float64 numbers on a device. Copying them to a GPU would make the host wait; filling tensors there does not."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.float64)
    return torch.stack([torch.full((), float(v), dtype=torch.float64, device=device) for v in values])


def _device(losses: Any) -> torch.device:
    """The device of the first tensor in nested lists and mappings."""
    if isinstance(losses, Tensor):
        return losses.device
    parts = losses.values() if isinstance(losses, Mapping) else losses if isinstance(losses, Sequence) else ()
    devices = (_device(part) for part in parts if isinstance(part, Tensor | Mapping | list | tuple))
    return next(devices, torch.device("cpu"))


def _sharded(p: Parameter) -> bool:
    return hasattr(p, "device_mesh") or getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter"
