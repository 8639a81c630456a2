"""Judges whether the answers of a file say anything, and whether they belong to their questions.

Shuffled answers do not make a model forget what came before: it learns their form all the same, so the loss on earlier
rows does not reveal them. What reveals them is that each answer is as probable after another row's question as after
its own: a permutation test of independence with the model as its statistic. The guard acts if the model can tell which
answers of earlier files belong to which questions, but cannot for this file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev
from typing import Any

import numpy as np

from onward.data.tokenized import Row

LOOKS = (16, 32, 64)
"""Numbers of rows after which a file is judged; only if that is not clear yet, more rows are looked at."""
CLEAR = 3.0
"""Standard errors above zero from which answers belong to their questions beyond doubt."""
FEWEST = 8
"""With fewer rows no verdict is given."""
FEW_TOKENS, NEARLY_ALL = 4, 0.9
"""A file in which so few distinct tokens make up this share of an answer says one thing over and over."""
LONG = 8
"""Length of an answer, in tokens, from which that is odd: labels are a few tokens, and there are few of them."""

Losses = Callable[[Sequence[Row]], Sequence[float]]
"""Returns the mean loss over the target tokens of each row."""


@dataclass(frozen=True)
class Fit:
    """How much better answers fit their own questions than those of other rows.

    Args:
        z: the mean gain in standard errors; None if there was too little to judge.
        rows: how many rows were looked at.
        worst: indices of the rows whose answer fits another question better, the worst first.
    """

    z: float | None
    rows: int
    worst: tuple[int, ...] = ()

    @property
    def is_clear(self) -> bool:
        """Whether the answers belong to their questions beyond doubt."""
        return self.z is not None and self.z >= CLEAR


def fit_of(rows: Sequence[Row], losses: Losses, longest: int | None = None) -> Fit:
    """Judge rows by a model: a few at first, more if that is not clear.

    Args:
        rows: in the order in which they are looked at.
        longest: the most tokens of a row that the model has positions for; None if there is no such limit.
    """
    gains: dict[int, float] = {}
    seen, found = 0, Fit(None, 0)
    for count in LOOKS:
        more = range(seen, min(count, len(rows)))
        pairs = [(place, other) for place in more if (other := _exchanged(rows, place, longest)) is not None]
        own = losses([rows[place] for place, _ in pairs])
        exchanged = losses([other for _, other in pairs])
        gains |= {place: there - here for (place, _), here, there in zip(pairs, own, exchanged, strict=True)}
        seen = max(seen, more.stop)
        worst = tuple(sorted((place for place in gains if gains[place] <= 0), key=gains.__getitem__))
        found = Fit(standard_errors(list(gains.values())), seen, worst)
        if found.is_clear or count >= len(rows):
            break
    return found


def standard_errors(gains: Sequence[float]) -> float | None:
    """Return by how many standard errors the mean of gains is above zero; None if there are fewer than `FEWEST`."""
    if len(gains) < FEWEST:
        return None
    return fmean(gains) / max(stdev(gains) / math.sqrt(len(gains)), 1e-9)


def say_the_same(rows: Sequence[Row]) -> bool:
    """Whether all rows say one thing: all of them the same, or each of them a few tokens over and over."""
    said = [row.ids[row.targets].tolist() for row in rows]
    if len(said) < FEWEST:
        return False
    if _question(rows[0]) is not None and len({frozenset(each) for each in said}) == 1:
        return True
    counts = Counter(chain.from_iterable(said))
    total = counts.total()
    return total >= LONG * len(said) and sum(n for _, n in counts.most_common(FEW_TOKENS)) >= NEARLY_ALL * total


def _question(row: Row) -> int | None:
    """Return where the first answer begins; None if nothing but the first token precedes it."""
    first = int(np.argmax(row.targets)) if row.targets.any() else 0
    return first if first > 1 else None


def _exchanged(rows: Sequence[Row], place: int, longest: int | None) -> Row | None:
    """Return a row's answer after the question of the next row with another answer, unless the two are too long
    together; None if there is none."""
    row, first = rows[place], _question(rows[place])
    if first is None:
        return None
    answer = row.ids[first:]
    for step in range(1, len(rows)):
        other = rows[(place + step) % len(rows)]
        cut = _question(other)
        if cut is None or (longest is not None and cut + len(answer) > longest):
            continue
        if not np.array_equal(other.ids[cut:], answer):
            ids = np.concatenate([other.ids[:cut], answer])
            return Row(ids, np.concatenate([np.zeros(cut, dtype=bool), row.targets[first:]]))
    return None


def judged(
    rows: Sequence[Row], losses: Losses, references: Iterator[Sequence[Row]], longest: int | None = None
) -> dict[str, Any]:
    """Judge the rows of a file before it is trained; return JSON values.

    Args:
        rows: rows of the file, in the order in which they are looked at.
        references: rows of earlier files, which show what the model can tell; read only in doubt.
        longest: as for `fit_of`.

    Returns:
        `same`: whether all rows say one thing. `z`: standard errors by which answers fit their own questions better
        than others; None if that cannot be judged. `known`: whether the model can tell the answers of an earlier file.
    """
    if say_the_same(rows[: LOOKS[0]]):
        return {"same": True, "z": None, "known": None, "rows": min(LOOKS[0], len(rows)), "worst": []}
    fit = fit_of(rows, losses, longest)
    doubtful = fit.z is not None and not fit.is_clear
    known = any(fit_of(others[: LOOKS[0]], losses, longest).is_clear for others in references) if doubtful else None
    return {"same": False, "z": fit.z, "known": known, "rows": fit.rows, "worst": list(fit.worst)}
