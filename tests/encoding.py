"""Rows as a tokenizer encodes them."""

from typing import Any

from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenized import Row, unpack
from onward.data.tokenizer import TokenizerState


def encode(tokenizer: Any, *rows: Any) -> list[Row]:
    """Return the rows as the tokenizer encodes them."""
    row_tokenizer = RowTokenizer(TokenizerState.of(tokenizer), 1000)
    return [unpack(packed) for packed in row_tokenizer.encode([row_tokenizer.prepare(row) for row in rows])]
