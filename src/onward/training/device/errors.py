"""What an error says about the computing device: its memory ran out, or the GPU is lost to this process.

PyTorch has no class for most of these. A library that finds no memory (cuBLAS allocates its workspace at the first
product) raises a plain RuntimeError, whose text contains the name of a status.
"""

from __future__ import annotations

import contextlib
import errno
import re
import traceback
from collections.abc import Generator

import torch

from onward.errors import END_OTHERS, NO_THREAD, OnwardError, first_line

_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|bad allocation"
    rf"|{re.escape(NO_THREAD)}"
    r"|\w+_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory",
    re.IGNORECASE,
)
"""Texts of PyTorch's allocators, of CUDA and HIP, of their libraries, of the C++ runtime, of the system, and of Python
where the stack of a thread finds no room."""

_LOST = re.compile(
    r"^(CUDA|HIP)( driver)? error|^cuDNN( Frontend)? error|^CUDA unknown error|CU(BLAS|SOLVER|SPARSE)_STATUS_\w+"
    r"|CUDNN_STATUS_\w+|device-side assert|unspecified launch failure|outside graph capture",
    re.IGNORECASE,
)


LESS_MEMORY = f"{END_OTHERS}, or set activation_checkpointing: on or a lower micro_batch_tokens in the config."
"""What helps if memory is short in a step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU or in the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def tells_of_no_memory(text: str) -> bool:
    """Return whether the type and the message of an error, as text, say that memory ran out."""
    return _NO_MEMORY.search(text) is not None or re.match(r"(\w+\.)*\w*MemoryError\b", text) is not None


@contextlib.contextmanager
def caused_by_no_row(doing: str) -> Generator[None]:
    """Raise a lack of memory in the body as the machine's: what the body needs depends on no row.

    Raises:
        OnwardError: memory ran out.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        hint = f"What was committed is safe. {END_OTHERS}, then: onward train. onward doctor says what a step takes."
        raise OnwardError(f"memory ran out while {doing}: {first_line(error)}", hint=hint) from None


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error says that this process can no longer use the GPU; another process may."""
    if is_out_of_memory(error):
        return False
    lost = getattr(torch, "AcceleratorError", None)
    if lost is not None and isinstance(error, lost):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def is_of_the_device(error: BaseException) -> bool:
    """Return whether an error is the computing device's, whatever it was computing."""
    return is_out_of_memory(error) or is_device_lost(error)


def forget_frames(error: BaseException | None) -> None:
    """Free what the frames of an error hold, above all the model, and those of all errors that it came from."""
    left, seen = [error], set[int]()
    while left:
        each = left.pop()
        if each is None or id(each) in seen:  # an error can be the context of its own cause
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
        left += [each.__cause__, each.__context__]
