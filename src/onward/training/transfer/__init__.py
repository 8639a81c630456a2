"""Copies a state to main memory: immediately on a CPU; from a GPU behind training, which does not wait for it."""

from __future__ import annotations

import torch

from onward.training.transfer.fetching import beside_training, fetch_later, in_main_memory
from onward.training.transfer.layout import Sizes
from onward.training.transfer.marks import Marks, equal_marks, mark
from onward.training.transfer.overlapped import Overlapped
from onward.training.transfer.ways import Copied, InPlace, Transfer, Wait, at_once

__all__ = [
    "Copied", "InPlace", "Marks", "Overlapped", "Sizes", "Transfer", "Wait", "at_once", "beside_training",
    "equal_marks", "fetch_later", "in_main_memory", "mark", "transfer_of",
]  # fmt: skip


def transfer_of(device: torch.device) -> Transfer:
    """Return how to copy from a device."""
    return Overlapped() if device.type == "cuda" else InPlace()
