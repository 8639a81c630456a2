"""What errors say of the machine that computes: memory ran out, or the GPU is lost to this process."""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import small
import torch
from torch import nn

from onward.errors import OnwardError, first_line
from onward.training.admission.positions import most_positions
from onward.training.device.errors import (
    caused_by_no_row,
    forget_frames,
    is_device_lost,
    is_of_the_device,
    is_out_of_memory,
    tells_of_no_memory,
)
from onward.training.device.memory import Usage, gpu_is_crowded, read_total, read_usage
from onward.training.layers.decoder_parts import form_of, is_gated

GIB = 1 << 30
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("can't start new thread"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
]
LOST = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("HIP error: the operation cannot be performed in the present state"),
    *(kind("it failed") for kind in (getattr(torch, "AcceleratorError", None),) if kind is not None),
]
NEITHER = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    IndexError("index out of range in self"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("CUDA error"),
    ImportError("no such kernel"),
]


def test_a_lack_of_memory_is_known_by_its_words() -> None:
    """Where only the type and the message are left, as in what is kept of a recording that failed."""
    kinds = (NO_MEMORY, [*LOST, *NEITHER])
    told = [[tells_of_no_memory(f"{type(error).__name__}: {first_line(error)}") for error in kind] for kind in kinds]
    assert [[True] * len(NO_MEMORY), [False] * len(kinds[1])] == told


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_lack_of_memory_is_known_in_all_its_forms(error: BaseException) -> None:
    """Whichever library finds no memory, it is lack of memory and not a lost GPU."""
    assert (True, False, True) == (is_out_of_memory(error), is_device_lost(error), is_of_the_device(error))


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_gpu_is_known(error: BaseException) -> None:
    """After these a process can compute nothing more on its GPU; they are no lack of memory."""
    assert (False, True, True) == (is_out_of_memory(error), is_device_lost(error), is_of_the_device(error))


@pytest.mark.parametrize("error", NEITHER, ids=repr)
def test_other_errors_are_neither(error: BaseException) -> None:
    """What rows, code or a disk cause says nothing about the device."""
    assert (False, False, False) == (is_out_of_memory(error), is_device_lost(error), is_of_the_device(error))
    with pytest.raises(type(error)) as raised, caused_by_no_row("the model was loaded"):
        raise error
    assert error is raised.value


def test_a_tensor_that_no_machine_can_hold() -> None:
    """What PyTorch raises here for a tensor beyond all memory is lack of memory."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("error", NO_MEMORY[:3], ids=str)
def test_what_depends_on_no_row_is_blamed_on_none(error: Exception) -> None:
    """Memory that runs out while a model is loaded or written is the machine's lack, and an error of its own kind."""
    with pytest.raises(OnwardError) as raised, caused_by_no_row("the model was loaded"):
        raise error
    expected = f"memory ran out while the model was loaded: {first_line(error)}"
    assert (OnwardError, expected) == (type(raised.value), raised.value.what)
    assert not is_out_of_memory(raised.value)
    assert "onward train" in str(raised.value.hint)


class Held:
    """Something large in a frame."""


def fail(held: list[weakref.ref[Held]], *, before: BaseException | None, cause: BaseException | None) -> Exception:
    """Return an error of a frame that holds something, raised while another was handled, because of a third."""

    def raise_it() -> None:
        own = Held()
        held.append(weakref.ref(own))
        raise RuntimeError from cause

    try:
        try:
            if before is not None:
                raise before
        finally:
            raise_it()
    except RuntimeError as error:
        return error
    raise AssertionError


def test_a_failed_step_holds_no_memory() -> None:
    """What the frames of an error held is freed, and of whatever it came from: a cause, an error being handled, both,
    in a circle too, and though somebody keeps their tracebacks."""
    held: list[weakref.ref[Held]] = []
    one, two, three = (fail(held, before=None, cause=None) for _ in range(3))
    error = fail(held, before=one, cause=two)
    two.__context__, three.__context__ = three, error
    kept = [each.__traceback__ for each in (one, two, three, error)]
    assert [True] * 4 == [each() is not None for each in held]
    forget_frames(error)
    assert None not in kept
    assert [True] * 4 == [each() is None for each in held]
    assert [None] * 4 == [each.__traceback__ for each in (one, two, three, error)]
    forget_frames(None)


class Starved(nn.Module):
    """A model that finds no memory, as cuBLAS says it."""

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def starved_model() -> Any:
    """Return a small model without memory."""
    model = small.small_model("gpt2")
    model.transformer.h[0].attn = Starved()
    return model


TRIALS: dict[str, Callable[[], object]] = {
    "the longest row": lambda: most_positions(starved_model(), range(60), 40, torch.device("cpu"), torch.float32),
    "whether a norm is understood": lambda: form_of(with_weight(Starved()), 1e-6),
    "whether a gate is understood": lambda: is_gated(with_parts(Starved())),
}


def with_weight(module: nn.Module) -> nn.Module:
    """Return a module that may be a norm."""
    module.weight = nn.Parameter(torch.ones(8))
    return module


def with_parts(module: Any) -> nn.Module:
    """Return a module that may be a gate."""
    module.gate_proj = module.up_proj = module.down_proj = module.act_fn = nn.Identity()
    return cast(nn.Module, module)


@pytest.mark.parametrize("name", TRIALS)
def test_lack_of_memory_tells_nothing_of_a_model(name: str) -> None:
    """What is found out by trying, and decides whether or how a model is trained, is never a lack of memory."""
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        TRIALS[name]()


@pytest.mark.parametrize(
    ("free", "own", "expected"), [(60, 20, False), (45, 20, False), (20, 40, True), (0, 60, True), (10, 0, True)]
)
def test_who_holds_a_gpu(free: int, own: int, expected: bool) -> None:
    """A GPU of 80 GiB is crowded from the share on that other processes hold a quarter of it."""
    usage = Usage(80 * GIB, free * GIB, own * GIB)
    assert expected == usage.is_crowded
    assert expected == gpu_is_crowded(torch.device("cuda", 0), lambda _: usage)
    assert not gpu_is_crowded(torch.device("cpu"), lambda _: usage)
    assert not gpu_is_crowded(torch.device("cuda", 0), lambda _: None)
    assert ((free + own) * GIB, (80 - free - own) * GIB) == (usage.available, usage.others)
    assert 0 == Usage(80 * GIB, 70 * GIB, 20 * GIB).others  # read at two times


def test_main_memory() -> None:
    """A CPU's memory is that of the machine or of the container; this process holds some of it."""
    usage = read_usage(torch.device("cpu"))
    assert usage is not None
    assert 0 < usage.own < usage.total
    assert usage.own <= usage.available <= usage.total
    (anonymous,) = re.findall(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert abs(usage.own - (int(anonymous) << 10)) < 1 << 23  # it may be more by now; pages of libraries are no part
    apple = torch.device("mps")  # where PyTorch says how much memory there is, and not how much is free
    assert (None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) == (read_usage(apple), read_total(apple))
