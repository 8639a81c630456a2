"""Holdouts: the rows of a file that are never trained, and the rows that it is measured on. Nothing is stored.

The choice is a function of (seed, file, row): the rows of a file are put in a pseudo-random order and the first ones
are held out. A smaller share therefore holds out a subset of what a larger one does, and a file that is trained again
holds out the same rows.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from onward.data.plan.permutation import Permutation

Share = float | Literal["auto"]

AUTO_SHARE, AUTO_FROM, AUTO_MOST = Fraction(1, 50), 200, 64
"""`auto`: the share of the rows, the number of rows from which a file has a holdout, and the most rows held out."""


def count_held_out(rows: int, share: Share) -> int:
    """Return how many of a file's rows are held out; at least one row is left to train.

    Args:
        share: a share of the rows, rounded down, or `auto`: 2 % of a file of 200 rows or more, 64 at most.
    """
    if share == "auto":
        return min(AUTO_MOST, int(rows * AUTO_SHARE)) if rows >= AUTO_FROM else 0
    return min(int(rows * exact(share)), rows - 1)


def exact(share: float) -> Fraction:
    """Return a share exactly as the user wrote it, so that 0.1 of 10 rows is 1 and not a little less."""
    return Fraction(str(share))


def rows_in_question(seed: int, sha256: str, rows: int, count: int) -> list[int]:
    """Return the first `count` of a file's `rows` rows in the order in which they are held out, or measured."""
    order = Permutation(rows, f"onward holdout 1:{seed}:{sha256}".encode())
    return [order[place] for place in range(min(count, rows))]


def held_out_rows(seed: int, sha256: str, rows: int, count: int) -> tuple[int, ...]:
    """Return the indices of the held-out rows, in rising order."""
    return tuple(sorted(rows_in_question(seed, sha256, rows, count)))
