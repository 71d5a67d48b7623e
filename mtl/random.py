"""Named random streams: every draw in a run is a function of (seed, name, epoch), never of earlier draws.

So a resumed run needs no saved generator state, and a new consumer of random numbers shifts no other one.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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


@contextmanager
def seeded(seed: int, *names: str | int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and `random` for a block, and restore their states afterwards.

    A user's own code draws from the global generators. In this block its draws are a function of the seed. Two runs
    that take turns in one process do not disturb each other.

    Args:
        seed, names: as in `derive`.
        device: a GPU whose generator is seeded and restored as well.
    """
    gpu = device is not None and device.type == "cuda"
    ours, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if gpu else []):
        value = derive(seed, *names)
        torch.manual_seed(value)
        np.random.seed(value % 2**32)  # NumPy takes 32 bits only
        random.seed(value)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numbers)
