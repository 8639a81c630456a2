"""Targets without offsets: where the tokens of a text tile it, the ends of each span say which tokens are its own.

A list of every token's character range costs more than all else that intake does in Python. Byte-level tokenizers
without a normalizer (SmolLM2, GPT-2, StarCoder) tile a text; all others are packed from the ranges.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from onward.data.tokenized import TARGET_BIT, PackedRow

SPLITTERS = ("Digits", "Split")
"""Pre-tokenizers that only cut a text."""


def tiles_text(backend: Any) -> bool:
    """Whether the tokens of this tokenizer follow each other in the text, each where the one before it ended."""
    from tokenizers import models

    if backend.normalizer is not None or not isinstance(backend.model, models.BPE):
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


def pack_tiled(encoding: Any, length: int, spans: Sequence[tuple[int, int]], end_id: int | None) -> PackedRow | None:
    """Return the packed tokens of a text; None where the end of a span lies in no token.

    Args:
        length: characters of the text.
        spans: character ranges that are targets, in order.
        end_id: the token that closes the text and stands for one more character; None for a text with its own.
    """
    ids: list[int] = encoding.ids
    if end_id is not None:
        while ids and ids[-1] == end_id:
            ids.pop()
        ids.append(end_id)
    count = len(ids)
    packed = np.fromiter(ids, dtype=np.uint32, count=count)
    for start, end in spans:
        first = encoding.char_to_token(start) if start < length else count - 1
        last = _tokens_before(encoding, end, count) if end < length else count
        if first is None or last is None:
            return None
        packed[(min(first, count - 1) if end_id is not None else first) or 1 : last] |= TARGET_BIT
    return packed


def _tokens_before(encoding: Any, end: int, count: int) -> int | None:
    """Return how many tokens start before a character; None where it or the one before it lies in no token."""
    token = encoding.char_to_token(end)
    if token is None or encoding.char_to_token(end - 1) is None:
        return None
    return min(token + (encoding.token_to_chars(token)[0] < end), count)


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())
