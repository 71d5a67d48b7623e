"""Named random streams: every draw in a run is a function of (seed, name, epoch), never of earlier draws.

So a resumed run needs no saved generator state, and a new consumer of random numbers shifts no other one.

The global generators and flags of torch are one for the whole process. A run has them to itself in `seeded`, for an
epoch at most, and gives them back. So two runs in one process may take turns between those blocks, or work in two
threads: each draws what it draws alone. A thread waits while the other one is in such a block.
"""

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

# The process's own, like what it guards. Re-entrant: a trial pass inside an epoch asks for it again.
_process = threading.RLock()


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of a run. Streams with different names or seeds are independent.

    Example: `derive(42, "method", 3)` is the seed of the loss strategy in epoch 3 of a run with seed 42.
    """
    # Not Python's hash(): that one differs in every process.
    digest = hashlib.blake2b("/".join(map(str, (seed, *names))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: a seed must fit into a signed int64


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream `names`, so that the draws are the same on every device."""
    return torch.Generator().manual_seed(derive(seed, *names))


def alone() -> AbstractContextManager:
    """Have the process's generators and flags to oneself: the other threads that ask for them wait."""
    return _process


@contextmanager
def kept() -> Iterator[None]:
    """Give the global generators of torch (CPU and GPUs), NumPy and `random` back as they were before the block."""
    with alone():
        ours, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numbers)
            torch.set_rng_state(cpu)
            if gpus is not None:
                torch.cuda.set_rng_state_all(gpus)
            else:  # they had drawn nothing yet, and `torch.manual_seed` gives all devices the same seed
                torch.cuda.manual_seed_all(torch.initial_seed())
            if mps is not None:
                torch.mps.set_rng_state(mps)


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and `random` with the stream `names`, and give them back afterwards.

    A user's own code draws from these. So its draws are a function of the seed.
    """
    with kept():
        value = derive(seed, *names)
        torch.manual_seed(value)
        np.random.seed(value % 2**32)
        random.seed(value)
        yield
