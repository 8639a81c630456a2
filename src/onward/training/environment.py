"""What bit-exactness depends on besides the state: device, threads and the versions of what computes."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Generator
from typing import Any

import peft
import torch
import transformers

NUMERICS = 3
"""Incremented when a release computes the same step with other last bits (2: rows end to end, fused layers; 3: oneDNN,
the head by parts of the vocabulary, layers with one input together, fused norms). `numerics.py` says for which models
it is a later number."""


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the compute type of `dtype: auto|float32|bfloat16` on a device."""
    if setting == "auto":
        fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fits else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


@contextlib.contextmanager
def deterministic(device: torch.device) -> Generator[None]:
    """Have CUDA compute the body with kernels that give the same bits every time; those of a CPU always do."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a GPU that was lost has none to give back
            torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def describe_environment(device: torch.device, dtype: torch.dtype, numerics: int = NUMERICS) -> dict[str, Any]:
    """Return what two processes must have in common to compute the same bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "processor": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "machine": platform.machine(),
        "numerics": numerics,
    }


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass in the compute type."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
