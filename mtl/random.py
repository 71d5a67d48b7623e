"""Named random streams: every draw in a run is a function of (seed, name, epoch), never of what was drawn before."""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of a run; streams of different names or seeds are independent."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *names))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A generator on the CPU for the stream `names`: the same draws whatever device trains."""
    return torch.Generator().manual_seed(derive(seed, *names))
