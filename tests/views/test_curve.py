from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledgers import add_file, made_up_run

from onward.curve import COLUMNS, as_columns, buckets, read_curve
from onward.store.curve import Span
from onward.store.ledger import Ledger
from onward.store.metrics import Metrics
from onward.store.rows import StepRecord

FILES = [("a.jsonl", 7), ("b.jsonl", 1), ("c.jsonl", 92)]


def wavy(step: int) -> float:
    """A loss with one lowest and one highest step that no regular sample meets."""
    return {37: 0.001, 58: 99.0}.get(step, 2 + math.sin(step))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A ledger of 100 steps in three files, for reading."""
    layout = made_up_run(tmp_path_factory.mktemp("curve") / "run", FILES, wavy)
    return Ledger(layout.ledger, read_only=True)


def test_a_whole_curve_has_every_step_with_its_file(ledger: Ledger) -> None:
    """Unthinned, each record is one row of the named columns, in order, with its file and the step within it."""
    rows = list(read_curve(ledger))
    assert list(range(1, 101)) == [row[0] for row in rows]
    assert (8, "b.jsonl", 1, wavy(8), 1e-4, 0.5, 2, 20, 10, 0.25, 1008.0) == rows[7]
    assert set(COLUMNS) == as_columns(rows).keys()
    assert [name for name, count in FILES for _ in range(count)] == as_columns(rows)["file"]


@pytest.mark.parametrize("every", [2, 3, 10, 49, 1000])
def test_a_thinned_curve_keeps_lowest_and_highest_loss(ledger: Ledger, every: int) -> None:
    """Every 2 N steps leave their lowest and highest record, and the newest step is always there."""
    whole = {row[0]: row for row in read_curve(ledger)}
    thin = list(read_curve(ledger, every))
    assert thin == [whole[row[0]] for row in thin]
    expected: set[int] = {100}
    for start in range(1, 101, 2 * every):
        block = [step for step in whole if start <= step < start + 2 * every]
        expected |= {min(block, key=wavy), max(block, key=wavy)}
    assert sorted(expected) == [row[0] for row in thin]


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_below_one_step_is_refused(ledger: Ledger, every: int) -> None:
    """There is nothing that it could mean."""
    with pytest.raises(ValueError, match=f"at least 1, not {every}"):
        next(read_curve(ledger, every))


def test_a_range_of_steps_can_be_read_alone(ledger: Ledger) -> None:
    """`first` and `last` bound the global steps, across files."""
    assert [7, 8, 9] == [row[0] for row in read_curve(ledger, first=7, last=9)]
    assert [37, 58] == [row[0] for row in read_curve(ledger, 50, first=20, last=80)]


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(1, 50))
def test_buckets_cover_every_step_once(counts: list[int], size: int) -> None:
    """Whatever the files' lengths, buckets are aligned to global steps and hold each step exactly once."""
    spans: list[Span] = []
    for position, count in enumerate(counts, start=1):
        began = spans[-1].last if spans else 0
        spans.append(Span(position, f"{position}", position, began + 1, began + count))
    found = list(buckets(spans, size))
    steps = [[step for piece in bucket for step in range(piece.first, piece.last + 1)] for bucket in found]
    assert list(range(1, sum(counts) + 1)) == [step for bucket in steps for step in bucket]
    assert all(1 == len({(step - 1) // size for step in bucket}) for bucket in steps)
    assert len(steps) == -(-sum(counts) // size)


def test_a_run_without_steps_has_an_empty_curve(tmp_path: Path) -> None:
    """Files without step records, or outside the stream, are not in it."""
    layout = made_up_run(tmp_path / "run", [], wavy)
    with Ledger(layout.ledger) as ledger:
        add_file(ledger, "waits.jsonl", state="queued")
        assert [] == list(read_curve(ledger, 5))
        assert {name: [] for name in COLUMNS} == as_columns(read_curve(ledger))


def test_a_ledger_of_an_earlier_release_has_no_times(tmp_path: Path) -> None:
    """An observer reads a ledger that was not migrated yet; what it lacks is None."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 3)], wavy)
    with Ledger(layout.ledger) as ledger:
        ledger.write("DROP TABLE step_times")
        ledger.write("PRAGMA user_version = 6")
    with Ledger(layout.ledger, read_only=True) as reader:
        assert [None] * 3 == as_columns(read_curve(reader))["time"]


def test_going_back_forgets_the_times_of_steps_too(tmp_path: Path) -> None:
    """Steps that a rollback takes away leave no time behind, and one that is trained again has its new one."""
    layout = made_up_run(tmp_path / "run", [("a.jsonl", 5)], wavy)
    with Ledger(layout.ledger) as ledger:
        ledger.trim(2, [1], "undone")
        assert 2 == ledger.scalar("SELECT count(*) FROM step_times")
        metrics = Metrics(layout.ledger, clock=lambda: 5000.0)
        metrics.append(StepRecord(1, 2, 2, 0, 2, "digest", 20, 10, 1.0, 1e-4, 0.5, 0.25))
        metrics.close()
        assert [1001.0, 5000.0] == as_columns(read_curve(ledger))["time"]
