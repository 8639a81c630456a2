"""Which rows are held out and which are replayed: pure functions that every process computes alike."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onward.config import Config
from onward.data.plan.cooldown import CooldownPlan
from onward.data.plan.holdout import Share, count_held_out, held_out_rows, rows_in_question
from onward.data.plan.order import FilePlan, RowReference, make_plan
from onward.data.plan.replay import ReplayPlan, Source, needed_by, replayed_of

OWN, FIRST, SECOND = "0" * 64, "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("rows", "share", "count"),
    [(199, "auto", 0), (200, "auto", 4), (1000, "auto", 20), (9999, "auto", 64), (10, 0.1, 1), (3, 0.1, 0),
     (1, 0.9, 0), (29, 0.29, 8), (500, 0.0, 0)],
)  # fmt: skip
def test_how_many_rows_are_held_out(rows: int, share: Share, count: int) -> None:
    """`auto` takes 2 % of files of 200 rows or more, 64 at most; a share is exact, and a row is always left."""
    assert count == count_held_out(rows, share)


@given(st.integers(2, 400), st.integers(0, 9), st.data())
def test_a_larger_share_holds_out_more_of_the_same(rows: int, seed: int, data: st.DataObject) -> None:
    """Held-out rows are distinct rows of the file, and those of a smaller count are among those of a larger one."""
    large = data.draw(st.integers(0, rows - 1))
    small = data.draw(st.integers(0, large))
    held = held_out_rows(seed, OWN, rows, large)
    assert sorted(set(held)) == list(held)
    assert set(held) <= set(range(rows))
    assert set(rows_in_question(seed, OWN, rows, small)) <= set(held)


@given(st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(1, 7), st.integers(1, 3))
def test_every_other_row_is_trained_epochs_times(rows: int, share: float, batch_size: int, epochs: int) -> None:
    """A held-out row is never trained, every other one exactly `epochs` times."""
    config = Config(holdout=share, batch_size=batch_size, epochs=epochs)
    plan = make_plan(OWN, rows, config)
    trained = Counter(row.row for step in range(plan.steps) for row in plan.rows_at(step))
    assert {row: epochs for row in range(rows) if row not in plan.held_out} == trained
    assert count_held_out(rows, share) == len(plan.held_out)


def test_without_a_holdout_the_order_is_that_of_earlier_releases() -> None:
    """Nothing held out, the plan is the one of the file alone, to the row."""
    assert FilePlan(OWN, 21, 8, 2, 5) == make_plan(OWN, 21, Config(batch_size=8, epochs=2, seed=5))


def replay_plan(share: float, *, weighted: bool = False, rows: int = 23, key: str = "key") -> ReplayPlan:
    """The plan of a file with two earlier ones, of which rows are held out."""
    own = FilePlan(OWN, rows, 4, 2, 0, held_out=(1,))
    sources = (Source(FIRST, 9, (0, 8), weight=7.0), Source(SECOND, 5, (), weight=0.0 if weighted else 5.0))
    return ReplayPlan(own, sources, share, weighted, key)


@given(st.sampled_from([0.05, 0.1, 0.29, 0.5, 1.0]), st.booleans())
def test_replayed_rows_come_on_top(share: float, weighted: bool) -> None:
    """A step's own rows stay as they are; up to each step there are `share` times as many replayed ones, rounded."""
    plan = replay_plan(share, weighted=weighted)
    own = again = 0
    for step in range(plan.steps):
        rows, replayed = plan.rows_at(step), replayed_of(plan, step)
        assert plan.own.rows_at(step) + replayed == rows
        own, again = own + len(plan.own.rows_at(step)), again + len(replayed)
        assert int(own * round(share * 100)) // 100 == again
        assert not {row.sha256 for row in replayed} & {OWN}
        assert not {RowReference(FIRST, 0), RowReference(FIRST, 8)} & set(replayed)


def test_uniform_replay_takes_every_row_before_any_twice() -> None:
    """Each turn goes through all rows of all earlier files that were trained, each once, in an order of its own."""
    plan = replay_plan(1.0)
    drawn = [row for step in range(plan.steps) for row in plan.replayed_at(step)]
    every = {*(RowReference(FIRST, row) for row in range(1, 8)), *(RowReference(SECOND, row) for row in range(5))}
    assert [12, 12, 12] == [len(set(drawn[turn : turn + 12]) & every) for turn in (0, 12, 24)]
    assert drawn[:12] != drawn[12:24]


def test_the_choice_depends_on_seed_and_stream() -> None:
    """Another key gives other rows; the same one the same, at any step and in any process."""
    one, other = replay_plan(0.5), replay_plan(0.5, key="other")
    chosen = [one.replayed_at(step) for step in range(one.steps)]
    assert chosen != [other.replayed_at(step) for step in range(other.steps)]
    assert chosen[7] == replay_plan(0.5).replayed_at(7)


@pytest.mark.parametrize(
    ("weighted", "chosen"), [(False, "c3 c1 b4 a6 c2 b1 b0 b3"), (True, "a5 a6 a3 a2 a7 a1 a2 c1")]
)
def test_what_is_replayed_and_held_out_never_changes(weighted: bool, chosen: str) -> None:
    """A run resumed or verified by a later version has the same rows in its steps and the same ones left out."""
    earlier = (Source("a", 9, (0, 8), 7.0), Source("b", 5, (), 0.0), Source("c", 5, (), 3.0))
    plan = ReplayPlan(FilePlan(OWN, 8, 4, 1, 0), earlier, 1.0, weighted, "key")
    drawn = [row for step in range(plan.steps) for row in plan.replayed_at(step)]
    assert chosen == " ".join(f"{row.sha256}{row.row}" for row in drawn)
    cooled = [row for step in range(2) for row in CooldownPlan(earlier, 4, 2, "key").rows_at(step)]
    assert "b2 c1 c4 b0 a5 a7 b4 a1" == " ".join(f"{row.sha256}{row.row}" for row in cooled)
    assert [333, 892, 303, 227, 786, 204, 34] == rows_in_question(5, "a", 1000, 7)


def test_weighted_replay_draws_files_by_weight() -> None:
    """A file without weight is never drawn, and then not needed either."""
    plan = replay_plan(1.0, weighted=True)
    assert {FIRST} == {row.sha256 for step in range(plan.steps) for row in plan.replayed_at(step)}
    assert {OWN, FIRST} == needed_by(plan)
    assert (OWN, FIRST, SECOND) == plan.sources
    assert {OWN} == needed_by(plan.own)
