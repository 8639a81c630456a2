"""Seeds as pure functions of the run's position, so that no random state has to be saved.

Folding step and micro-step into the run's seed follows Levanter's use of JAX's `fold_in`.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Generator

import torch

one_computes = threading.RLock()
"""Held while something computes with what belongs to the whole process, such as torch's random generators: threads that
train two runs take turns."""
_training: list[int] = []
"""The threads that take steps of a file, as often as they do."""


@contextlib.contextmanager
def taking_steps() -> Generator[None]:
    """Count this thread among those that train, in the body; it begins once no other computes what is watched."""
    own = threading.get_ident()
    with one_computes:
        _training.append(own)
    try:
        yield
    finally:
        _training.remove(own)


def others_train() -> bool:
    """Return whether another thread of this process takes steps of a file."""
    return any(thread != threading.get_ident() for thread in tuple(_training))


def fold(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Run the body with torch's generators seeded, in one thread at a time; then restore the caller's random state."""
    devices = [device] if device.type == "cuda" else []
    with one_computes, torch.random.fork_rng(devices=devices):
        _seed(seed, device)
        yield


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that a computation on this device reads.

    `torch.manual_seed` would seed every device of the machine and, for each kind not used yet, format the stack, which
    takes milliseconds per step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
