"""Targets without offsets: if the tokens of a text tile its bytes, their lengths say where each token is.

The `tokenizers` library spends a sixth of its time on the character range of every token, and listing the ranges in
Python takes longer than everything else that intake does. The tokens of a byte-level tokenizer without a normalizer
(SmolLM2, GPT-2, StarCoder) tile a text. Rows of all others are packed from the ranges, and so is any row that its
tokens turn out not to cover exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers

from onward.data.rows.template import RowText
from onward.data.tokenized import PackedRow, pack

SPLITTERS = ("Digits", "Split")
"""Pre-tokenizers that only split a text."""


def byte_lengths(backend: Any) -> NDArray[np.int64] | None:
    """Return how many bytes of text each token id covers, shape (largest id + 1,).

    None if tokens do not tile a text, or if one id belongs to two tokens of different lengths. Ids may have gaps; the
    length at an id without a token is 0.
    """
    if not _tiles_text(backend):
        return None
    ids, lengths = _token_lengths(backend)
    table = np.zeros(ids.max(initial=-1) + 1, dtype=np.int64)
    table[ids] = lengths
    return table if np.array_equal(table[ids], lengths) else None


def _token_lengths(backend: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the id of every token that can be in an encoding, and how many bytes it covers.

    A token of the model is spelled in letters that each stand for one byte; an added token is plain text. One that is
    both counts as both, unless its text contains other characters, because then the model never produces it.
    """
    model: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    whole: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    added |= {token: index for token, index in whole.items() if token not in model}  # two of them may share an id
    letters = frozenset(pre_tokenizers.ByteLevel.alphabet())
    for token in added:
        if token in model and not letters.issuperset(token):
            del model[token]
    ids = [*model.values(), *added.values()]
    lengths = [*map(len, model), *(len(token.encode()) for token in added)]
    return np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64)


def pack_tiled(
    rows: Sequence[RowText], ids: Sequence[list[int]], lengths: NDArray[np.int64], end_id: int
) -> list[PackedRow | None]:
    """Return the packed tokens of rows from their token ids; None for a row whose text these do not cover exactly.

    Args:
        ids: the token ids of each row; a row that is not closed gets its end token here.
        lengths: as `byte_lengths` returns them.
        end_id: the token that closes a row and counts as one more byte after its text.
    """
    if not rows:
        return []
    is_open = np.array([not row.closed for row in rows])
    fits = np.array([row.closed or not own or own[-1] != end_id for row, own in zip(rows, ids, strict=True)])
    closed = [own if row.closed else [*own, end_id] for row, own in zip(rows, ids, strict=True)]
    counts = np.array([len(own) for own in closed])
    flat = np.fromiter(chain.from_iterable(closed), dtype=np.uint32, count=counts.sum())
    sizes, stops = lengths[flat], np.cumsum(counts)
    sizes[stops[is_open] - 1] = 1
    ends = np.cumsum(sizes)
    totals = np.diff(np.append(0, ends)[stops], prepend=0)
    fits &= totals == np.array([_byte(row.text, len(row.text)) for row in rows]) + is_open
    targets = _targets(rows, fits, ends, np.cumsum(totals) - totals)
    targets[(stops - counts)[counts > 0]] = False  # nothing predicts the first token of a row
    packed = np.split(pack(flat, targets), stops[:-1])
    return [row if fit else None for row, fit in zip(packed, fits, strict=True)]


def _targets(
    rows: Sequence[RowText], fits: NDArray[np.bool_], ends: NDArray[np.int64], bases: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which tokens overlap a span; `ends` and `bases` count the bytes of all rows laid end to end."""
    spans = [
        (base + _byte(row.text, start), base + _byte(row.text, end))
        for row, fit, base in zip(rows, fits.tolist(), bases.tolist(), strict=True)
        if fit
        for start, end in row.spans
    ]
    starts, stops = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    marks = np.zeros(len(ends) + 2, dtype=np.int64)
    np.add.at(marks, np.searchsorted(ends, starts, side="right"), 1)
    np.add.at(marks, np.searchsorted(ends, stops, side="left") + 1, -1)
    return np.cumsum(marks)[: len(ends)] > 0


def _byte(text: str, place: int) -> int:
    """Return the byte at which a character starts; each place after the end of the text counts as one."""
    return place if text.isascii() else len(text[:place].encode()) + max(0, place - len(text))


def _tiles_text(backend: Any) -> bool:
    model = backend.model
    if backend.normalizer is not None or not isinstance(model, models.BPE):
        return False
    if model.unk_token or model.continuing_subword_prefix or model.end_of_word_suffix or model.dropout:
        return False
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return False
    first = _state(backend.pre_tokenizer)
    parts = first.get("pretokenizers", [first])
    *cuts, last = parts
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return False
    if any(part["type"] not in SPLITTERS or part.get("behavior") == "Removed" for part in cuts):
        return False
    after = _state(backend.post_processor)
    return not after or (after["type"] == "TemplateProcessing" and not after["special_tokens"])


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())
