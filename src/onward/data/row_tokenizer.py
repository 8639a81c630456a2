"""From rows to tokens with exact targets: a token is a target if it overlaps characters that the model produces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onward.config import Config
from onward.data.files.faults import lacks_thread_pool
from onward.data.files.reading import Reading
from onward.data.row_types import Chat, Record, RowError, Text
from onward.data.rows.template import ChatTemplate, RowText
from onward.data.rows.turns import Span
from onward.data.splitting import LEAST, cuts, places_of_bytes, places_of_ranges
from onward.data.tiling import byte_lengths, pack_tiled
from onward.data.tokenized import FORMAT, TARGET_BIT, PackedRow, Weights, ids_of, pack, weighed
from onward.data.tokenizer import TokenizerState, closing_tokens
from onward.digest import sha256_json
from onward.errors import ModelError

OverLength: TypeAlias = Literal["auto", "truncate", "drop", "reject"]


class TooLong(RowError):
    """A row is too long, and the policy is to refuse its file."""


@dataclass(frozen=True)
class Fitted:
    """A row after the length policy: `packed` is None if the row is dropped."""

    packed: PackedRow | None
    truncated: bool = False


def end_token(state: TokenizerState, where: object = None) -> int:
    """Return the id of the token that ends a text.

    Args:
        where: the tokenizer's place, for the error.

    Raises:
        ModelError: the tokenizer has none, so that no row can be trained.
    """
    if state.eos_id is None:
        hint = 'set "eos_token" in its tokenizer_config.json'
        raise ModelError("the tokenizer has no end token", where=where, hint=hint)
    return state.eos_id


class RowTokenizer:
    """Turns rows into packed tokens.

    Args:
        state: the tokenizer; it must have an end token.
        max_length: tokens that a row may have.
        over_length: what happens to longer rows: they are truncated, left out, or refused; `auto` splits texts into
            several rows and truncates others.

    Raises:
        ModelError: the tokenizer has no end token, or its chat template is not valid Jinja.
    """

    def __init__(self, state: TokenizerState, max_length: int, over_length: OverLength = "truncate") -> None:
        self.state = state
        self.max_length = max_length
        self.over_length: OverLength = over_length
        self._backend: Any = state.tokenizer
        self._has_threads = True
        self._end_id = end_token(state)
        self._lengths = byte_lengths(self._backend)
        self._template = ChatTemplate(state)
        self._begins = _start_token(state)
        self._takers = _space_takers(self._backend)

    @property
    def largest_id(self) -> int:
        """The largest id that a token of a row can have."""
        if self._lengths is None:
            return self.state.largest_id
        return max(len(self._lengths) - 1, self.state.largest_special_id)

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide which tokens a row becomes."""
        return {"tokenizer": self.state.key, "max_length": self.max_length, "over_length": self.over_length}

    def prepare(self, record: Record, stop: Callable[[], None] = lambda: None) -> RowText:
        """Return the text of a row and which of its characters are targets.

        Args:
            stop: called again and again while a long chat is proven; may raise.

        Raises:
            RowError: the chat template refuses the row, or its targets cannot be proven.
        """
        if isinstance(record, Chat):
            text, spans = self._template.render(record, stop)
            weighed = tuple(self._weighed(record, stop)) if record.weights else ()
            return RowText(text, spans, closed=True, ignored=self._template.ignored(record), weighed=weighed)
        is_text = isinstance(record, Text)
        text = record.text if is_text else record.prompt + record.completion
        if self._begins and text.startswith(self._begins):
            raise RowError(
                f"the text begins with the start token {self._begins!r}, which the tokenizer adds",
                "remove it: it would be trained twice",
            )
        start = 0 if is_text else len(record.prompt)
        spans = [(start, len(text) + 1)]
        weighed = ((record.weight, spans),) if record.weight != 1 else ()
        return RowText(text, spans, closed=False, ignored=record.ignored, weighed=weighed)

    def _weighed(self, chat: Chat, stop: Callable[[], None]) -> Iterator[tuple[float, list[Span]]]:
        """Yield each weight other than 1 with the character spans of the answers that have it."""
        for weight in dict.fromkeys(chat.weights.values()):
            others = [turn for turn in chat.turns if chat.weights.get(turn, 1.0) != weight]
            if len(others) < len(chat.turns):
                untrained = chat.untrained.union(others)
                yield weight, self._template.render(replace(chat, untrained=untrained), stop)[1]

    def encode(self, rows: Sequence[RowText], weights: Weights | None = None) -> list[PackedRow]:
        """Return the packed tokens of each row, whatever their length.

        One call with a few hundred rows is much faster than one call per row.

        Args:
            weights: numbers the target weights of one file.
        """
        return self.pack(rows, self.tokenize(rows), weights)

    def tokenize(self, rows: Sequence[RowText]) -> list[Any]:
        """Return the encodings of rows, for `pack`. Nearly all of the work runs without Python's lock.

        Where the library has no threads, the rows are encoded one by one, to the same tokens.
        """
        if self._has_threads:
            encode = self._backend.encode_batch if self._lengths is None else self._backend.encode_batch_fast
            try:
                return self._encoded(rows, encode)
            except BaseException as error:
                if not lacks_thread_pool(error):
                    raise
                self._has_threads = False
        return self._encoded(rows, self._one_by_one)

    def _one_by_one(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Any]:
        return [self._backend.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    @staticmethod
    def _encoded(rows: Sequence[RowText], encode: Callable[..., Sequence[Any]]) -> list[Any]:
        encodings: list[Any] = [None] * len(rows)
        for closed in (True, False):
            places = [place for place, row in enumerate(rows) if row.closed is closed]
            texts = [rows[place].text for place in places]
            made = encode(texts, add_special_tokens=not closed) if texts else []
            for place, encoding in zip(places, made, strict=True):
                encodings[place] = encoding
        return encodings

    def pack(
        self, rows: Sequence[RowText], encodings: Sequence[Any], weights: Weights | None = None
    ) -> list[PackedRow]:
        """Return the packed tokens of each row from its encoding; `weights` numbers the target weights of one file."""
        packed, weights = self._packed(rows, encodings), weights or Weights()
        for place, row in enumerate(rows):
            for weight, spans in row.weighed:
                (own,) = self.encode([RowText(row.text, spans, row.closed)])
                packed[place] = weighed(packed[place], own >= TARGET_BIT, weights.number(weight))
        return packed

    def _packed(self, rows: Sequence[RowText], encodings: Sequence[Any]) -> list[PackedRow]:
        if self._lengths is None:
            return self._pack_by_offsets(rows, encodings)
        packed = pack_tiled(rows, [encoding.ids for encoding in encodings], self._lengths, self._end_id)
        for place in [place for place, row in enumerate(packed) if row is None]:
            row = rows[place]
            again = self._backend.encode(row.text, add_special_tokens=not row.closed)
            (packed[place],) = self._pack_by_offsets([row], [again])
        return [row for row in packed if row is not None]

    def _pack_by_offsets(self, rows: Sequence[RowText], encodings: Sequence[Any]) -> list[PackedRow]:
        if not rows:
            return []
        tokens = [self._tokens(row, encoding) for row, encoding in zip(rows, encodings, strict=True)]
        lengths = np.array([len(ids) for ids, _ in tokens])
        offsets = np.concatenate([offsets for _, offsets in tokens])
        packed = pack(np.concatenate([ids for ids, _ in tokens]), _targets(rows, offsets, lengths))
        return np.split(packed, np.cumsum(lengths)[:-1])

    def fit(self, packed: PackedRow) -> Fitted:
        """Apply the length policy to one row.

        Raises:
            TooLong: the row is too long and the policy is to refuse it.
        """
        if len(packed) <= self.max_length:
            return Fitted(packed)
        if self.over_length == "reject":
            raise TooLong(
                f"the row has {len(packed)} tokens, more than max_length = {self.max_length}",
                "shorten the row, raise max_length, or set over_length to auto, truncate or drop",
            )
        kept = packed[: self.max_length]
        if self.over_length == "drop" or not has_target(kept):
            return Fitted(None)
        return Fitted(kept, truncated=True)

    def split(self, row: RowText, packed: PackedRow, encoding: Any = None) -> list[PackedRow]:
        """Return the rows that a row is trained as: several if it is a text that is too long, otherwise itself.

        Laid end to end they are the row, except that each begins with the tokens that the tokenizer puts before any
        text. Each token stays a target or not, except that the first one of a piece never is: nothing predicts it.

        Args:
            packed: all tokens of `row`.
            encoding: what `tokenize` returned for it, if available.
        """
        if self.over_length != "auto" or len(packed) <= self.max_length or not _is_text(row):
            return [packed]
        begin, places = self._places(row, packed, encoding)
        room = self.max_length - begin
        if room < 2 * LEAST:
            return [packed]
        first, *others = np.split(packed, [begin + cut for cut in cuts(row.text, places, room)])
        return [first, *(_continued(packed[:begin], piece) for piece in others)]

    def _places(self, row: RowText, packed: PackedRow, encoding: Any) -> tuple[int, NDArray[np.int64]]:
        """Return how many tokens precede the text of a row, and where in the text each of the others starts."""
        end = len(row.text)  # where the end token stands
        if self._lengths is not None:
            places = places_of_bytes(row.text, self._lengths[ids_of(packed[:-1])])
            if places is not None:
                return 0, np.append(places, end)
            encoding = None
        encoding = encoding or self._backend.encode(row.text, add_special_tokens=True)
        begin = sum(1 for _ in takewhile(bool, encoding.special_tokens_mask))
        ranges = np.array(encoding.offsets[begin : len(packed) - 1], dtype=np.int64).reshape(-1, 2)
        return begin, np.append(places_of_ranges(row.text, ranges), end)

    def _tokens(self, row: RowText, encoding: Any) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return the ids of a row, shape (T,), and their character ranges, laid end to end, shape (2 * T,).

        They become arrays row by row: lists of a whole chunk would keep the garbage collector busy.
        """
        ids: list[int] = encoding.ids
        offsets: list[Span] = encoding.offsets
        if not row.closed:
            self._close(row, ids, offsets, closing_tokens(encoding) if self.state.trains_closing else 0)
        for place, index in enumerate(ids) if self._takers else ():
            if index in self._takers:
                offsets[place] = _without_space(row.text, offsets[place], self._takers[index])
        flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
        return np.fromiter(ids, dtype=np.uint32, count=len(ids)), flat

    def _close(self, row: RowText, ids: list[int], offsets: list[Span], closing: int) -> None:
        """Make a row end with exactly one end token, whatever the tokenizer or the text already added.

        Args:
            closing: how many tokens of the tokenizer's own close the text, and are learned like the end token.
        """
        end = (len(row.text), len(row.text) + 1)
        offsets[len(ids) - closing :] = [end] * closing
        while ids and ids[-1] == self._end_id:
            ids.pop()
        del offsets[len(ids) :]
        ids.append(self._end_id)
        offsets.append(end)


def _start_token(state: TokenizerState) -> str:
    """Return the start token that the tokenizer puts before a text; "" if it puts none."""
    token = state.special_tokens_map.get("bos_token", "")
    added: list[int] = state.tokenizer.encode("a", add_special_tokens=True).ids
    return token if token and added[:1] == [state.bos_id] else ""


def _space_takers(backend: Any) -> dict[int, str]:
    """Return the added tokens, by id, that take the white space after them along (`rstrip`, as Phi-3's do)."""
    return {index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.rstrip}


def _without_space(text: str, span: Span, token: str) -> Span:
    """Return where a token ends without the white space after it, which may belong to an answer that is a target."""
    start, end = span
    at = text.find(token, start, end)
    return (start, at + len(token)) if at >= 0 else span


def _is_text(row: RowText) -> bool:
    """Return whether a row is plain text, all of which is trained."""
    return not row.closed and row.spans == [(0, len(row.text) + 1)]


def _continued(begin: PackedRow, piece: PackedRow) -> PackedRow:
    """Return a later piece of a text as a row that begins as any text does."""
    if len(begin):
        return np.concatenate((begin, piece))
    return np.append(ids_of(piece[:1]), piece[1:])


def has_target(packed: PackedRow) -> bool:
    """Whether any token of a row is a target."""
    return bool(np.any(packed >= TARGET_BIT))


def _targets(rows: Sequence[RowText], offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for every token of every row, laid end to end, whether it is a target.

    Some tokenizers trim white space off their offsets (GPT-2's `trim_offsets`), which gives a token of nothing but
    white space an empty range. A token is therefore taken to start no later than where the one before it ended.
    """
    firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
    bases = np.cumsum([0] + [len(row.text) + 2 for row in rows])[:-1]
    starts, ends = offsets.reshape(-1, 2).T + np.repeat(bases, lengths)
    previous = np.concatenate((starts[:1], ends[:-1]))
    previous[firsts] = starts[firsts]
    starts = np.minimum(starts, previous)
    spans = [
        (base + start, base + end) for base, row in zip(bases.tolist(), rows, strict=True) for start, end in row.spans
    ]
    span_starts, span_ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    place = np.searchsorted(span_ends, starts, side="right")  # the first span that ends after the token starts
    span_starts = np.append(span_starts, np.iinfo(np.int64).max)
    targets = span_starts[place] < ends
    targets[firsts] = False  # nothing predicts the first token of a row
    return targets


def cache_key(sha256: str, tokenizer_key: str, config: Config) -> str:
    """Return the name under which the tokens of a file are kept: equal keys mean equal tokens and targets."""
    settings = Reading.of(config).settings()
    added = [settings] if settings else []
    return sha256_json([FORMAT, sha256, tokenizer_key, config.max_length, config.over_length, *added])
