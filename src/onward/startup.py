"""The start of a process: imports without rounds of Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Generator


@contextlib.contextmanager
def large_imports() -> Generator[None]:
    """Keep the cyclic garbage collector out of the body, and what the body makes out of its later rounds.

    torch, transformers and PEFT make half a million objects that live as long as the process. To go over them again
    and again takes a fifth of the time of their import. Nothing is done where torch is imported already: by then
    there may be large garbage that waits for the collector.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
