from __future__ import annotations

from pathlib import Path

import pytest
from ledgers import made_up_run

from onward.store.ledger import Ledger
from onward.views.page.buckets import AT_ONCE, KeptBuckets, size_for


def test_a_very_long_run_is_sketched_until_it_is_added_up(tmp_path: Path) -> None:
    """Each range is shown by its last step at first, and with its extremes once they are known; both say which."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 1)], float)
    steps = AT_ONCE + 1000
    with Ledger(layout.ledger) as ledger:
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < {steps})"
        ledger.write(
            f"INSERT INTO steps {numbers} SELECT 1, i, i, 0, 2, 'd', 20, 10, i, 1e-4, 0.5, 0.25, 0, NULL FROM n"
        )
        kept = KeptBuckets()
        sketch = kept.draw(ledger, 1000, None, None)
        kept.fill(ledger)
        whole = kept.draw(ledger, 1000, None, None)
    size = size_for(steps, 2000)
    assert (False, True, 32) == (sketch["exact"], whole["exact"], size)
    assert sketch["columns"]["step"] == whole["columns"]["step"] == [*range(size, steps, size), steps]
    assert [float(size), float(size)] == [sketch["columns"][name][0] for name in ("loss", "loss_min")]
    assert [(1 + size) / 2, 1.0, size] == [whole["columns"][name][0] for name in ("loss", "loss_min", "loss_max")]
    assert [80.0] * len(whole["columns"]["step"]) == whole["columns"]["tokens_per_second"]


@pytest.mark.parametrize(("steps", "points", "size"), [(0, 10, 1), (10, 10, 1), (11, 10, 2), (10**6, 2000, 512)])
def test_ranges_are_powers_of_two(steps: int, points: int, size: int) -> None:
    """Ranges only double as a run grows, so that their borders stay where they are."""
    assert size == size_for(steps, points)
