"""An error of one rank, passed on to all: as the same kind of error, naming the rank."""

from __future__ import annotations

from typing import Any

import torch

from onward import errors
from onward.errors import OnwardError, first_line
from onward.training.device.errors import is_device_lost, is_out_of_memory


class Released(BaseException):
    """Rank 0 has ended, and with it the work of the others. Not an `Exception`, so that nothing catches it."""


def to_message(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON values for the other ranks."""
    if isinstance(error, OnwardError):
        return {"kind": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    if is_out_of_memory(error):
        return {"kind": "memory", "what": first_line(error)}
    if is_device_lost(error):
        return {"kind": "DeviceLost", "what": f"the GPU was lost: {first_line(error)}", "where": None, "hint": None}
    return {"kind": "other", "what": f"{type(error).__name__}: {first_line(error)}"}


def from_message(rank: int, told: dict[str, Any]) -> Exception:
    """Return the error that another rank reported, as one of the same kind."""
    what = f"rank {rank}: {told['what']}"
    if told["kind"] == "memory":
        return torch.OutOfMemoryError(what)
    known = getattr(errors, told["kind"], None)
    if isinstance(known, type) and issubclass(known, OnwardError):
        try:
            return known(what, where=told["where"], hint=told["hint"])
        except TypeError:  # its constructor takes more arguments
            return OnwardError(what, where=told["where"], hint=told["hint"])
    return RuntimeError(what)
