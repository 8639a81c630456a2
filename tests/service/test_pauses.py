"""How long a process waits before it tries again."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest

from onward.service.owner.crashes import Crash, Deaths
from onward.service.owner.recovery import Recovery
from onward.service.pauses import LONGEST, pause_after
from onward.service.shown import FAILED


def test_a_process_waits_longer_after_each_death_from_the_third_on() -> None:
    """The first deaths in one place cost no time; then each wait is twice the one before, up to five minutes. A start
    that fails and is tried again does not wait again.
    """
    counts = (*range(6), 10, 11, 2000)
    waits = [Crash("training", None, Deaths(count=count)).waits for count in counts]
    assert [0, 0, 0, 2, 4, 8, 256, 300, 300] == waits
    owned = MagicMock(wishes=SimpleNamespace(pending=True))  # so that no time is spent
    recovery = Recovery(owned, Crash("training", None, Deaths(step=5, count=4)))
    recovery.after_death()
    recovery.after_death()
    assert [call(FAILED, "the process died 4 times after step 5; goes on in 4 s")] == owned.shown.set.mock_calls


@pytest.mark.parametrize("first", [0.05, 1.0, 2.0, 10.0])
def test_pauses_double_up_to_a_limit_whatever_fails_for_however_long(first: float) -> None:
    """A disk that is full for an hour, or a server that is gone for a month, fails more often than a float doubles."""
    pauses = [pause_after(failures, first) for failures in (*range(1, 2000), 10**6, 10**400)]
    assert [first, 2 * first, 4 * first] == pauses[:3]
    assert all(after == min(2 * before, LONGEST) for before, after in pairwise(pauses))
    assert 300.0 == pauses[-1] == LONGEST
