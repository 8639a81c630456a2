"""What a guard holds a file against, as pure functions."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onward.hooks.limits import (
    RUNNING,
    WARM_UP,
    WINDOW,
    Judged,
    Limits,
    grown,
    moved_away,
    robust_z,
    spiked,
    unanswered,
)

SPIKE = Limits(spike=4.0)


def steps(*losses: float, grad_norm: float = 1.0) -> list[Judged]:
    """Steps with these losses."""
    return [Judged(number, loss, grad_norm) for number, loss in enumerate(losses, start=1)]


def falling(count: int, start: float = 6.0, seed: int = 0) -> list[float]:
    """Losses of a file that is learnt: they fall, with noise."""
    source = random.Random(seed)
    return [start * 0.97**number + source.gauss(0, 0.1) for number in range(count)]


def test_losses_on_earlier_files_are_judged_one_by_one() -> None:
    """Every earlier file beyond the limit is named, the worst first; others, and those not measured, are not."""
    before, after = {1: 2.0, 2: 0.5, 3: 1.0, 4: 1.0, 5: 0.0, 6: 1.0}, {1: 2.1, 2: 0.6, 3: 1.5, 5: 0.0, 6: 0.5}
    for base in (None, {}, {1: 1.0, 2: 0.25, 3: 2.0}):  # one that was better than the run says nothing
        found = list(grown(before, after, Limits(forgetting=0.1), base))
        assert [3, 2] == [finding.position for finding in found]
        assert "loss on file 3 grew by 50%, from 1.0000 to 1.5000 (limit 10%)" == found[0].text
    for lost in (math.nan, math.inf):
        found = list(grown(before, after | {6: lost}, Limits(forgetting=0.1)))
        assert [6, 3, 2] == [finding.position for finding in found]
        assert "loss on file 6 is no longer finite, after 1.0000" == found[0].text
        assert 1 == len(list(moved_away(0.1, lost, Limits(anchor=0.2))))


def test_growth_is_held_against_what_was_gained_where_that_is_more() -> None:
    """A file far below its base swings by more than its low loss says; one that gained little is judged as ever."""
    limits, before = Limits(forgetting=0.1), {1: 2.5, 2: 2.5, 3: 2.5}
    assert [] == list(grown(before, {1: 3.1}, limits, {1: 9.1}))
    assert [2] == [found.position for found in grown(before, {2: 3.1}, limits, {2: 3.0})]
    found = list(grown(before, {3: 4.15}, limits, {3: 9.1}))
    assert ["loss on file 3 grew by 25% of what it had gained over the base, from 2.5000 to 4.1500 (limit 10%)"] == [
        each.text for each in found
    ]


def test_what_grew_from_nothing_grew_by_no_share() -> None:
    """A file that was known by heart, to the last bit, is judged by what it had gained over the base, or not at all."""
    limits = Limits(forgetting=0.1)
    assert [] == list(grown({1: 0.0}, {1: 0.5}, limits))
    texts = [found.text for found in grown({1: 0.0}, {1: 0.5}, limits, {1: 2.0})]
    assert [
        "loss on file 1 grew by 25% of what it had gained over the base, from 0.0000 to 0.5000 (limit 10%)"
    ] == texts


def test_the_distance_from_the_base_is_judged_by_its_growth() -> None:
    """A run that moved far over many files is not refused for it; one file that moves it far is."""
    limits = Limits(anchor=0.2)
    assert [] == list(moved_away(1.0, 1.1, limits))
    for before, growth in ((0.1, "0.300"), (None, "0.400")):
        text = f"KL from the base grew by {growth} nats per token, to 0.400 (limit 0.2)"
        assert [text] == [finding.text for finding in moved_away(before, 0.4, limits)]
    assert [] == list(moved_away(0.1, None, limits))


def test_growth_over_several_files_is_held_against_as_many_limits() -> None:
    """What was last measured some files ago may have grown in each of them: none of them need have passed the limit."""
    limits = Limits(forgetting=0.25, anchor=0.25)
    assert [] == [*grown({1: 2.0}, {1: 3.5}, limits, files={1: 3}), *moved_away(0.5, 1.25, limits, 3)]
    texts = [
        found.text for found in (*grown({1: 2.0}, {1: 4.0}, limits, files={1: 3}), *moved_away(0.5, 1.5, limits, 3))
    ]
    assert [
        "loss on file 1 grew by 100% over 3 files, from 2.0000 to 4.0000 (limit 25% for each)",
        "KL from the base grew by 1.000 nats per token over 3 files, to 1.500 (limit 0.25 for each)",
    ] == texts


def test_a_limit_is_the_most_that_is_allowed() -> None:
    """What reaches a limit just so is within it; a loss that was measured as nothing is not judged."""
    limits = Limits(forgetting=0.5, anchor=0.5, answers=2.0)
    assert [] == [*grown({1: 2.0, 2: 1.0}, {1: 3.0, 2: 0.0}, limits), *moved_away(0.5, 1.0, limits)]
    assert [] == list(unanswered({"same": False, "z": 2.0, "known": True, "rows": 16}, limits))


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("known", [None, False, True])
@pytest.mark.parametrize("z", [None, -1.0, 1.94, 2.5])
def test_answers_that_do_not_belong_are_found_where_the_model_could_tell(
    same: bool, known: bool | None, z: float | None
) -> None:
    """Rows that say one thing are always found; others only if earlier files show that the model can tell."""
    if z is None and known:
        return  # what cannot be judged needs no earlier file
    judged = {"same": same, "z": z, "known": known, "rows": 16, "worst": []}
    found = [finding.text for finding in unanswered(judged, Limits(answers=2.0))]
    texts = ["its rows all say the same (16 were checked)"] if same else []
    if known and not same and z is not None and z < 2:
        texts = [
            f"its answers fit the questions of other rows as well as their own (16 rows: {z:.1f} standard errors "
            "better, limit 2); the model can tell those of earlier files apart"
        ]
    assert texts == found
    for nothing in (Limits(), Limits(forgetting=2.0)):
        assert [] == list(unanswered(judged, nothing))


def test_what_was_not_judged_has_no_finding() -> None:
    """Files of earlier releases were not, and those that were begun without the limit."""
    assert [] == [*unanswered(None, Limits(answers=2.0)), *unanswered({}, Limits(answers=2.0))]


def test_limits_that_are_off_find_nothing() -> None:
    """None is off."""
    assert [] == [*grown({1: 1.0}, {1: 9.0}, Limits()), *moved_away(0.0, 9.0, Limits())]
    assert spiked(steps(*[1.0] * 60, *[99.0] * RUNNING), Limits()) is None


@given(count=st.integers(1, 200), start=st.floats(0.5, 12.0), seed=st.integers(0, 99))
def test_a_file_that_is_learnt_does_not_spike(count: int, start: float, seed: int) -> None:
    """Falling losses with noise stay in range at every step, whatever loss a new domain begins with."""
    losses = falling(count, start, seed)
    assert not [end for end in range(1, count + 1) if spiked(steps(*losses[:end]), SPIKE)]


@given(count=st.integers(WARM_UP, 120), seed=st.integers(0, 99))
def test_losses_that_jump_and_stay_are_a_spike(count: int, seed: int) -> None:
    """A loss that jumps and stays there is found at its third step; the step at which it began is named."""
    losses = [*falling(count, 3.0, seed), *[9.0] * RUNNING]
    assert spiked(steps(*losses[:-1]), SPIKE) is None
    found = spiked(steps(*losses), SPIKE)
    assert found is not None
    assert f"loss left its usual range at step {count + 1}: 9.0000" in found.text


def test_one_odd_batch_is_no_spike() -> None:
    """A single step outside of the range may be a hard batch."""
    losses = falling(60)
    losses[40] = 30.0
    assert not [end for end in range(1, 61) if spiked(steps(*losses[:end]), SPIKE)]


def test_gradient_norms_are_judged_too() -> None:
    """The loss may look as ever while gradients explode."""
    quiet, loud = steps(*falling(40)), [Judged(number, 2.0, 50.0) for number in range(41, 41 + RUNNING)]
    found = spiked([*quiet, *loud], SPIKE)
    assert found is not None
    assert found.text.startswith("gradient norm left its usual range at step 41")


def test_only_the_newest_steps_are_looked_at() -> None:
    """More steps than the window and those being judged change nothing: a resumed process needs no more."""
    losses = [*falling(200), *[9.0] * RUNNING]
    assert spiked(steps(*losses)[-WINDOW - RUNNING :], SPIKE) == spiked(steps(*losses), SPIKE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_beyond_every_range(value: float) -> None:
    """NaN and infinity are never usual."""
    assert math.inf == robust_z(value, [1.0, 2.0])


def test_deviations_are_those_of_the_median() -> None:
    """They have a least size, relative to the median, so that what hardly moves has no tight range."""
    assert pytest.approx([2 / 1.4826, 1.0, 1.0, -1.0]) == [
        robust_z(4.0, [1.0, 2.0, 3.0]), robust_z(2.1, [2.0] * 5), robust_z(1e-12, [0.0]), robust_z(-2.1, [-2.0])
    ]  # fmt: skip
    within, beyond = ([*[0.0] * WARM_UP, *[z * 1e-12] * RUNNING] for z in (4.0, 4.5))
    assert (None, True) == (spiked(steps(*within), SPIKE), spiked(steps(*beyond), SPIKE) is not None)
    assert spiked(steps(*beyond)[1:], SPIKE) is None  # too few steps for a usual range
