"""`torch.cuda` as it is on a machine with one GPU, in front of the emulated device (`device.cpp`)."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import emulated_device as device  # compiled by the test
import only_cuda
import parts
import torch

GPU = torch.device("cuda", 0)
REACTIONS = {"default": 0, "warn": 1, "error": 2}


class Stream(torch.Stream):
    """A stream of the device."""

    def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Stream:
        """Make one; all have the same device."""
        torch.cuda.init()
        return super().__new__(cls, device=GPU, priority=priority)


class Event(torch.Event):
    """An event of the device."""

    def __new__(cls, **_: Any) -> Event:
        """Make one; none takes the time."""
        return super().__new__(cls, device=GPU)

    def record(self, stream: torch.Stream | None = None) -> None:
        """Mark what a stream has to do so far."""
        super().record(stream or current_stream())

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Let a stream wait for it."""
        super().wait(stream or current_stream())


class On:
    """A context in which a stream is the current one."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = current_stream()
        torch.accelerator.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_stream(self._before)


class OnDevice:
    """A context in which a device is the current one: there is only one."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class CUDAGraph:
    """A recording."""

    pools = replays = 0
    """How many pools of memory this process asked for, and how many recordings it replayed."""

    def __init__(self) -> None:
        self._graph = device.Graph()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Begin to record."""
        assert "thread_local" == capture_error_mode
        assert pool is not None
        self._graph.begin(pool[1])

    def capture_end(self) -> None:
        """End the recording."""
        self._graph.end()

    def replay(self) -> None:
        """Compute again what was recorded."""
        CUDAGraph.replays += 1
        self._graph.replay()

    def reset(self) -> None:
        """Forget what was recorded."""
        self._graph.reset()


def _begin() -> None:
    """Initialize CUDA."""
    device.begin_to_use()
    torch.cuda._initialized = True  # read by PyTorch where layers are recomputed


def _using(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that initializes CUDA first."""

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        _begin()
        return function(*args, **named)

    return call


def _is_available() -> bool:
    """Return that there is a device; whoever asks CUDA, not the driver's library, cannot be forked afterwards."""
    if os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") != "1":
        device.ask()
    return True


@_using
def current_stream(_: Any = None) -> torch.Stream:
    """Return the stream that computes."""
    return torch.accelerator.current_stream(GPU)


def _new_pool() -> tuple[int, int]:
    CUDAGraph.pools += 1
    return 0, CUDAGraph.pools


def _of_memory(place: int) -> Any:
    return lambda _=None: device.memory()[place]


@_using
def _free_and_total(_: Any = None) -> tuple[int, int]:
    used, _, total = device.memory()
    return total - used, total


def _segments(_: Any = None) -> list[dict[str, Any]]:
    """Return what is allocated: that of recordings by pool, and everything else in one segment."""
    kept = device.pools()
    plain = {"total_size": device.memory()[0] - sum(kept.values()), "segment_pool_id": (0, 0)}
    return [plain, *({"total_size": size, "segment_pool_id": (0, number)} for number, size in kept.items())]


def give_kernels(decoder_parts: ModuleType) -> None:
    """Let the kernels that are written in Triton be those of `parts`; PyTorch would use one for Triton itself."""
    triton = SimpleNamespace(__version__="emulated")
    found = SimpleNamespace(find_spec=lambda name: name)
    vars(decoder_parts)["importlib"] = SimpleNamespace(util=found, import_module=lambda _: triton)
    sys.modules["onward.training.layers.kernels"] = parts


def show(_: ModuleType) -> None:
    """Put the device behind `torch.cuda`, and its own kernels behind PyTorch's operations."""
    generator = device.default_generator()
    names: dict[str, Any] = {
        "CUDAGraph": CUDAGraph, "Event": Event, "Stream": Stream, "_DeviceGuard": OnDevice, "device": OnDevice,
        "stream": On, "current_stream": current_stream, "default_generators": (generator,),
        "_lazy_init": _begin, "init": _begin, "is_initialized": device.is_used,
        "is_available": _is_available, "device_count": lambda: 1, "current_device": _using(lambda: 0),
        "set_device": _using(lambda _: None), "synchronize": _using(lambda _=None: device.synchronize()),
        "is_bf16_supported": _using(lambda *_, **__: True), "get_device_capability": _using(lambda _=None: (9, 0)),
        "get_device_name": _using(lambda _=None: "emulated"),
        "get_device_properties": _using(lambda _=None: SimpleNamespace(
            name="emulated", total_memory=device.memory()[2], multi_processor_count=8, major=9, minor=0
        )),
        "mem_get_info": _free_and_total, "memory_allocated": _of_memory(0), "memory_reserved": _of_memory(0),
        "max_memory_allocated": _of_memory(1), "max_memory_reserved": _of_memory(1), "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _=None: device.reset_peak(), "graph_pool_handle": _new_pool,
        "memory_snapshot": _segments, "_cuda_endAllocateToPool": lambda _, pool: device.end_pool(pool[1]),
        "_cuda_releasePool": lambda _, pool: device.release_pool(pool[1]),
        "set_per_process_memory_fraction": lambda share, _=None: device.set_share(share),
        "is_current_stream_capturing": device.is_recording, "get_sync_debug_mode": device.reaction,
        "set_sync_debug_mode": lambda mode: device.set_reaction(REACTIONS.get(mode, mode)),
        "manual_seed": generator.manual_seed, "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda _=None: generator.get_state(),
        "set_rng_state": lambda state, _=None: generator.set_state(state),
    }  # fmt: skip
    for module in [torch.cuda, *(sys.modules[f"torch.cuda.{each}"] for each in ("random", "memory", "streams"))]:
        for name, value in names.items():
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch.version.cuda = "13.0"
    only_cuda.register()
