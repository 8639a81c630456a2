"""What bit-exactness depends on besides the state: device, threads and library versions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import peft
import torch
import transformers

from onward.errors import ConfigError, ModelError
from onward.training.device.hardware import gpu_facts, multiplies_bfloat16, processor_model
from onward.training.device.shared import SharedSetting
from onward.training.seeds import one_computes
from onward.training.world import World

NUMERICS = 3
"""Incremented when a release computes the same step with other last bits (2: rows end to end, fused layers; 3: oneDNN,
the head by parts of the vocabulary, layers with one input together, fused norms). `numerics.py` says for which models
the number is higher."""

LATER_FACTS = frozenset(
    {
        "processor_model", "driver", "cuda", "capability", "bfloat16", "cublas", "cudnn", "tf32", "attention",
        "libraries", "settings",
    }
)  # fmt: skip
"""Facts that earlier releases did not record: a record that lacks one says nothing about it."""

SETTINGS = (
    "ONEDNN_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA", "DNNL_CPU_ISA_HINTS", "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_CBWR", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_STRIPES", "MKL_NUM_THREADS",
    "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "DISABLE_ADDMM_CUDA_LT",
)  # fmt: skip
"""Variables by which the libraries of products choose how they compute: those of CPUs, then those of GPUs."""

HALF = (torch.bfloat16, torch.float16)
"""Compute types under which a forward pass runs in autocast."""
CUBLAS, DEFAULT_CUBLAS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_NO_FORM = re.compile(r"([\w.:]+)(?: with [\w ]+)? does not have a deterministic implementation")


def pick_device(*, has_cuda: bool | None = None, has_mps: bool | None = None) -> torch.device:
    """Return the GPU if there is one, NVIDIA's or AMD's before Apple's, else the CPU.

    Args:
        has_cuda, has_mps: which there are; by default PyTorch is asked.
    """
    if torch.cuda.is_available() if has_cuda is None else has_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    is_apple = torch.backends.mps.is_available() if has_mps is None else has_mps
    return torch.device("mps" if is_apple else "cpu")


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the compute type of `dtype: auto|float32|bfloat16|float16` on a device.

    `auto` is bfloat16 if the GPU supports it in hardware. Older GPUs only emulate it; they train in float32 unless told
    to use float16, which they support but in which numbers overflow early.
    """
    if setting == "auto":
        fits = device.type == "cuda" and multiplies_bfloat16(torch.cuda.get_device_capability(device))
        return torch.bfloat16 if fits else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(setting, torch.float32)


def require_whole_teams(device: torch.device) -> None:
    """Refuse settings of OpenMP that give a computation fewer threads than PyTorch counts on.

    oneDNN then leaves out parts of a product without an error, and bits change with the load of the machine.

    Raises:
        ConfigError: there is such a setting.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return
    limit = _openmp("omp_get_thread_limit", threads)
    if limit < threads:
        where, given, hint = "OMP_THREAD_LIMIT", f"allows {limit}", f"Set OMP_NUM_THREADS={limit}."
    elif _openmp("omp_get_dynamic", 0):
        where, given, hint = "OMP_DYNAMIC", "may give fewer at any time", "Unset OMP_DYNAMIC."
    elif _openmp("omp_get_max_active_levels", 1) < 1:
        where, given, hint = "OMP_MAX_ACTIVE_LEVELS", "allows one", "Unset OMP_MAX_ACTIVE_LEVELS."
    else:
        return
    what = f"PyTorch counts on {threads} threads, and OpenMP {given}: products would be wrong, without an error"
    raise ConfigError(what, where=where, hint=hint)


def _openmp(question: str, default: int) -> int:
    """Return what the process's OpenMP answers; the default if it has none."""
    ask = getattr(ctypes.CDLL(None), question, None)
    return default if ask is None else int(ask())


@contextlib.contextmanager
def deterministic(device: torch.device, *, exact: bool = True) -> Generator[None]:
    """Let the body be computed with kernels that give the same bits every time; one thread of a CPU always does.

    Several threads of a CPU add up values that have one index in any order (`index_put_`), as in the backward pass of
    experts, unless this is set. The setting is strict: if it is only to warn, PyTorch uses other kernels for the
    backward pass of attention, which add in any order. Memory is not filled beforehand, which would cost time and
    change no bit of the result. The setting belongs to the process: it is put back when the last thread has left, and
    threads that use a GPU take turns.

    Args:
        exact: False leaves everything as it is (`deterministic: false`).

    Raises:
        ModelError: an operation in the body has no deterministic form, or cuBLAS was not set to be deterministic.
    """
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    if device.type not in ("cuda", "cpu") or is_alone or not exact:
        yield
        return
    with one_computes if device.type == "cuda" else contextlib.nullcontext(), _strictly():
        try:
            yield
        except RuntimeError as error:
            refusal = _refusal(str(error), device)
            if refusal is None:
                raise
            raise refusal from error


