"""Named random streams: every draw in a run is a function of (seed, name, epoch), never of what was drawn before."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of a run; streams of different names or seeds are independent."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *names))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A generator on the CPU for the stream `names`: the same draws whatever device trains."""
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and `random` with the stream `names`, and give them back afterwards.

    A user's own code draws from these. So its draws are a function of the seed, and two runs that take turns in one
    process do not see each other's.

    Args:
        device: a GPU whose generator is given back as well.
    """
    gpu = device is not None and device.type == "cuda"
    ours, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if gpu else []):
        value = derive(seed, *names)
        torch.manual_seed(value)
        np.random.seed(value % 2**32)
        random.seed(value)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numbers)
