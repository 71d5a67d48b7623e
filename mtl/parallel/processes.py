"""One run over several processes (torchrun): how they find each other, train together, and end together.

`mtl.parallel.split_batch` divides each batch among the processes, and explains why no method notices it. Process 0 is
the leader: only it writes files and prints. The others do the same training. `mtl.backward` and a run in a single
process do not use this module.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl.archs.model import Model, Outputs, takes
from mtl.archs.restore import as_before
from mtl.config import torchrun
from mtl.data.columns import Batch
from mtl.errors import ConfigError, SetupError, Terminated, UserError, one_line
from mtl.parallel.signals import ENDING, ending
from mtl.parallel.split_batch import drawing, forward, obstacle, predictions, reaches_past

TIMEOUT = timedelta(minutes=10)  # of one collective: after this, a process that is alive but stuck ends the run
GRACE = 5.0  # seconds to wait for the reason after a connection broke


class ProcessError(UserError):
    """Another process of this run has ended, so this one must end too.

    Args:
        message: which process ended, and why.
        exit_code: the exit code of that process.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class _Remote(Exception):
    """Holds the traceback of another process. As the cause of a ProcessError it gets into this process's log."""


class _Lost(Exception):
    """A collective failed: another process is gone. It may have announced the reason."""


@contextmanager
def together() -> Iterator[Processes | None]:
    """The processes that torchrun started for this run; None for a single process.

    If one process ends, for any reason, the others learn of it. They end with its exit code, and the leader prints the
    reason.
    """
    if torchrun.size() == 1:
        yield None
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun's own keys lie in the same store; the prefix keeps ours apart.
    processes = Processes(rank, size, int(os.environ["LOCAL_RANK"]), dist.PrefixStore("mtl", store))
    if rank:
        # Only the leader prints.
        logging.getLogger("mtl").setLevel(logging.ERROR)
    try:
        yield processes
        if dist.is_initialized():
            if not processes.broken:
                dist.destroy_process_group()
        elif processes.leads:  # nothing was trained, for example because the run is finished already
            processes.announce(ProcessError("finished", 0))
    except BaseException as error:
        _deaf()
        processes.announce(error)
        # torchrun kills all processes as soon as one has ended. The leader must end first, or its message is lost.
        if not dist.is_initialized():
            processes.linger()
        raise
    finally:
        processes.leave()


