"""The plan of a cooldown: all rows of the stream that may be trained, evenly, whatever its length."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onward.data.plan.cooldown import CooldownPlan
from onward.data.plan.replay import Source

FILES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def plan(sizes: list[int], *, batch_size: int = 4, steps: int = 10, key: str = "seed") -> CooldownPlan:
    """A plan over files of these sizes, each but the smallest with one row held out."""
    files = [Source(f"{n:064x}", size, (size // 2,) if size > 1 else ()) for n, size in enumerate(sizes)]
    return CooldownPlan(tuple(files), batch_size, steps, key)


@given(sizes=FILES, batch_size=st.integers(1, 9), steps=st.integers(1, 30))
def test_rows_come_evenly_and_held_out_ones_never(sizes: list[int], batch_size: int, steps: int) -> None:
    """No row comes twice before every other came once; held-out rows do not come at all; steps are full."""
    made = plan(sizes, batch_size=batch_size, steps=steps)
    seen = Counter(row for step in range(steps) for row in made.rows_at(step))
    rows = {(source.sha256, row) for source in made.files for row in range(source.rows) if row not in source.held_out}
    assert set(seen) <= rows
    assert batch_size * steps == seen.total()
    least = min(seen.values()) if len(seen) == len(rows) else 0
    assert max(seen.values()) - least <= 1
    assert {row.sha256 for row in seen} == made.needed <= set(made.sources)


def test_the_order_is_a_function_of_the_key() -> None:
    """Equal keys give equal steps and one identity; another key another order."""
    one, same, other = (plan([9, 30], key=key) for key in ("a", "a", "b"))
    assert [one.rows_at(step) for step in range(10)] == [same.rows_at(step) for step in range(10)]
    assert one.rows_at(0) != other.rows_at(0)
    assert (one.sha256, True) == (same.sha256, one.sha256 != other.sha256)


def test_there_are_no_other_steps() -> None:
    """A step beyond the last is refused."""
    with pytest.raises(IndexError):
        plan([9]).rows_at(10)
