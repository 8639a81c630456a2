"""Targets from the lengths of tokens, for every layout of token ids that a tokenizer can have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from onward.data.row_tokenizer import RowTokenizer
from onward.data.rows.template import RowText
from onward.data.tiling import byte_lengths
from onward.data.tokenizer import TokenizerState

SMILE = "\U0001f600"  # four bytes
LETTERS = st.lists(st.sampled_from(["a", "b", " ", "\n", "7", "\u00e9", SMILE, "<|im_end|>"]), max_size=8).map("".join)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = [("a", "b"), ("\u00c3", "\u00a9"), ("a", "\u00c3"), ("\u0120", "a"), ("ab", "\u00f0"), ("\u00f0", "\u0141")]
MERGED = ["".join(pair) for pair in PAIRS]
LAYOUTS = ("plain", "missing letter", "gaps", "far", "added inside", "colliding")


def backend_of(layout: str) -> Any:
    """Return a byte-level tokenizer with some merges whose token ids lie as `layout` says."""
    kept = [letter for letter in ALPHABET if letter != "7" or layout != "missing letter"]
    vocabulary = {token: place for place, token in enumerate([*kept, *MERGED])}
    if layout == "gaps":  # the ids of added tokens fall into the gaps, so that some belong to two tokens
        vocabulary = {token: place * 3 for token, place in vocabulary.items()}
    elif layout == "far":
        vocabulary["ab"] = 5000
    elif layout == "added inside":
        vocabulary = {"<|im_end|>": 0} | {token: place + 1 for token, place in vocabulary.items()}
    backend = byte_tokenizer().backend_tokenizer
    if layout == "colliding":  # the vocabulary is exchanged for a larger one below tokens that keep their ids
        backend.model = models.BPE(vocabulary, PAIRS)
        return backend
    values = json.loads(backend.to_str())
    values["model"] |= {"vocab": vocabulary, "merges": [list(pair) for pair in PAIRS]}
    return Tokenizer.from_str(json.dumps(values))


BACKENDS = {layout: backend_of(layout) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_are_those_of_the_tokens_or_none(layout: str) -> None:
    """Each token's length in bytes stands at its id, whatever ids there are; an ambiguous id rules lengths out."""
    backend = BACKENDS[layout]
    lengths = byte_lengths(backend)
    whole: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    own = {token: index for token, index in whole.items() if not token.startswith("<|")}
    added = {token: index for token, index in whole.items() if token.startswith("<|")}
    ambiguous = any(
        index == other and len(token) != len(name) for token, index in own.items() for name, other in added.items()
    )
    assert ambiguous == (lengths is None)
    assert ambiguous == (layout in ("gaps", "colliding"))
    if lengths is not None:
        assert max(whole.values()) + 1 == len(lengths)
        assert [len(token) for token in own] == lengths[list(own.values())].tolist()
        assert [len(token) for token in added] == lengths[list(added.values())].tolist()
        assert sum(len(token) for token in whole) == lengths.sum()


def test_an_added_token_that_is_also_a_letter_rules_lengths_out() -> None:
    """The letter for a byte and the added token of the same text share an id but not a length."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["\u00e9"])
    assert ALPHABET.index("\u00e9") == tokenizer.convert_tokens_to_ids("\u00e9")
    assert byte_lengths(tokenizer.backend_tokenizer) is None


def test_an_added_token_that_only_stands_in_the_vocabulary_keeps_its_length() -> None:
    """Text that no sequence of byte letters spells belongs to the added token alone."""
    values = json.loads(byte_tokenizer(extra=["<\uff5cend\uff5c>"]).backend_tokenizer.to_str())
    values["model"]["vocab"]["<\uff5cend\uff5c>"] = 256
    backend = Tokenizer.from_str(json.dumps(values))
    lengths = byte_lengths(backend)
    assert lengths is not None
    assert len("<\uff5cend\uff5c>".encode()) == lengths[256]


def row_tokenizers(layout: str) -> tuple[RowTokenizer, RowTokenizer]:
    """Return two tokenizers of rows: one uses lengths where it can, the other never does."""
    end_id = BACKENDS[layout].token_to_id("<|im_end|>")
    state = TokenizerState(BACKENDS[layout].to_str(), "", {}, ("<|im_end|>",), None, end_id, None, False, "")
    by_lengths, by_offsets = RowTokenizer(state, 1000), RowTokenizer(state, 1000)
    by_offsets._lengths = None  # pyright: ignore[reportPrivateUsage]
    return by_lengths, by_offsets


BOTH_WAYS = {layout: row_tokenizers(layout) for layout in LAYOUTS if layout != "colliding"}


@given(LETTERS, LETTERS, LETTERS, st.booleans(), st.sampled_from(sorted(BOTH_WAYS)))
@settings(max_examples=300)
def test_targets_from_lengths_of_tokens_equal_those_from_offsets(
    before: str, answer: str, after: str, closed: bool, layout: str
) -> None:
    """Whatever the layout of ids, a row has the tokens and targets that the character range of every token gives."""
    text = before + answer + after
    end = len(before + answer) if closed else len(text) + 1
    row = RowText(text, [(len(before), end)] if end > len(before) else [], closed)
    by_lengths, by_offsets = BOTH_WAYS[layout]
    (expected,), (actual,) = by_offsets.encode([row]), by_lengths.encode([row])
    assert expected.tolist() == actual.tolist()
