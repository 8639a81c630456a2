"""The text of an answer as it grows token by token: whole characters only, and nothing of a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from onward.data.tokenizer import TokenizerState


class Pieces:
    """The pieces of one answer; joined, they are the decoded text of its tokens, without special tokens.

    Args:
        state: the tokenizer.
        stops: texts, the first of which ends the answer and is not part of it.
    """

    def __init__(self, state: TokenizerState, stops: Sequence[str] = ()) -> None:
        self._tokenizer = state.tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._seen, self._given = "", 0
        self.has_ended = False
        """Whether a text that ends answers has come."""

    @property
    def text(self) -> str:
        """All that was given."""
        return self._seen[: self._given]

    def add(self, token: int) -> str:
        """Add the next token; return the text that is certain by now, which may be empty."""
        self._ids.append(token)
        self._seen += self._stream.step(self._tokenizer, token) or ""
        return self._certain()

    def rest(self) -> str:
        """Return what is left at the end; an incomplete character becomes the replacement character."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not self.has_ended and whole.startswith(self._seen):
            self._seen = whole
        held, self._stops = self._stops, []
        piece = self._certain()
        self._stops = held
        return piece

    def _certain(self) -> str:
        if self.has_ended:
            return ""
        places = [place for stop in self._stops if (place := self._seen.find(stop)) >= 0]
        if places:
            self._seen, self.has_ended = self._seen[: min(places)], True
        start, self._given = self._given, len(self._seen) if self.has_ended else len(self._seen) - self._held()
        return self._seen[start : self._given]

    def _held(self) -> int:
        """Return how many characters at the end may be the beginning of a text that ends the answer."""
        lengths = (
            length
            for stop in self._stops
            for length in range(min(len(stop) - 1, len(self._seen)), 0, -1)
            if self._seen.endswith(stop[:length])
        )
        return max(lengths, default=0)
