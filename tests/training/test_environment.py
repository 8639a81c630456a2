"""Deterministic kernels, for as long as they are needed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from onward.training.environment import deterministic


def flags() -> tuple[bool, bool]:
    """Return whether deterministic algorithms are on, and whether they only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize("own", [(False, False), (True, False), (True, True)])
def test_deterministic_kernels_end_with_the_body(own: tuple[bool, bool]) -> None:
    """On a GPU they are on within and put back as they were, after an error too; on a CPU nothing is set."""
    before = flags()
    try:
        torch.use_deterministic_algorithms(own[0], warn_only=own[1])
        with deterministic(torch.device("cpu")):
            assert own == flags()
        with contextlib.suppress(ValueError), deterministic(torch.device("cuda")):
            assert (True, True) == flags()
            raise ValueError
        assert own == flags()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
