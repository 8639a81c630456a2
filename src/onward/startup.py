"""What the command line does for its own process before the large libraries are loaded.

The library calls nothing here, so a host program that imports Onward keeps its own settings. It may apply the same
ones: `startup.set_environment()` first, then `Run(directory, loading=startup.large_imports)`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import platform
import signal
import sys
import threading
from collections.abc import Generator, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

from onward.errors import UsageError

_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""How many kernels oneDNN caches: enough for the shapes of a step. Its default of 1,024, at half a megabyte each, is
wasted, since nearly every step has another number of tokens. Read when oneDNN computes its first product."""

_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Makes cuBLAS give the same bits every time. Read when cuBLAS starts."""

_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""GPU memory in segments that grow: steps of ever different lengths then leave no unusable holes."""

_THREADS = {"GOMP_SPINCOUNT": "1000"}
"""Limits busy waiting: threads that wait for each other occupy cores that other work on this machine may need, and a
step then took up to 100 times as long. Read by libgomp when torch is loaded; the bits are the same."""

_TRACKERS = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}
"""Keeps trackers from sending usage data and from printing, and MLflow from trying for four minutes before it fails."""

SOON = 0.5
"""Seconds after which a dropped Ctrl-C is repeated; the finalizer has returned by then."""

ENDINGS = tuple(number for number in signal.Signals if number.name in ("SIGTERM", "SIGHUP", "SIGUSR1"))
"""Signals that silently end a process: from a service manager, a closed terminal, Slurm. Windows has only the first."""

_WITHOUT_DOCSTRINGS = 2
"""The level of Python's optimization (`-OO`) at which docstrings are left out."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's `mallopt`."""


def require_platform(platform: str = sys.platform) -> None:
    """End the process with one line if Onward cannot run here.

    Raises:
        SystemExit: this is Windows.
    """
    if platform in ("win32", "cygwin"):
        print(
            "onward: Windows is not supported; Onward runs in WSL 2 (wsl --install), Linux and macOS", file=sys.stderr
        )
        raise SystemExit(2)


class Ended(KeyboardInterrupt):
    """A signal asked the process to end. It is an interrupt, so that code cleans up as it does after Ctrl-C."""


@contextlib.contextmanager
def endings_interrupt() -> Generator[list[str]]:
    """Raise `Ended` where a signal would silently end the process; yield the names of those that came.

    A signal that is ignored, as under `nohup`, or already handled is left alone.
    """
    came: list[str] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        raise Ended

    plain = [number for number in ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        plain = []
    for number in plain:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number in plain:
            if signal.getsignal(number) is interrupt:
                signal.signal(number, signal.SIG_DFL)


def interrupted(came: list[str]) -> str:
    """Return what a command says that was interrupted: by the first of the signals in `came`, or by Ctrl-C."""
    return f"{f'ended by {came[0]}' if came else 'interrupted'}; what was committed is safe"


@contextlib.contextmanager
def kept_interrupts() -> Generator[None]:
    """Interrupt once more if Python only prints a Ctrl-C because it came while an object was being finalized."""
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again = threading.Timer(SOON, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch's libraries read when they are loaded or first used; the user's own values stay."""
    wanted = {**_KERNELS, **_CUBLAS}
    wanted |= {} if "OMP_WAIT_POLICY" in environment else _THREADS
    wanted |= {} if "PYTORCH_CUDA_ALLOC_CONF" in environment else _ALLOCATOR  # the variable's earlier name
    for name, value in wanted.items():
        environment.setdefault(name, value)


def keep_out_fetched_code() -> None:
    """Keep libraries from importing `kernels`, if it is installed: it fetches compiled code from a hub and runs it.

    bitsandbytes asks for it when it is imported on a CPU with AVX512-BF16, transformers before 5.15 when it makes a
    model such as Mamba. Both compute without it; bitsandbytes' warning about that is not shown.
    """
    cast(dict[str, Any], sys.modules).setdefault("kernels", None)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def set_tracker_environment(local: Path) -> None:
    """Set the variables that trackers read when they are imported; the user's own values stay.

    Args:
        local: the folder of trackers that were not told to keep their data elsewhere.
    """
    for name, value in {**_TRACKERS, "TRACKIO_DIR": str((local / "trackio").absolute())}.items():
        os.environ.setdefault(name, value)


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors, not return it to the system; the user's own settings stay."""
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc accepts
    libc.mallopt(_TRIM_THRESHOLD, 512 << 20)


@contextlib.contextmanager
def large_imports() -> Generator[None]:
    """Import the large libraries in the body, while freed memory is kept and the garbage collector stays out of the
    way.

    torch, transformers and PEFT make half a million objects that live as long as the process. Going through them again
    and again takes a fifth of the time of their import; afterwards they are excluded from later collections. If torch
    is imported already, the collector is left alone: there may be large garbage waiting for it.

    Raises:
        UsageError: they cannot be imported because Python was told to leave docstrings out.
    """
    keep_freed_memory()
    if "torch" in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except ValueError as error:
        if sys.flags.optimize < _WITHOUT_DOCSTRINGS:
            raise
        what, hint = "Python leaves docstrings out, and transformers cannot be imported without them", "-O (1) works."
        raise UsageError(what, where="-OO or PYTHONOPTIMIZE=2", hint=hint) from error
    finally:
        if was_enabled:
            gc.freeze()
            gc.enable()
            if counts_what_is_left():
                atexit.register(gc.unfreeze)


def counts_what_is_left() -> bool:
    """Whether an imported library prints at the process's end which of its objects were never freed.

    nanobind does, which binds the C++ of triton 3.9: what is excluded from collections would fill 30 lines.
    """
    return any(getattr(each, "__module__", None) == "nanobind" for each in type.__subclasses__(type))
