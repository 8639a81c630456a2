from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.data.plan.order import FilePlan, RowReference, row_order, rows_digest
from onward.data.plan.permutation import Permutation

SHA = "ab" * 32
SECOND = [96, 74, 87, 19, 14, 97, 8, 43, 83, 2]


@given(size=st.integers(0, 3000), key=st.binary(max_size=20))
@settings(max_examples=40)
def test_permutation_is_a_bijection(size: int, key: bytes) -> None:
    """Every size has each of its elements exactly once."""
    order = Permutation(size, key)
    assert list(range(size)) == sorted(order[index] for index in range(size))


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 10**12])
def test_large_permutations_are_seekable(size: int) -> None:
    """Seeking in a huge range is immediate, stays inside the range and repeats no element."""
    order = Permutation(size, b"key")
    seen = [order[index] for index in (0, 1, 2, 12345, size // 2, size - 1)]
    assert len(set(seen)) == len(seen)
    assert all(0 <= value < size for value in seen)


@pytest.mark.parametrize(
    ("size", "values"),
    [
        (64, [16, 26, 52]), (65, [5, 19, 20]), (127, [5, 19, 72]), (128, [5, 19, 15]), (129, [73, 38, 126]),
        (1000, [798, 340, 551]),
    ],
)  # fmt: skip
def test_permutation_never_changes(size: int, values: list[int]) -> None:
    """The values never change, also where a table ends and a power of two begins: a run resumed by a later version
    sees the same order.
    """
    assert [1, 4, 3, 0, 2] == [Permutation(5, b"key")[index] for index in range(5)]
    assert values == [Permutation(size, b"key")[index] for index in (0, 1, size - 1)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_small_permutations_are_all_reached(size: int) -> None:
    """Over many keys each order of two, three or four rows comes up about equally often."""
    trials = 2400
    counts: dict[tuple[int, ...], int] = {}
    for key in range(trials):
        order = Permutation(size, str(key).encode())
        arrangement = tuple(order[index] for index in range(size))
        counts[arrangement] = counts.get(arrangement, 0) + 1
    expected = {2: 2, 3: 6, 4: 24}[size]
    assert expected == len(counts)
    assert min(counts.values()) > 0.6 * trials / expected


@pytest.mark.parametrize("size", [65, 100, 1000])
def test_places_are_equally_likely(size: int) -> None:
    """The first row of the file lands in each tenth of the order about equally often over the epochs."""
    trials = 2000
    tenths = [0] * 10
    for epoch in range(trials):
        tenths[row_order(1, SHA, epoch, size)[0] * 10 // size] += 1
    assert all(130 < count < 280 for count in tenths), tenths


def test_order_depends_on_seed_file_and_epoch() -> None:
    """Another seed, file or epoch gives another order; the same three give the same."""
    orders = [row_order(1, SHA, 0, 500), row_order(2, SHA, 0, 500), row_order(1, SHA[1:], 0, 500)]
    orders.append(row_order(1, SHA, 1, 500))
    listed = {tuple(order[index] for index in range(500)) for order in orders}
    assert 4 == len(listed)
    again = Permutation(500, f"onward row order 1:1:{SHA}:0".encode())
    assert [again[index] for index in range(500)] == [orders[0][index] for index in range(500)]


@pytest.mark.parametrize("size", [0, 5, 100])
def test_index_outside_is_refused(size: int) -> None:
    """There is no element before the first or after the last."""
    for index in (-1, size):
        with pytest.raises(IndexError):
            Permutation(size, b"")[index]


PLANS = st.builds(
    FilePlan,
    sha256=st.sampled_from([SHA, "00"]),
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 33),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 9),
    occurrence=st.integers(0, 3),
)


@given(PLANS)
@settings(max_examples=60)
def test_every_row_is_trained_epochs_times(plan: FilePlan) -> None:
    """Walking the plan visits every row once per epoch; every step has rows; only the last of an epoch is short."""
    rows, batch_size, epochs = plan.rows, plan.batch_size, plan.epochs
    assert (plan.sha256,) == plan.sources
    for epoch in range(epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.rows_at(step) for step in steps]
        assert {epoch} == {plan.epoch_of(step) for step in steps}
        assert [(plan.sha256, row) for row in range(rows)] == sorted(row for batch in batches for row in batch)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


@given(PLANS, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_seeking_equals_walking(plan: FilePlan, random: Random) -> None:
    """A step has the same rows whether or not the steps before it were asked for."""
    walked = [plan.rows_at(step) for step in range(plan.steps)]
    steps = random.sample(range(plan.steps), plan.steps)
    assert [walked[step] for step in steps] == [replace(plan).rows_at(step) for step in steps]


def test_the_order_of_a_first_training_never_changes() -> None:
    """Rows and their digests are those of every run made before, to the bit."""
    plan = FilePlan("00", 21, 8, 2, 5)
    assert plan == FilePlan("00", 21, 8, 2, 5, occurrence=0)
    assert [12, 20, 15, 17, 18, 0, 1, 3] == [row for _, row in plan.rows_at(0)]
    digests = ["074cdfbc7b7f6374", "8888a2147375ad37", "07856eb56ed0d625", "33d8617361a2a2f2"]
    assert digests == [rows_digest(plan.rows_at(step), plan.sources) for step in range(4)]
    orders = [row_order(1, SHA, epoch, 100) for epoch in (0, 1)]
    assert [65, 34, 61, 57, 2, 75, 90, 61, 59, 12] == [order[index] for order in orders for index in range(5)]


@given(rows=st.integers(65, 500), epochs=st.integers(1, 3), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_a_file_that_is_trained_again_has_another_order(rows: int, epochs: int, seed: int) -> None:
    """Each occurrence of a file, and each of its epochs, visits the rows in an order of its own."""
    orders = [
        tuple(order[index] for index in range(rows))
        for occurrence in range(4)
        for order in [row_order(seed, SHA, epoch, rows, occurrence) for epoch in range(epochs)]
    ]
    assert 4 * epochs == len(set(orders))
    assert all(list(range(rows)) == sorted(order) for order in orders)


def test_the_order_of_a_second_training_never_changes() -> None:
    """The values of a later occurrence never change either."""
    assert SECOND == [row_order(1, SHA, 0, 100, occurrence)[index] for occurrence in (1, 2) for index in range(5)]
    again = Permutation(100, f"onward row order 2:1:{SHA}:0:1".encode())
    assert SECOND[:5] == [again[index] for index in range(5)]


def test_steps_outside_the_plan_are_refused() -> None:
    """A step before the first or after the last is an error, not another epoch."""
    plan = FilePlan(SHA, 10, 4, 2, 0)
    for step in (-1, 6):
        with pytest.raises(IndexError):
            plan.rows_at(step)


def test_rows_digest_tells_orders_apart() -> None:
    """The digest is 16 hex digits, never changes, and depends on the order."""
    assert "7c68b4906e7ea780" == digest_of((SHA, 1), (SHA, 2), (SHA, 3))
    assert digest_of((SHA, 1), (SHA, 2), (SHA, 3)) != digest_of((SHA, 1), (SHA, 3), (SHA, 2))
    assert digest_of() != digest_of((SHA, 0))


def test_rows_digest_of_several_sources_tells_them_apart() -> None:
    """In a plan of several files the digest depends on the file of each row; in a plan of one it never does."""
    rows = [("aa", 1), ("bb", 2)]
    both = ("aa", "bb")
    assert "5839a4d829a8136f" == digest_of(*rows, sources=both)
    exchanged = [("bb", 1), ("aa", 2)]
    of_one = [("aa", 1), ("aa", 2)]
    digests = {digest_of(*each, sources=both) for each in (rows, rows[::-1], exchanged, of_one)}
    assert 4 == len(digests)
    assert digest_of(*of_one, sources=("aa",)) not in digests
    assert digest_of(*of_one, sources=("aa",)) == digest_of((SHA, 1), (SHA, 2))


def digest_of(*rows: tuple[str, int], sources: tuple[str, ...] = (SHA,)) -> str:
    """Return the digest of rows given as pairs."""
    return rows_digest([RowReference(*row) for row in rows], sources)
