"""What bit-exactness depends on besides the state: device, threads and the versions of what computes."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

import peft
import torch
import transformers

NUMERICS = 3
"""Raised when a release computes the same step with other last bits (2: rows end to end, fused layers; 3: oneDNN,
the head by parts of the vocabulary, layers with one input together, fused norms)."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's `mallopt`."""

_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Kernels that oneDNN keeps: enough for the shapes of a step. Its 1,024, of half a megabyte each, are never used again:
nearly every step has another number of tokens."""


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the compute type of `dtype: auto|float32|bfloat16` on a device."""
    if setting == "auto":
        fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fits else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def make_deterministic(device: torch.device) -> None:
    """Ask CUDA for kernels that give the same bits every time; the CPU's do so by themselves."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)


def tune_memory() -> None:
    """Let glibc reuse freed tensors instead of giving each back to the system, and bound what oneDNN keeps.

    Settings that the user made in the environment stay.
    """
    for name, capacity in _KERNELS.items():  # read at the first product that oneDNN computes
        os.environ.setdefault(name, capacity)
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc takes
    libc.mallopt(_TRIM_THRESHOLD, 512 << 20)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def describe_environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what must be equal for two processes to compute the same bits."""
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
        "numerics": NUMERICS,
    }


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass in the compute type."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
