"""Rows to tokens with exact targets: a token is a target if it overlaps the characters that the model produces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onward.data.records import Chat, Completion, Record, RowError
from onward.data.template import ChatTemplate, Span
from onward.data.tokenized import FORMAT, PackedRow, pack
from onward.digest import sha256_json
from onward.errors import ModelError

OverLength: TypeAlias = Literal["truncate", "drop", "reject"]


@dataclass(frozen=True)
class RowText:
    """A row as text, ready for the tokenizer.

    Args:
        text: what is tokenized.
        spans: the character ranges that are targets, in order; None for all of the text.
        closed: whether the text has its own control tokens (a rendered chat). If not, the tokenizer's special tokens
            are added and one end token, which is a target, closes the row.
    """

    text: str
    spans: list[Span] | None
    closed: bool


@dataclass(frozen=True)
class Fitted:
    """A row after the length policy: `packed` is None where the row is dropped."""

    packed: PackedRow | None
    truncated: bool = False


class RowTokenizer:
    """Turns rows into packed tokens.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an end token.
        max_length: tokens that a row may have.
        over_length: what happens to longer rows: cut their end off, leave them out, or refuse them.

    Raises:
        ModelError: the tokenizer is a slow one, or has no end token.
    """

    def __init__(self, tokenizer: Any, max_length: int, over_length: OverLength = "truncate") -> None:
        self._backend = _backend(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token", hint='set "eos_token" in its tokenizer_config.json')
        self._end_id: int = tokenizer.eos_token_id
        self._template = ChatTemplate(tokenizer)
        self.max_length = max_length
        self.over_length: OverLength = over_length
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    def prepare(self, record: Record) -> RowText:
        """Return the text of a row and which of its characters are targets.

        Raises:
            RowError: the chat template refuses the row, or its targets cannot be proven.
        """
        if isinstance(record, Chat):
            text, spans = self._template.render(record)
            return RowText(text, spans, closed=True)
        if isinstance(record, Completion):
            start = len(record.prompt)
            return RowText(record.prompt + record.completion, [(start, start + len(record.completion))], closed=False)
        return RowText(record.text, None, closed=False)

    def encode(self, rows: Sequence[RowText]) -> list[PackedRow]:
        """Return the packed tokens of each row, whatever their length.

        One call with some hundred rows is much faster than one call per row.
        """
        self._backend.no_padding()  # the Hugging Face tokenizer around it may have switched these on
        self._backend.no_truncation()
        packed: dict[int, PackedRow] = {}
        for closed in (True, False):
            places = [place for place, row in enumerate(rows) if row.closed is closed]
            encoded = self._encode_alike([rows[place] for place in places], closed=closed)
            packed.update(zip(places, encoded, strict=True))
        return [packed[place] for place in range(len(rows))]

    def fit(self, packed: PackedRow) -> Fitted:
        """Apply the length policy to one row.

        Raises:
            RowError: the row is too long and the policy is to refuse it.
        """
        if len(packed) <= self.max_length:
            return Fitted(packed)
        if self.over_length == "reject":
            raise RowError(
                f"the row has {len(packed)} tokens, more than max_length = {self.max_length}",
                "shorten the row, raise max_length, or set over_length to truncate or drop",
            )
        kept = packed[: self.max_length]
        if self.over_length == "drop" or not np.any(kept >> 31):
            return Fitted(None)
        return Fitted(kept, truncated=True)

    def _encode_alike(self, rows: Sequence[RowText], *, closed: bool) -> list[PackedRow]:
        if not rows:
            return []
        encodings = self._backend.encode_batch([row.text for row in rows], add_special_tokens=not closed)
        all_ids: list[list[int]] = [encoding.ids for encoding in encodings]
        if not closed:
            all_ids = [self._without_end(ids) for ids in all_ids]
        lengths = [len(ids) for ids in all_ids]
        bounds = np.cumsum(lengths)
        ids = np.fromiter(chain.from_iterable(all_ids), dtype=np.int64, count=int(bounds[-1]))
        offsets = [encoding.offsets[:length] for encoding, length in zip(encodings, lengths, strict=True)]
        targets = _targets(rows, offsets, lengths)
        pairs = zip(np.split(ids, bounds[:-1]), np.split(targets, bounds[:-1]), strict=True)
        return [self._finish(row_ids, row_targets, closed=closed) for row_ids, row_targets in pairs]

    def _without_end(self, ids: list[int]) -> list[int]:
        count = len(ids)
        while count and ids[count - 1] == self._end_id:
            count -= 1
        return ids[:count]

    def _finish(self, ids: NDArray[np.int64], targets: NDArray[np.bool_], *, closed: bool) -> PackedRow:
        if not closed:
            ids, targets = np.append(ids, self._end_id), np.append(targets, True)
        targets[:1] = False  # nothing predicts the first token
        return pack(ids, targets)


def _targets(rows: Sequence[RowText], offsets: list[list[Span]], lengths: list[int]) -> NDArray[np.bool_]:
    """Return for every token of every row, laid end to end, whether it overlaps one of its row's spans.

    Some tokenizers trim white space off their offsets (GPT-2's `trim_offsets`), which leaves a token of nothing but
    white space with an empty range. A token therefore starts no later than where the one before it ended.
    """
    total = sum(lengths)
    flat = np.fromiter(chain.from_iterable(chain.from_iterable(offsets)), dtype=np.int64, count=2 * total)
    bases = np.concatenate(([0], np.cumsum([len(row.text) + 1 for row in rows])))[:-1]
    shift = np.repeat(bases, lengths)
    starts, ends = flat[0::2] + shift, flat[1::2] + shift
    previous = np.concatenate((starts[:1], ends[:-1]))
    firsts = np.cumsum([0, *lengths[:-1]])
    firsts = firsts[np.asarray(lengths) > 0]
    previous[firsts] = starts[firsts]
    starts = np.minimum(starts, previous)
    spans = np.array(
        [(base + a, base + b) for base, row in zip(bases, rows, strict=True) for a, b in _spans(row)], dtype=np.int64
    ).reshape(-1, 2)
    if not len(spans):
        return np.zeros(total, dtype=np.bool_)
    place = np.searchsorted(spans[:, 1], starts, side="right")
    inside = place < len(spans)
    return inside & (spans[np.minimum(place, len(spans) - 1), 0] < ends)


def _spans(row: RowText) -> list[Span]:
    return [(0, len(row.text))] if row.spans is None else row.spans


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a SHA-256 of all that decides how this tokenizer turns rows into tokens and targets.

    Raises:
        ModelError: the tokenizer is a slow one.
    """
    state = json.loads(_backend(tokenizer).to_str())
    for key in ("padding", "truncation"):  # how it was last called, not what it is
        state.pop(key, None)
    template = ChatTemplate(tokenizer).fingerprint
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_json([FORMAT, state, template, special, tokenizer.eos_token_id])


def cache_key(sha256: str, tokenizer_fingerprint: str, max_length: int, over_length: OverLength) -> str:
    """Return the name under which the tokens of a file are kept: equal keys mean equal tokens and targets."""
    return sha256_json([FORMAT, sha256, tokenizer_fingerprint, max_length, over_length])


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where its tokens stand in the text",
            hint="use a model that ships a tokenizer.json",
        )
    return backend
