"""Splits a long text into several rows, between tokens, at the end of a sentence or at white space; nothing is lost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ENDS = frozenset(".!?\u2026")
"""Characters that end a sentence if white space follows, or a quote or bracket and then white space."""
WIDE_ENDS = frozenset("\u3002\uff01\uff1f\uff1b")
"""Characters that end a sentence whatever follows."""
CLOSERS = frozenset("\"')]}\u00bb\u201d\u2019\u300d\u300f")
LEAST = 2
"""The fewest tokens of a piece: nothing is trained of a row of one token."""
BLANKS = 8
"""How many characters of white space are skipped backwards in search of the end of a sentence."""
INSIDE = -1
"""Marks a place inside a character."""


def places_of_bytes(text: str, sizes: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the character index at which each token starts, shape (T + 1,) with the end; `INSIDE` if inside one.

    Args:
        sizes: bytes of each token, shape (T,); together they tile the text.

    Returns:
        None if they do not.
    """
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    ends = np.cumsum(sizes)
    if not len(ends) or int(ends[-1]) != len(data):
        return None
    begins = np.append((data & 0xC0) != 0x80, True)
    characters = np.cumsum(begins) - 1
    at = np.append(0, ends)
    return np.where(begins[at], characters[at], INSIDE)


def places_of_ranges(text: str, ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the same, from the character range of each token, shape (T, 2)."""
    starts, ends = ranges.T
    before = np.append(0, np.maximum.accumulate(ends)[:-1])
    return np.append(np.where(starts >= before, starts, INSIDE), len(text))


def cuts(text: str, places: NDArray[np.int64], room: int) -> list[int]:
    """Return the indices of the tokens before which a text is cut, so that no piece has more than `room` tokens.

    A piece ends with a sentence if one ends in its second half, else before white space, else between two characters.
    """
    found: list[int] = []
    start, count = 0, len(places) - 1
    while count - start > room:
        latest = min(start + room, count - LEAST)
        earliest = start + LEAST
        cut = _last_end(text, places, latest, max(earliest, start + room // 2))
        cut = cut or next((at for at in range(latest, earliest - 1, -1) if _is_space(text, int(places[at]))), 0)
        cut = cut or next((at for at in range(latest, earliest - 1, -1) if places[at] != INSIDE), 0)
        start = cut or latest
        found.append(start)
    return found


def _last_end(text: str, places: NDArray[np.int64], latest: int, earliest: int) -> int:
    """Return the last token in a range that follows the end of a paragraph or a sentence; 0 if there is none."""
    for at in range(latest, earliest - 1, -1):
        place = int(places[at])
        if 0 < place < len(text) and _ends_sentence(text, place):
            return at
    return 0


def _ends_sentence(text: str, place: int) -> bool:
    before, after = text[place - 1], text[place]
    if before == "\n" or before in WIDE_ENDS:
        return after != "\n" and after not in WIDE_ENDS and after not in CLOSERS
    if not _is_space(text, place):
        return False
    last = place - 1
    while last > max(0, place - BLANKS) and text[last].isspace():
        last -= 1
    while last > 0 and text[last] in CLOSERS:
        last -= 1
    return text[last] in ENDS


def _is_space(text: str, place: int) -> bool:
    """Return whether white space begins or ends at a place."""
    return 0 < place < len(text) and text[place].isspace() != text[place - 1].isspace()
