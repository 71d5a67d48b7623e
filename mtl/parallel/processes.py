"""One run over several processes (torchrun): how they find each other, train together, and end together.

What they divide among them, and why no method needs to know of it, is in `mtl.parallel.split_batch`. The first
process, the leader, does all that is written and shown; the others do the same training. `mtl.backward` and a run in a
single process never come here.
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

from mtl.config import torchrun
from mtl.errors import ConfigError, SetupError, Terminated, UserError, one_line
from mtl.parallel.signals import ENDING, ending
from mtl.parallel.split_batch import drawing, forward

TIMEOUT = timedelta(minutes=10)  # of one collective: a process that is alive but stuck ends the run after this
GRACE = 5.0  # seconds for the news of why a connection broke to arrive


class ProcessError(UserError):
    """Another process of this run has ended, and so must this one.

    Args:
        message: which, and why.
        exit_code: the one that it ended with.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class _Remote(Exception):
    """Carries another process's traceback into this one's log, as the cause of a ProcessError."""


class _Lost(Exception):
    """A collective broke off: some other process is gone, and may have said why."""


@contextmanager
def together() -> Iterator[Processes | None]:
    """The processes that torchrun started for this run; None for one alone.

    However one of them ends, the others learn of it: they end with its exit code, and the leader says why.
    """
    if torchrun.size() == 1:
        yield None
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    processes = Processes(rank, size, int(os.environ["LOCAL_RANK"]), dist.PrefixStore("mtl", store))
    if rank:
        logging.getLogger("mtl").setLevel(logging.ERROR)
    try:
        yield processes
        if dist.is_initialized():
            if not processes.broken:
                dist.destroy_process_group()
        elif processes.leads:  # there was nothing to do
            processes.announce(ProcessError("finished", 0))
    except BaseException as error:
        _deaf()
        processes.announce(error)
        if not dist.is_initialized():  # torchrun ends the others as soon as one has ended: the leader goes first
            processes.linger()
        raise
    finally:
        processes.leave()


@dataclass
class Processes:
    """The processes of one run, as one of them sees them.

    Args:
        rank: of this one; number 0 leads.
        size: how many there are.
        local_rank: of this one on its machine.
        store: where they leave word for each other, training or not.
        broken: training has ended before its time, and the connections with it.
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
        """This process's device, for `trainer.device=name`.

        Raises:
            ConfigError: one device cannot serve several processes.
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

    def check(self, backbone: nn.Module, inputs: Sequence[Tensor]) -> None:
        """Args:
            inputs: of a few samples, on the backbone's device.

        Raises:
            ConfigError: the backbone draws numbers that cannot be divided among processes.
        """
        if (name := drawing(backbone, inputs)) is not None:
            raise ConfigError(
                f"arch: {name} would draw other random numbers in each process (dropout in attention or in a recurrent "
                "layer, say); train it in a single one, without torchrun"
            )

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The leader does this, then the others at once: what it downloads, they find."""
        if not self.leads:
            self.meet("leader first")
        yield
        if self.leads:
            self.meet("leader first")

    def meet(self, where: str) -> None:
        """Wait here for all the others.

        Raises:
            ProcessError: one of them has ended before it came.
        """
        self.store.add(where, 1)
        while self.store.add(where, 0) < self.size:
            if (error := self._news()) is not None:
                raise error
            time.sleep(0.02)

    def connect(self, device: torch.device) -> None:
        """Open the connections between the devices; returns in all processes or in none."""
        self.meet("connect")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        group = dist.PrefixStore("group", self.store)
        dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=TIMEOUT)

    def hand_out(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """The leader's `state`, in all processes; the others give None."""
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

    def forward(self, backbone: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The features (N, …) of all samples, of which each process computes a part."""
        if self._signals:
            raise Terminated  # `guard` knows which signal it was
        return forward(backbone, inputs, self.rank, self.size, self.sum_)

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, after adding to it in place those of the other processes; the same bits in all of them."""
        with _losses():
            dist.all_reduce(tensor)
        return tensor

    def compare(self, figures: Mapping[str, Tensor], device: torch.device) -> None:
        """Raises:
        RuntimeError: the processes do not compute the same, and so they do not train one network.
        """
        ours = torch.cat([numbers.flatten() for numbers in figures.values()]).to(device, torch.float32)
        mean = self.sum_(ours / self.size)
        if not torch.allclose(mean, ours, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise RuntimeError("the processes arrive at different figures: something draws numbers without the seed")

    # -- the end ------------------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self, last_words: Callable[[str, str], None] | None = None) -> Iterator[None]:
        """The block in which the processes train; if one fails, all end with its reason.

        1. A signal is noted. It ends training before the next forward pass.
        2. An exception that leaves this block is replaced by the reason for which all processes end.
        3. A collective on a GPU waits for ever if another process has ended. A thread then calls
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
            # An ordinary exit waits for the connections, and so for each other. A follower has nothing left to do.
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
        while not left.wait(1.0):
            if (news := self._news()) is None or _code(news) == 0 or left.wait(2 * GRACE):
                continue
            interrupted = isinstance(news, KeyboardInterrupt | Terminated)
            if last_words is not None:
                last_words("interrupted" if interrupted else "failed", str(news) or "stopped by a signal")
            _exit(_code(news))

    def announce(self, error: BaseException) -> None:
        """Tell the others that, and why, this process ends; the first to say so is the one who is believed."""
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        news = {"rank": self.rank, "code": _code(error), "message": text, "traceback": trace}
        with suppress(dist.DistError):
            self.store.compare_set("end", "", json.dumps(news))

    def linger(self) -> None:
        """Leave after the leader only: when one process has failed, torchrun kills the rest."""
        deadline = time.monotonic() + 2 * GRACE
        with suppress(dist.DistError):
            while not self.leads and not self.store.check(["left"]) and time.monotonic() < deadline:
                time.sleep(0.05)

    def leave(self) -> None:
        """The last thing that a process does here."""
        if self.leads:
            with suppress(dist.DistError):
                self.store.set("left", "")

    def _news(self) -> BaseException | None:
        """Why another process has ended, as this process's own exception; None while all are at work."""
        try:
            if not self.store.check(["end"]):
                return None
            news = json.loads(self.store.get("end"))
        except dist.DistError:  # torchrun, which keeps the store, is gone
            return None
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
    """Ignore signals from now on: this process ends already."""
    for number in ENDING:
        try:
            signal.signal(number, signal.SIG_IGN)
        except (Terminated, KeyboardInterrupt):  # one that had just arrived
            signal.signal(number, signal.SIG_IGN)


def _code(error: BaseException) -> int:
    if isinstance(error, Terminated | KeyboardInterrupt):
        return error.code if isinstance(error, Terminated) else 130
    return error.exit_code if isinstance(error, UserError) else 1


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo: a connection was closed; nccl: aborted; either: the timeout has passed
        raise _Lost(one_line(error).partition(" Exception raised")[0]) from error