@contextlib.contextmanager
def without_tf32(device: torch.device, owners: Sequence[Any] | None = None) -> Generator[None]:
    """Let a GPU compute float32 products in the body as float32, though the user lets it round them to TF32.

    Settings are made in the way in which they can be read: PyTorch refuses the other way afterwards.

    Args:
        owners: PyTorch's settings; by default those of the process.
    """
    owners = owners or (torch.backends.cuda.matmul, torch.backends.cudnn)
    changed: list[tuple[Any, str, Any]] = []
    try:
        for owner in owners if device.type == "cuda" else ():
            for name, exact in (("allow_tf32", False), ("fp32_precision", "ieee")):
                with contextlib.suppress(RuntimeError, AttributeError):
                    before = getattr(owner, name)
                    if before != exact:
                        setattr(owner, name, exact)
                        changed.append((owner, name, before))
                    break
        yield
    finally:
        for owner, name, before in changed:
            setattr(owner, name, before)


def _be_strict(restore: contextlib.ExitStack) -> None:
    memory: Any = torch.utils.deterministic
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    restore.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warns)
    restore.callback(setattr, memory, "fill_uninitialized_memory", memory.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True, warn_only=False)
    memory.fill_uninitialized_memory = False


_strictly = SharedSetting(_be_strict)


def _refusal(message: str, device: torch.device) -> ModelError | None:
    """Return the refusal if PyTorch says that something is not deterministic."""
    if CUBLAS in message:
        return ModelError(
            f"cuBLAS was started without {CUBLAS}, so its results may not be reproducible",
            where=CUBLAS,
            hint=f"Start the process with {CUBLAS}={DEFAULT_CUBLAS} in its environment; the command onward does so "
            "itself.",
        )
    found = _NO_FORM.search(message)
    if found is None:
        return None
    return ModelError(
        f"the model uses {found.group(1)}, which has no deterministic form on this "
        f"{'CPU' if device.type == 'cpu' else 'GPU'}",
        where="deterministic",
        hint="Equal bits cannot be promised with it. To train nevertheless: deterministic: false in onward.yaml, or "
        "onward init --set deterministic=false for a new run; every handover then says so.",
    )


def release_freed_memory() -> None:
    """Return freed memory to the system."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a lost GPU has none to return
            torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def ranks_facts(world: World, exchange: str) -> dict[str, str]:
    """Return what keeps several processes from computing the same bits as one; empty if they do.

    Args:
        exchange: the config key `exchange`.
    """
    fast = {"exchange": exchange} if world.size > 1 and exchange != "exact" else {}
    return fast if world.is_uniform else {**fast, "ranks": "unequal"}


def describe_environment(
    device: torch.device,
    dtype: torch.dtype,
    numerics: int = NUMERICS,
    *,
    exact: bool = True,
    layers: Mapping[str, str] = MappingProxyType({}),
    ranks: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what two processes must have in common to compute the same bits.

    Args:
        ranks: what keeps several processes from computing the same bits as one.
        layers: the kernels used in layers (`layers/facts.py`), if not those of every release, and the libraries of
            others that compute parts of the model (`model/libraries.py`).
        exact: whether only deterministic operations are used; recorded if not.
    """
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else torch.backends.cpu.get_cpu_capability()
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
        "settings": settings_of(os.environ),
        **(gpu_facts(device) if is_gpu else {"processor_model": processor_model()}),
        **layers,
        **({} if exact else {"deterministic": False}),
        **ranks,
    }


def settings_of(variables: Mapping[str, str]) -> str:
    """Return in words which variables choose how products are computed; what the command line sets does not count."""
    asked = [(name, variables.get(name)) for name in SETTINGS if variables.get(name)]
    return ", ".join(f"{name}={value}" for name, value in asked if (name, value) != (CUBLAS, DEFAULT_CUBLAS)) or "none"


def same_environment(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two records describe environments that compute the same bits, as far as both say."""
    unsaid = LATER_FACTS & (one.keys() ^ other.keys())
    return all(one.get(key) == other.get(key) for key in (one.keys() | other.keys()) - unsaid)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in words what keeps two environments from being the same, with the other's value as that of here."""
    apart = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    said = [key for key in apart if key not in LATER_FACTS or (key in one and key in other)]
    return ", ".join(f"{key} {one.get(key, 'unknown')} (here {other.get(key, 'unknown')})" for key in said)


def promises_bits(environment: Mapping[str, Any]) -> bool:
    """Return whether equal bits are promised in an environment at all.

    They are not without determinism, on Apple's GPUs, with several unequal devices, or if devices add their gradients
    in any order.
    """
    if "ranks" in environment or "exchange" in environment:
        return False
    return environment.get("deterministic", True) is True and environment.get("device") != "mps"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass in the compute type."""
    return torch.autocast(device.type, dtype=torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype in HALF)
