"""Chats of nothing but roles and texts, proven once per sequence of roles.

If a template renders a chat as the same pieces of its own text around whatever the messages say, one proof, of a chat
of unique words, holds for all: of each row, only that it renders to those pieces around its texts is checked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from onward.data.row_types import Chat, Message, RowError
from onward.data.rows.turns import Target

WORD = "onwardPlain{:06d}End"
STRIPPERS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
SHAPES = 512
"""The most sequences of roles that are kept; chats with others are proven one by one."""


@dataclass(frozen=True)
class _Shape:
    """How a template renders chats with one sequence of roles.

    Args:
        pieces: the template's own text before, between and after the texts of the messages.
        targets: for each answer, its index; how many texts precede its start and its end; and how many characters of
            the pieces do.
    """

    pieces: list[str]
    targets: list[tuple[int, int, int, int, int]]

    def filled(self, texts: Sequence[str]) -> str:
        """Return the text of a chat: the pieces around `texts`."""
        parts = [""] * (2 * len(texts) + 1)
        parts[::2] = self.pieces
        parts[1::2] = texts
        return "".join(parts)

    def place(self, texts: Sequence[str], untrained: frozenset[int]) -> list[tuple[int, int]]:
        """Return the character ranges of the targets."""
        before = [0, *accumulate(map(len, texts))]
        return [
            (before[first] + start, before[behind] + end)
            for turn, first, start, behind, end in self.targets
            if turn not in untrained
        ]


class PlainChats:
    """Finds the targets of plain chats.

    Args:
        prove: returns the text of a chat and its proven targets; its second argument is called between renderings.
    """

    def __init__(self, prove: Callable[[Chat, Callable[[], None]], tuple[str, list[Target]]]) -> None:
        self._prove = prove
        self._shapes: dict[tuple[bool, tuple[str, ...]], _Shape | None] = {}

    def targets(
        self, chat: Chat, texts: Sequence[str], text: str, stop: Callable[[], None] = lambda: None
    ) -> list[tuple[int, int]] | None:
        """Return the targets of a chat; None if it has to be proven by itself.

        Args:
            chat: a plain chat.
            texts: what its messages say.
            text: what it renders to.
            stop: called while a sequence of roles is proven; may raise.
        """
        kept = [said.strip() for said in texts]
        if not all(kept):
            return None
        is_padded = sum(map(len, kept)) != sum(map(len, texts))
        shape = self._shape(is_padded, tuple([message["role"] for message in chat.messages]), stop)
        if shape is None:
            return None
        for strip in STRIPPERS if is_padded else STRIPPERS[:1]:
            kept = list(map(strip, texts))
            if shape.filled(kept) == text:
                return shape.place(kept, chat.untrained)
        return None

    def _shape(self, is_padded: bool, roles: tuple[str, ...], stop: Callable[[], None]) -> _Shape | None:
        key = is_padded, roles
        if key not in self._shapes:
            if len(self._shapes) >= SHAPES:
                return None
            self._shapes[key] = self._padded(roles, stop) if is_padded else self._proven(roles, "", stop)
        return self._shapes[key]

    def _padded(self, roles: tuple[str, ...], stop: Callable[[], None]) -> _Shape | None:
        """Return the shape for texts with white space around them, if that changes nothing else."""
        return self._shape(False, roles, stop) if self._proven(roles, " \n", stop) else None

    def _proven(self, roles: Sequence[str], around: str, stop: Callable[[], None]) -> _Shape | None:
        words = [WORD.format(place) for place in range(len(roles))]
        messages: list[Message] = [
            {"role": role, "content": around + word + around} for role, word in zip(roles, words, strict=True)
        ]
        try:
            text, targets = self._prove(Chat(messages), stop)
        except RowError:
            return None
        ends = list(_ends(text, words))
        return _Shape(list(_between(text, words, ends)), [_measured(target, ends, words) for target in targets])


def _ends(text: str, words: Sequence[str]) -> Iterator[int]:
    """Yield where each word ends in a text that contains each once, in order."""
    end = 0
    for word in words:
        end = text.index(word, end) + len(word)
        yield end


def _between(text: str, words: Sequence[str], ends: Sequence[int]) -> Iterator[str]:
    for word, end, before in zip(words, ends, (0, *ends), strict=False):
        yield text[before : end - len(word)]
    yield text[ends[-1] :]


def _measured(target: Target, ends: Sequence[int], words: Sequence[str]) -> tuple[int, int, int, int, int]:
    first, behind = bisect_right(ends, target.start), bisect_right(ends, target.end)
    length = len(words[0])
    return target.place, first, target.start - first * length, behind, target.end - behind * length