@dataclass
class Processes:
    """All processes of one run, from the view of this one.

    Args:
        rank: number of this process; 0 is the leader.
        size: number of processes.
        local_rank: number of this process among those on its machine.
        store: a key-value store through which the processes exchange messages, also outside the training.
        broken: whether training ended early, so that the connections cannot be used any more.
    """

    rank: int
    size: int
    local_rank: int
    store: dist.Store
    broken: bool = False
    _signals: list[int] = field(default_factory=list)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # -- before training ----------------------------------------------------------------------------------------------

    def device(self, name: str) -> str:
        """The device of this process, for `trainer.device=name`.

        Raises:
            ConfigError: `name` is a single device, which cannot serve several processes.
            SetupError: there are fewer GPUs than processes.
        """
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if name not in ("auto", "cuda"):
            raise ConfigError(f"trainer.device={name}: torchrun started {self.size} processes; use auto, cuda or cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            started = f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, this machine shows"
            raise SetupError(f"trainer.device={name}: {started} {count} CUDA devices; one is needed for each")
        return f"cuda:{self.local_rank}"

    def check_model(self, model: Model, batch: Batch, tasks: Sequence[str]) -> None:
        """Check that the model can be trained by several processes.

        Args:
            model: the model.
            batch: the inputs of a few samples, on the model's device.
            tasks: names of the tasks.

        Raises:
            ConfigError: it draws random numbers that cannot be divided among processes. Or a prediction cannot be put
                together from parts.
        """
        if takes(model, "run"):
            self.check(model.trunk, [batch[name] for name in model.inputs])
            return
        self.check(model, [batch])
        with as_before(model), torch.no_grad():
            found = model.eval()(batch).predictions
        for task, prediction in zip(tasks, found, strict=True):
            if (what := obstacle(prediction, len(next(iter(batch.values()))))) is not None:
                raise ConfigError(
                    f"arch: the prediction of task {task!r} holds {what}, which several processes cannot put together; "
                    "train it in a single one, without torchrun"
                )

    def check(self, backbone: nn.Module, inputs: Sequence[Any]) -> None:
        """Check that the divided part of a model can be trained by several processes.

        Args:
            backbone: the divided part: the backbone, or a whole model.
            inputs: its inputs for a few samples, on its device.

        Raises:
            ConfigError: it draws random numbers that cannot be divided among processes, or uses parameters that cannot
                be replaced.
        """
        if (name := drawing(backbone, inputs)) is not None:
            raise ConfigError(
                f"arch: {name} would draw other random numbers in each process (dropout in attention or in a recurrent "
                "layer, say); train it in a single one, without torchrun"
            )
        if reaches_past(backbone, inputs):
            raise ConfigError(
                f"arch: {type(backbone).__name__} uses a parameter that it keeps outside of its modules' attributes, "
                "such as in a list; several processes would not sum its gradient. Use self.NAME, or nn.ParameterList"
            )

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader runs this block first, then all others. So they find the data that the leader has downloaded."""
        if not self.leads:
            self.meet("leader first")
        yield
        if self.leads:
            self.meet("leader first")

    def meet(self, where: str) -> None:
        """Wait until all processes have called this with the same `where`.

        Raises:
            ProcessError: another process ended before it came here.
        """
        self.store.add(where, 1)
        while self.store.add(where, 0) < self.size:
            if (error := self._news()) is not None:
                raise error
            time.sleep(0.02)

    def connect(self, device: torch.device) -> None:
        """Open the connections between the devices. It returns in all processes or in none."""
        self.meet("connect")  # otherwise a process would wait 10 minutes for one that has failed
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        group = dist.PrefixStore("group", self.store)
        dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=TIMEOUT)

    def hand_out(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the leader's `state` in all processes; the others pass None."""
        # As bytes of torch.save: the others can read them with weights_only, so nothing is unpickled blindly.
        content = io.BytesIO()
        if self.leads:
            torch.save(dict(state), content)
        parts = [content.getvalue()]
        with _losses():
            dist.broadcast_object_list(parts, src=0)
        if self.leads:
            return dict(state)
        return torch.load(io.BytesIO(parts[0]), map_location="cpu", weights_only=True)

    # -- training -----------------------------------------------------------------------------------------------------

    def outputs(self, model: Model, batch: Batch, tasks: Sequence[str], **options: Any) -> Outputs:
        """The model's outputs for all samples. Each process computes a part of them.

        Args:
            model: divides its backbone among the processes if its `forward` takes `run`; otherwise it is divided as a
                whole, and has no features.
            batch: N samples.
            tasks: names of the tasks.
            options: arguments of a model that divides its backbone.
        """
        if takes(model, "run"):
            return model(batch, run=self.forward, **options)
        self._heed()
        owned = [model.shared_parameters(), *map(model.own_parameters, tasks)]
        return Outputs(predictions(model, batch, owned, self.rank, self.size, self.sum_))

    def forward(self, backbone: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The features (N, …) of all samples. Each process computes a part of them."""
        self._heed()
        return forward(backbone, inputs, self.rank, self.size, self.sum_)

    def _heed(self) -> None:
        """End training if a signal has arrived."""
        if self._signals:
            raise Terminated  # `guard` knows which signal it was

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add the tensors of the other processes to `tensor`, in place. The result has the same bits everywhere."""
        with _losses():
            dist.all_reduce(tensor)
        return tensor

    def compare(self, figures: Mapping[str, Tensor], device: torch.device) -> None:
        """Compare the metrics of all processes.

        Raises:
            RuntimeError: they differ, so the processes do not train the same network.
        """
        # All processes get the same mean. So if one of them differs from it, at least one process raises.
        ours = torch.cat([numbers.flatten() for numbers in figures.values()]).to(device, torch.float32)
        mean = self.sum_(ours / self.size)
        if not torch.allclose(mean, ours, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise RuntimeError("the processes get different metrics: something draws random numbers without the seed")

    # -- the end ------------------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self, last_words: Callable[[str, str], None] | None = None) -> Iterator[None]:
        """The block in which the processes train. If one fails, all end with its reason.

        1. A signal is noted. It ends training before the next forward pass.
        2. An exception that leaves this block is replaced by the reason for which all processes end.
        3. A collective on a GPU waits forever if another process has ended. A thread then calls
           `last_words(status, message)` and ends this process.
        """
        handlers = {s: signal.signal(s, lambda number, _: self._signals.append(number)) for s in ending()}
        left = threading.Event()
        threading.Thread(target=self._watch, args=(left, last_words), daemon=True).start()
        try:
            yield
        except BaseException as error:
            left.set()
            _deaf()
            self.broken = True
            reason = self._reason(error)
            # An ordinary exit waits for the connections, so the processes would wait for each other. A follower has
            # nothing left to do and exits at once. The leader still writes its files, and exits hard after that.
            if not self.leads:
                _exit(_code(reason))
            atexit.register(_exit, _code(reason))
            if reason is error:
                raise
            raise reason from (reason.__cause__ or error)
        left.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _reason(self, error: BaseException) -> BaseException:
        """Why all processes end: the reason that another process announced, else this process's own `error`.

        A broken connection is only a symptom. The process waits a moment for the announcement of its cause.
        """
        lost = isinstance(error, _Lost)
        deadline = time.monotonic() + (GRACE if lost else 0)
        while (news := self._news()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if news is not None:
            return news
        if lost:
            error = ProcessError(f"a process of this run was lost ({error})")
        elif self._signals:
            error = _ended_by(128 + self._signals[0])
        self.announce(error)
        return error

    def _watch(self, left: threading.Event, last_words: Callable[[str, str], None] | None) -> None:
        """Runs in a thread: end this process if another has ended and this one does not leave its block (`left`)."""
        # Every second: has another process ended? The grace gives this one time to leave by itself.
        while not left.wait(1.0):
            if (news := self._news()) is None or _code(news) == 0 or left.wait(2 * GRACE):
                continue
            interrupted = isinstance(news, KeyboardInterrupt | Terminated)
            if last_words is not None:
                last_words("interrupted" if interrupted else "failed", str(news) or "stopped by a signal")
            _exit(_code(news))

    def announce(self, error: BaseException) -> None:
        """Announce to the others that this process ends, and why. Only the first announcement of a run counts."""
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        news = {"rank": self.rank, "code": _code(error), "message": text, "traceback": trace}
        with suppress(dist.DistError):
            self.store.compare_set("end", "", json.dumps(news))  # sets it only if it is not set yet

    def linger(self) -> None:
        """Let a follower wait until the leader has left. When one process ends, torchrun kills the others."""
        deadline = time.monotonic() + 2 * GRACE
        with suppress(dist.DistError):
            while not self.leads and not self.store.check(["left"]) and time.monotonic() < deadline:
                time.sleep(0.05)

    def leave(self) -> None:
        """Note that the leader has left; the last call in `together`."""
        if self.leads:
            with suppress(dist.DistError):
                self.store.set("left", "")

    def _news(self) -> BaseException | None:
        """The exception with which this process must end because another one has; None while all are running."""
        try:
            if not self.store.check(["end"]):
                return None
            news = json.loads(self.store.get("end"))
        except dist.DistError:  # torchrun holds the store and is gone
            return None
        # Its own announcement is no news.
        if news["rank"] == self.rank:
            return None
        if news["code"] in [128 + number for number in ENDING]:
            return _ended_by(news["code"])
        error = ProcessError(f"process {news['rank']}: {news['message']}", news["code"])
        error.__cause__ = _Remote(news["traceback"])
        return error


def _ended_by(code: int) -> BaseException:
    """The exception for the exit code of a process that a signal ended."""
    return KeyboardInterrupt() if code == 128 + signal.SIGINT else Terminated(code)


def _deaf() -> None:
    """Ignore signals from now on, because this process is ending already."""
    for number in ENDING:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (Terminated, KeyboardInterrupt):  # a signal that had just arrived
            signal.signal(number, signal.SIG_IGN)


def _code(error: BaseException) -> int:
    if isinstance(error, Terminated | KeyboardInterrupt):
        return error.code if isinstance(error, Terminated) else 130
    return error.exit_code if isinstance(error, UserError) else 1


def _exit(code: int) -> None:
    """End this process now, without the handlers of atexit: they would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _losses() -> Iterator[None]:
    """Turn the RuntimeError of a failed collective into `_Lost`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo: a connection was closed; nccl: aborted; both: the timeout has passed
        raise _Lost(one_line(error).partition(" Exception raised")[0]) from error
