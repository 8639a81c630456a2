"""Seeds as pure functions of where the run stands, so that no random state has to be carried.

The folding of a run's seed with step and micro-step follows Levanter's use of folded JAX keys.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator

import torch


def fold(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Run the body with torch's generators at `seed`; the caller's random state is as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
