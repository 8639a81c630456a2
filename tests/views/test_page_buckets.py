from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from ledgers import made_up_run

from onward.status import read_history
from onward.store.ledger import Ledger
from onward.store.metrics import RANGE
from onward.store.migrations import MIGRATIONS
from onward.views.page.buckets import AT_ONCE, KeptBuckets, size_for
from onward.views.page.reading import RunReader


def take_steps(ledger: Ledger, first: int, last: int) -> None:
    """Record made-up steps of file 1, each with values of its own that add up without rounding."""
    numbers = f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"
    values = "1, i, i, 0, 2, 'd', 20 + i % 7, 10, i * 7919 % 1000, 1.0 / i, i % 13, 0.25, i % 2, NULL"
    ledger.write(f"INSERT INTO steps {numbers} SELECT {values} FROM n")


def commit(ledger: Ledger, step: int) -> None:
    """Record that a checkpoint of file 1 was committed at a step."""
    number = ledger.begin_checkpoint(step=step, file_id=1, boundary=0, state_digest="d", basis="b")
    ledger.commit_checkpoint(number, size=1, seconds=0.1)


def test_kept_ranges_say_what_the_steps_say(tmp_path: Path) -> None:
    """Over commits, a way back and a commit before the last step: the curve and the history are the same with what the
    commits kept and without it, and each step is in one range at most.
    """
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 1)], float)
    with Ledger(layout.ledger) as ledger:
        for newest, committed in ((300, 300), (RANGE, RANGE), (2 * RANGE + 9, 2 * RANGE - 1), (4000, 3900)):
            take_steps(ledger, 1 + ledger.scalar("SELECT max(step) FROM steps"), newest)
            commit(ledger, committed)
        ledger.trim(RANGE + 100, [1], "lost")
        assert [(1, RANGE)] == [(row["first"], row["last"]) for row in ledger.step_ranges().values()]
        take_steps(ledger, RANGE + 101, 5 * RANGE)
        commit(ledger, 4 * RANGE + 5)
        kept = [(row["first"], row["last"], row["steps"]) for row in ledger.step_ranges().values()]
        whole = [(1 + number * RANGE, (number + 1) * RANGE, RANGE) for number in range(4)]
        assert [*whole, (4 * RANGE + 1, 4 * RANGE + 5, 5)] == kept
        assert [(1, RANGE + 1)] == list(ledger.step_ranges([(1, RANGE + 1, 2 * RANGE)]))
        drawn, history = KeptBuckets(2).draw(ledger, 2, None, None), read_history(layout)
        ledger.write("DELETE FROM step_ranges")
        assert (drawn, history) == (KeptBuckets(2).draw(ledger, 2, None, None), read_history(layout))
    assert ([4 * RANGE, 5 * RANGE], 5 * RANGE) == (drawn["columns"]["step"], history[0]["steps"])


def test_a_ledger_of_an_earlier_release_is_read_and_brought_up(tmp_path: Path) -> None:
    """Where no ranges are kept an observer adds up the steps; the next owner keeps those of finished files."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 1)], float)
    with Ledger(layout.ledger) as ledger:
        take_steps(ledger, 2, RANGE + 1)
        ledger.write("DROP TABLE step_ranges")
    before = read_history(layout)
    with Ledger(layout.ledger, read_only=True) as reader:
        assert {} == reader.step_ranges()
    with contextlib.closing(sqlite3.connect(layout.ledger)) as old:
        old.executescript(next(script for script in MIGRATIONS if "step_ranges" in script))
    with Ledger(layout.ledger) as ledger:
        assert [(1, RANGE), (RANGE + 1, RANGE + 1)] == [
            (row["first"], row["last"]) for row in ledger.step_ranges().values()
        ]
    assert before == read_history(layout)


def test_an_adopted_run_is_drawn_from_its_own_first_step(tmp_path: Path) -> None:
    """It begins at the step that its checkpoint had: the steps before it are not recorded, and take no room."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 0)], float)
    with Ledger(layout.ledger) as ledger:
        take_steps(ledger, 100_001, 100_016)
        kept = KeptBuckets(16)
        kept.fill(ledger)
        drawn = kept.draw(ledger, 16, None, None)
        assert list(range(100_001, 100_017)) == drawn["columns"]["step"]
        assert [100_001, 100_016] * 2 == [drawn[end] for end in ("first", "last", "oldest", "newest")]
        assert list(range(100_009, 100_017)) == kept.draw(ledger, 16, 100_009, None)["columns"]["step"]
    assert 16 == len(RunReader(layout).metrics(None)["step"])


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
