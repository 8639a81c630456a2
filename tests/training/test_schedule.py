"""Learning rates are pure functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onward.config import Config
from onward.errors import ConfigError
from onward.training.schedule import cooling, learning_rate, require_horizon


def rates(steps: range, **settings: Any) -> list[float]:
    """Return the learning rates of `steps` in one file."""
    config = Config.model_validate({"learning_rate": 1.0, "warmup_steps": 0, **settings})
    return [learning_rate(config, step, step) for step in steps]


def test_constant_warms_up_and_stays() -> None:
    """The first step of a warmup already learns, the last one reaches the peak, and nothing decays."""
    assert [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] == rates(range(1, 7), warmup_steps=4)
    assert [1.0, 1.0] == rates(range(1, 3))


def test_wsd_decays_only_on_a_release() -> None:
    """Inside the stream `wsd` is warmup and then constant."""
    assert rates(range(1, 50), warmup_steps=7) == rates(range(1, 50), warmup_steps=7, schedule="wsd")


def test_inverse_sqrt_falls_from_the_end_of_warmup() -> None:
    """`inverse_sqrt` is the peak at the end of warmup and falls with the root of the step."""
    assert [0.5, 1.0, math.sqrt(2 / 3), math.sqrt(2 / 4)] == rates(range(1, 5), warmup_steps=2, schedule="inverse_sqrt")


def test_horizon_schedules_end_at_the_floor() -> None:
    """`linear` and `cosine` fall from the end of warmup, and reach `min_learning_rate` at `total_steps`, not before."""
    settings: dict[str, Any] = {"total_steps": 6, "min_learning_rate": 0.5, "warmup_steps": 2}
    assert [0.5, 1.0, 0.875, 0.75, 0.625, 0.5] == rates(range(1, 7), schedule="linear", **settings)
    cosine = rates(range(1, 7), schedule="cosine", **settings)
    assert [0.5, 1.0, 0.75, 0.5] == [cosine[0], cosine[1], cosine[3], cosine[5]]
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert [0.875, 0.5] == rates(range(1, 5), schedule="linear", total_steps=4, min_learning_rate=0.5)[::3]


def test_steps_beyond_the_horizon_are_refused() -> None:
    """A used schedule is not stretched: a step beyond it is an error with the way out."""
    config = Config(schedule="cosine", total_steps=20, warmup_steps=2)
    require_horizon(config, 20)
    with pytest.raises(ConfigError, match="schedule: constant"):
        require_horizon(config, 21)
    with pytest.raises(ConfigError, match="ends at step 20"):
        learning_rate(config, 21, 1)


def test_rewarm_starts_again_in_every_file() -> None:
    """Under `boundary: rewarm` the warmup counts the steps of the file, not of the run."""
    config = Config(learning_rate=1.0, warmup_steps=4, boundary="rewarm")
    assert [0.25, 0.5, 0.75, 1.0, 1.0] == [learning_rate(config, 1000 + step, step) for step in range(1, 6)]


@given(
    step=st.integers(1, 10**9),
    warmup=st.integers(0, 10**6),
    schedule=st.sampled_from(["constant", "wsd", "inverse_sqrt"]),
)
def test_no_horizon_means_never_zero(step: int, warmup: int, schedule: Any) -> None:
    """A schedule without a horizon learns at every step, however late, and never above the peak."""
    config = Config(learning_rate=3e-4, warmup_steps=warmup, schedule=schedule)
    assert 0.0 < learning_rate(config, step, step) <= 3e-4


@given(steps=st.integers(1, 500))
def test_a_cooldown_falls_from_the_peak_to_almost_nothing(steps: int) -> None:
    """Every step of it learns, each less than the one before; one step after the last the rate would be zero."""
    rates = [cooling(1.0, step, steps) for step in range(1, steps + 2)]
    assert all(later < earlier for earlier, later in pairwise([1.0, *rates]))
    assert 0.0 == rates[-1]
