"""The check of what a failed recording leaves behind, with recordings that leave something or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import CPU
from test_gpu_page import GPU, load

Compute = Callable[[], torch.Tensor]


def fail() -> None:
    """Fail."""
    raise KeyError("no")


class Recorder:
    """Records a computation by keeping it.

    Args:
        spoils: what a failure leaves behind.
    """

    def __init__(self, spoils: str = "") -> None:
        self._spoils, self._has_failed = spoils, False

    def __call__(self, compute: Compute) -> Compute:
        """Record."""
        was_before = not self._has_failed
        if compute is fail and self._spoils != "nothing fails":
            self._has_failed = True
            compute()

        def replay() -> torch.Tensor:
            if self._has_failed and was_before and self._spoils == "ends others":
                raise RuntimeError("another recording failed")
            return compute() + (self._has_failed and not was_before and self._spoils == "other bits")

        return replay


@pytest.mark.parametrize(
    ("spoils", "ends_others", "wanted"),
    [
        ("", False, []),
        ("", True, ["a recording made before: it is replayed"]),
        ("ends others", True, []),
        ("ends others", False, ["a recording made before: another recording failed"]),
        ("other bits", False, ["another recording: other bits"]),
        ("nothing fails", False, ["it did not fail"]),
    ],
)
def test_what_is_left_behind_is_told(
    spoils: str, ends_others: bool, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers, steps, and recordings made before and after it, as far as they are not what they should be."""
    monkeypatch.syspath_prepend(GPU)
    failures: Any = load("failures")
    with torch.random.fork_rng(devices=[]):
        assert wanted == failures.wrong_after(fail, CPU, Recorder(spoils), ends_others=ends_others)
