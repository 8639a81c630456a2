"""Long texts: split at sentences or white space into rows that fit, of which nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, chat_rows, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from onward.data.row_tokenizer import RowTokenizer
from onward.data.row_types import Completion, Text
from onward.data.rows.records import parse_record
from onward.data.splitting import INSIDE, cuts, places_of_bytes, places_of_ranges
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import TARGET_BIT, PackedRow, TokenizedFile
from onward.data.tokenizer import TokenizerState
from onward.digest import sha256_file

PROSE = (
    "The tide went out before dawn. Nobody saw it go! \u201cWas it early?\u201d she asked; he did not know.\n\n"
    "By noon the boats lay on their sides, e.g. the small blue one. "
    "\u6f6e\u6c34\u9000\u4e86\u3002\u5b83\u56de\u6765\u4e86\u3002 \U0001f600 "
)  # fmt: skip


def merged(*, normal: bool = False, begin: bool = False) -> Any:
    """Return a byte-level tokenizer with merges; with a normalizer they do not tile; `begin` adds a first token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC() if normal else None
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([PROSE] * 3, trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def words() -> Any:
    """Return a tokenizer of whole words that drops white space, as BERT's does, with a token before and after."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[CLS]", "[SEP]", "</s>"]
    backend.train_from_iterator([PROSE], trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "tiles": merged,
    "normalized": lambda: merged(normal=True),
    "begins": lambda: merged(normal=True, begin=True),
    "words": words,
}
LOADED: dict[str, TokenizerState] = {}


def row_tokenizer(name: str, max_length: int) -> RowTokenizer:
    """Return one that splits texts."""
    if name not in LOADED:
        LOADED[name] = TokenizerState.of(TOKENIZERS[name]())
    return RowTokenizer(LOADED[name], max_length, "auto")


def split(tokenizer: RowTokenizer, record: Any) -> tuple[PackedRow, list[PackedRow]]:
    """Return the tokens of a row and of the rows that it becomes."""
    row = tokenizer.prepare(record)
    encodings = tokenizer.tokenize([row])
    (packed,) = tokenizer.pack([row], encodings)
    pieces = tokenizer.split(row, packed, encodings[0])
    assert all(np.array_equal(*pair) for pair in zip(pieces, tokenizer.split(row, packed), strict=True))
    return packed, pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.text(st.sampled_from("ab. \n\u00e9\u3002\U0001f600?\u201d"), max_size=120), st.integers(8, 40))
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost(name: str, text: str, max_length: int) -> None:
    """Laid end to end the pieces are the row, and every token is a target once but for the first of a piece."""
    tokenizer = row_tokenizer(name, max_length)
    packed, pieces = split(tokenizer, Text(f"x{text}"))
    begin = {"begins": 1, "words": 1}.get(name, 0)
    assert all(2 + begin <= len(piece) <= max_length for piece in pieces)
    joined = np.concatenate([pieces[0], *(piece[begin:] for piece in pieces[1:])])
    assert np.array_equal(packed & ~TARGET_BIT, joined & ~TARGET_BIT)
    for piece in pieces:
        assert np.array_equal(piece[:begin], packed[:begin])
        assert piece[0] < TARGET_BIT
    kept = np.concatenate([piece[1:] for piece in pieces])
    assert len(kept) == np.count_nonzero(kept >= TARGET_BIT)


@pytest.mark.parametrize("name", ["bytes", "tiles", "normalized", "begins"])
def test_pieces_are_text_of_their_own(name: str) -> None:
    """Each piece decodes to its part of the text: no character is torn, and most pieces end with a sentence."""
    text = PROSE * 20
    tokenizer = row_tokenizer(name, 120)
    _, pieces = split(tokenizer, Text(text))
    backend: Any = tokenizer.state.tokenizer
    parts = [backend.decode((piece & ~TARGET_BIT).tolist(), skip_special_tokens=True) for piece in pieces]
    assert text == "".join(parts)
    assert not any("\ufffd" in part for part in parts)
    ends = [part.rstrip().endswith((".", "!", "\u201d", "\u3002")) for part in parts[:-1]]
    assert all(ends), [part for part, is_end in zip(parts, ends, strict=False) if not is_end]


@pytest.mark.parametrize(
    ("text", "room", "expected"),
    [
        ("One. Two. Six.", 6, ["One. ", "Two. ", "Six."]),
        ("one two six", 6, ["one ", "two ", "six"]),
        ("abcdefghijkl", 5, ["abcde", "fghij", "kl"]),
        ('He said "no." Then', 15, ['He said "no." ', "Then"]),
        ("first\nsecond\nthird", 9, ["first\n", "second\n", "third"]),
        ("Mr.Smith went off", 12, ["Mr.Smith ", "went off"]),
        ("\u4e00\u4e8c\u3002\u4e09\u56db\u3002\u4e94", 5, ["\u4e00\u4e8c\u3002", "\u4e09\u56db\u3002\u4e94"]),
        ("a b", 9, ["a b"]),
    ],
)
def test_where_a_text_is_cut(text: str, room: int, expected: list[str]) -> None:
    """After the last sentence that ends in the second half of a piece, else at white space, else anywhere."""
    places = np.arange(len(text) + 1)
    found = cuts(text, np.append(places, len(text)), room)  # the last token is the end token
    assert expected == [text[start:end] for start, end in zip([0, *found], [*found, len(text)], strict=True)]


def test_places_inside_a_character_are_known() -> None:
    """A token that begins inside a character is no place to cut, whether bytes or ranges say where tokens stand."""
    sizes = np.array([1, 2, 2, 1, 1])
    places = places_of_bytes("a\U0001f600\u00e9", sizes)
    assert places is not None
    assert [0, 1, INSIDE, 2, INSIDE, 3] == places.tolist()
    assert places_of_bytes("ab", np.array([3])) is None
    ranges = np.array([(0, 1), (1, 2), (1, 2), (2, 3), (2, 3)])
    assert places.tolist() == places_of_ranges("a\U0001f600\u00e9", ranges).tolist()


def test_chats_and_completions_are_cut(tmp_path: Path) -> None:
    """Under `auto` only plain text is split; what chats and completions lose is counted in tokens."""
    tokenizer = row_tokenizer("bytes", 40)
    texts: list[Any] = [{"text": PROSE}, {"text": "short"}]
    others: list[Any] = [
        *chat_rows(3),
        {"prompt": "a" * 10, "completion": "b" * 50},
        {"prompt": "a" * 50, "completion": "b"},
    ]
    packed = [split(tokenizer, parse_record(row)) for row in others]
    assert all(1 == len(pieces) for _, pieces in packed)
    path = write_jsonl(tmp_path / "a.jsonl", [*others, *texts])
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), tokenizer)
    file = TokenizedFile.open(tmp_path / "tokens")
    whole = sum(len(row) for row, _ in packed) + len(PROSE.encode()) + len("short") + 2
    assert (True, 1, 1, 4) == (report.ok, report.split, report.truncated, report.dropped)
    assert whole == report.tokens + report.lost_tokens
    assert (report.split, report.lost_tokens) == (file.meta["split"], file.meta["lost_tokens"])
    assert len(PROSE.encode()) + len("short") + 2 == sum(
        len(file.row(index).ids) for index in range(file.rows) if file.line(index) > len(others)
    )


def test_a_text_under_truncate_is_cut_as_ever() -> None:
    """Where a run says so the end of a text is cut off, and a completion without a prompt is a text."""
    tokenizer = RowTokenizer(TokenizerState.of(byte_tokenizer()), 40, "truncate")
    assert 1 == len(split(tokenizer, Text(PROSE))[1])
    assert 1 < len(split(row_tokenizer("bytes", 40), Completion("", PROSE))[1])
