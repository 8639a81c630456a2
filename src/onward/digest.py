"""Digests: SHA-256 to identify training files, xxh3-128 to notice damage fast."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

CHUNK = 1 << 23
"""Bytes read at once: they fit the CPU cache, and a thread that hashes rarely takes the GIL."""


def _read_chunks(path: Path) -> Iterable[memoryview]:
    """Yield a file's bytes in chunks, each in the same memory."""
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        memory = memoryview(bytearray(min(max(size, 1), CHUNK)))
        while size := stream.readinto(memory):
            yield memory[:size]


def sha256_file(path: Path, stop: Callable[[], None] = lambda: None) -> str:
    """Return the SHA-256 of a file's bytes, in hex; `stop` is called for every chunk, and may raise."""
    digest = hashlib.sha256()
    for chunk in _read_chunks(path):
        stop()
        digest.update(chunk)
    return digest.hexdigest()


def xxh3_file(path: Path, stop: Callable[[], None] = lambda: None) -> str:
    """Return the xxh3-128 of a file's bytes, in hex (about 10 GB/s; for damage, not for adversaries).

    Args:
        stop: called for every chunk; may raise.
    """
    digest = xxhash.xxh3_128()
    for chunk in _read_chunks(path):
        stop()
        digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON text; equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of `canonical_json(value)`, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def state_digest(measured: Mapping[str, Any]) -> str:
    """Return one digest of a measured state: weights, moments and Adam's counter together."""
    return sha256_json([measured.get("weights"), measured.get("moments"), measured.get("adam_step")])
