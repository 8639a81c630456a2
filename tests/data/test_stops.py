"""A stop that is asked for while a file is checked is noticed soon, whatever the file consists of."""

import bz2
import gzip
import json
import lzma
import struct
from pathlib import Path

import pytest
import zstandard
from tiny import byte_state
from trait_templates import template_text

from onward.data.files.containers import BUFFER
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SIZE = 4 * BUFFER
NOTHING = {
    "a.jsonl.gz": gzip.compress(b"", mtime=0),
    "a.jsonl.bz2": bz2.compress(b""),
    "a.jsonl.xz": lzma.compress(b""),
    "padded.jsonl.xz": bytes(32),
    "a.jsonl.zst": zstandard.compress(b""),
    "skipped.jsonl.zst": struct.pack("<II", 0x184D2A50, 8) + bytes(8),
}
"""Parts of packed files that unpack to nothing."""
WORDS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
CALLS = WORDS[0], {**WORDS[1], "tool_calls": [CALL]}, {"role": "tool", "content": "c"}, WORDS[1]
TURNS = 50


def looks(path: Path, template: str = "qwen3") -> int:
    """Return how often it was asked for a stop while a file was checked."""
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1

    tokenizer = RowTokenizer(byte_state(template_text(template)), 200)
    tokenize_file(path, path.with_name("tokens"), sha256_file(path), tokenizer, stop=stop)
    return count


@pytest.mark.parametrize("name", NOTHING)
def test_in_what_unpacks_to_nothing(name: str, tmp_path: Path) -> None:
    """Megabytes may unpack to no byte at all: it is asked for every buffer of the packed bytes."""
    path = tmp_path / name
    begin = lzma.compress(b"") if name.endswith("xz") else b""
    path.write_bytes(begin + NOTHING[name] * (SIZE // len(NOTHING[name]) + 1))
    assert SIZE // BUFFER <= looks(path)


def test_in_row_groups_without_rows(tmp_path: Path) -> None:
    """The footer of a Parquet file may list any number of them."""
    path, table = tmp_path / "a.parquet", pyarrow.table({"text": ["a"]})
    with parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(TURNS):
            writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert TURNS <= parquet.read_metadata(path).num_row_groups <= looks(path)


@pytest.mark.parametrize("template", ["qwen3", "qwen3_training"])
@pytest.mark.parametrize("turn", [WORDS, CALLS], ids=["words", "calls"])
def test_in_a_chat_of_many_turns(turn: tuple[dict[str, object], ...], template: str, tmp_path: Path) -> None:
    """One row may be a chat of thousands of turns, each of which is proven by rendering the chat up to it."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": list(turn) * TURNS}))
    assert TURNS <= looks(path, template)
