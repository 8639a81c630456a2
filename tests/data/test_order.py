import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.data.order import FilePlan, Permutation, row_order, rows_digest

SHA = "ab" * 32


@given(size=st.integers(0, 3000), key=st.binary(max_size=20))
@settings(max_examples=40, deadline=None)
def test_permutation_is_a_bijection(size: int, key: bytes) -> None:
    """Every size has each of its elements exactly once."""
    order = Permutation(size, key)
    assert list(range(size)) == sorted(order[index] for index in range(size))


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 10**12])
def test_large_permutations_are_seekable(size: int) -> None:
    """Seeking in a huge range is immediate and stays inside the range, without a repeated element."""
    order = Permutation(size, b"key")
    seen = [order[index] for index in (0, 1, 2, 12345, size // 2, size - 1)]
    assert len(set(seen)) == len(seen)
    assert all(0 <= value < size for value in seen)


def test_permutation_never_changes() -> None:
    """The values are fixed for ever: a run resumed by a later version sees the same order."""
    assert [1, 4, 3, 0, 2] == [Permutation(5, b"key")[index] for index in range(5)]
    assert [798, 340, 551] == [Permutation(1000, b"key")[index] for index in (0, 1, 999)]


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


def test_index_outside_is_refused() -> None:
    """There is no element before the first or after the last."""
    for index in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, b"")[index]


@given(rows=st.integers(1, 200), batch_size=st.integers(1, 33), epochs=st.integers(1, 4), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_every_row_is_trained_epochs_times(rows: int, batch_size: int, epochs: int, seed: int) -> None:
    """Walking the plan visits every row once per epoch; every step has rows; only the last of an epoch is short."""
    plan = FilePlan(SHA, rows, batch_size, epochs, seed)
    for epoch in range(epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        batches = [plan.rows_at(step) for step in steps]
        assert {epoch} == {plan.epoch_of(step) for step in steps}
        assert list(range(rows)) == sorted(row for batch in batches for row in batch)
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


def test_seeking_equals_walking() -> None:
    """A step has the same rows whether or not the steps before it were asked for."""
    walked = [FilePlan(SHA, 103, 8, 3, 7).rows_at(step) for step in range(39)]
    assert walked == [FilePlan(SHA, 103, 8, 3, 7).rows_at(step) for step in reversed(range(39))][::-1]
    assert 39 == FilePlan(SHA, 103, 8, 3, 7).steps
    assert 7 == len(walked[12])


def test_steps_outside_the_plan_are_refused() -> None:
    """A step before the first or after the last is an error, not another epoch."""
    plan = FilePlan(SHA, 10, 4, 2, 0)
    for step in (-1, 6):
        with pytest.raises(IndexError):
            plan.rows_at(step)


def test_rows_digest_tells_orders_apart() -> None:
    """The digest is 16 hex digits, fixed for ever, and depends on the order."""
    assert "7c68b4906e7ea780" == rows_digest([1, 2, 3])
    assert rows_digest([1, 2, 3]) != rows_digest([1, 3, 2])
    assert rows_digest([]) != rows_digest([0])
