"""The round sizes that parts of a step are filled up to on a GPU."""

from __future__ import annotations

from onward.training.steps.sizes import LEAST, STEPS, WORK, Sizes, sizes_of


def test_sizes_are_few_and_near() -> None:
    """At most an eighth more tokens than there are, and of every power of two only a few sizes.

    Sizes decide last bits, and so does up to which work a part is filled up.
    """
    found = [sizes_of([length], length - 1, 1000) for length in range(2, 5000)]
    assert all(each is not None for each in found)
    for length, each in enumerate(found, 2):
        assert each is not None
        assert length <= each.tokens <= max(LEAST, length + length // STEPS + LEAST)
        assert length - 1 <= each.targets < each.tokens
        assert each.targets in {each.tokens - 1, *(place * each.tokens // STEPS for place in range(STEPS))}
        assert max(length, each.tokens - length) <= each.longest
    assert len({each.tokens for each in found if each is not None}) < 40
    assert sizes_of([2048] * 8, 8 * 2047, 600_000_000) == Sizes(16384, 16383, 16, 2048)
    assert sizes_of([2048] * 7, 7 * 2047, 600_000_000) == Sizes(14336, 14335, 8, 2048)
    assert 3e13 == WORK
    assert sizes_of([2048] * 8, 8 * 2047, int(WORK / 16384) + 1) is None
