"""Describes what computes: the processor, the GPU, its driver and libraries. Nothing here changes a setting."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "unknown"
DRIVER = Path("/proc/driver/nvidia/version")
PROCESSORS = Path("/proc/cpuinfo")
FIRST_BF16 = (8, 0)
"""Compute capability of NVIDIA's first GPUs that multiply bfloat16; `is_bf16_supported` counts emulation too."""


def processor_model(listing: Path = PROCESSORS) -> str:
    """Return the name of the CPU: two with the same instructions may still differ in the last bits."""
    with contextlib.suppress(OSError):
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return platform.processor() or UNKNOWN


def multiplies_bfloat16(capability: tuple[int, int], *, is_amd: bool = torch.version.hip is not None) -> bool:
    """Return whether a GPU of this compute capability supports bfloat16 in hardware, without emulating it."""
    return is_amd or capability >= FIRST_BF16


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Return driver, libraries and settings on which the bits of a CUDA device depend."""
    capability = torch.cuda.get_device_capability(device)
    return {
        "driver": driver_version(),
        "cuda": torch.version.cuda or torch.version.hip or UNKNOWN,
        "capability": ".".join(map(str, capability)),
        "bfloat16": multiplies_bfloat16(capability),
        "cublas": cublas_version(),
        "cudnn": torch.backends.cudnn.version() or UNKNOWN,
        "tf32": tf32(),
    }


def driver_version(file: Path = DRIVER) -> str:
    """Return the version of NVIDIA's driver, as its kernel module reports it."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text(errors="replace"))
        if found:
            return found.group()
    return UNKNOWN


def cublas_version(cuda: str | None = torch.version.cuda) -> str:
    """Return the version of the cuBLAS that this process has loaded."""
    if cuda is None:
        return UNKNOWN
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(f"libcublas.so.{cuda.partition('.')[0]}")
        parts = [ctypes.c_int() for _ in range(3)]
        answers = [library.cublasGetProperty(kind, ctypes.byref(part)) for kind, part in enumerate(parts)]
        if not any(answers):
            return ".".join(str(part.value) for part in parts)
    return UNKNOWN


def tf32(owners: Mapping[str, Any] | None = None) -> str:
    """Return where float32 products may be rounded to TF32 under PyTorch's current settings.

    Args:
        owners: PyTorch's settings by name; by default those of the process.
    """
    owners = owners or {"matmul": torch.backends.cuda.matmul, "cudnn": torch.backends.cudnn}
    found: list[str] = []
    for name, owner in owners.items():
        with contextlib.suppress(RuntimeError, AttributeError):  # PyTorch refuses to read settings made in another way
            found.append(f"{name} {'on' if owner.allow_tf32 else 'off'}")
            continue
        found.append(f"{name} {getattr(owner, 'fp32_precision', UNKNOWN)}")
    return ", ".join(found)
