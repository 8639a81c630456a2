"""A tokenizer that closes a text with tokens of its own, as BERT's with `[SEP]` and XLNet's with two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import make_run, onward
from tokenizers import processors

from onward.data.row_tokenizer import RowTokenizer
from onward.data.row_types import Completion, Record, Text
from onward.data.tokenized import unpack
from onward.data.tokenizer import TokenizerState
from onward.store.ledger import Ledger
from onward.views.chat.prompts import Prompts

SEPARATOR, CLASS, END = "<sep>", "<cls>", "<|im_end|>"
LAYOUTS = ("$A <sep> <cls>", "<cls> $A <sep>", "<cls> $A <sep> <|im_end|>", "$A <|im_end|> <sep>")


def tokenizer_of(single: str) -> Any:
    """Return a tokenizer that lays a text out in a certain way."""
    tokenizer = tiny.byte_tokenizer(extra=[SEPARATOR, CLASS])
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (SEPARATOR, CLASS, END)]
    own = processors.TemplateProcessing(single=single, special_tokens=known)
    tokenizer.backend_tokenizer.post_processor = own
    return tokenizer


def trained(state: TokenizerState, record: Record, max_length: int = 100) -> list[tuple[str, str]]:
    """Return the tokens of the rows that a row becomes: before the first target, and from there on."""
    tokenizer = RowTokenizer(state, max_length, "auto")
    row = tokenizer.prepare(record)
    (packed,) = tokenizer.encode([row])
    found = [unpack(piece) for piece in tokenizer.split(row, packed)]
    assert all(piece.targets.tolist() == sorted(piece.targets.tolist()) for piece in found)
    return [
        tuple(
            "".join(map(str, map(state.tokenizer.id_to_token, piece.ids[piece.targets == is_target])))
            for is_target in (False, True)
        )
        for piece in found
    ]  # type: ignore[misc]


@pytest.mark.parametrize("single", LAYOUTS)
def test_all_that_closes_a_row_is_trained(single: str) -> None:
    """Of a text everything but its first token is a target, of a completion everything: the model learns all that it
    has to write before the token at which it stops.
    """
    state = TokenizerState.of(tokenizer_of(single))
    begin, _, closing = single.replace(" ", "").partition("$A")
    closing = f"{closing.removesuffix(END)}{END}"
    first, rest = (begin, "abc") if begin else ("a", "bc")
    assert [(first, f"{rest}{closing}")] == trained(state, Text("abc"))
    assert [(f"{begin}ab", f"c{closing}")] == trained(state, Completion("ab", "c"))
    prompt = Prompts(state).of_text("ab")
    assert f"{begin}ab" == "".join(map(str, map(state.tokenizer.id_to_token, prompt)))


def test_a_long_text_is_closed_once() -> None:
    """Its rows begin as any text does, and the last one alone has what closes it."""
    state = TokenizerState.of(tokenizer_of("<cls> $A <sep>"))
    rows = trained(state, Text("abcdefgh" * 5), max_length=24)
    assert {CLASS} == {before for before, _ in rows}
    assert f"{'abcdefgh' * 5}{SEPARATOR}{END}" == "".join(after for _, after in rows)
    assert all(len(after) <= 23 + len(SEPARATOR) + len(END) for _, after in rows)


@pytest.mark.parametrize("single", ["$A", "<cls> $A", "$A <|im_end|>", *LAYOUTS])
def test_only_such_tokenizers_have_another_key(single: str) -> None:
    """A tokenizer that closes a text with nothing or with the end token is known by its fingerprint alone."""
    state = TokenizerState.of(tokenizer_of(single))
    assert (single in LAYOUTS) is state.trains_closing is (state.key != state.fingerprint)


def test_a_run_of_an_earlier_release_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its targets stay what they were, in every later process; a new run trains what closes a text."""
    folder = tiny.save_tiny_model(tmp_path / "model", tokenizer=tokenizer_of("$A <sep>"))
    files = [tiny.write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"text {n}{m}"} for m in range(4)]) for n in range(3)]
    run = make_run(tmp_path / "run", folder)
    assert 0 == onward("train", files[0], "--run", run).status
    with Ledger(run / "ledger.sqlite3") as ledger:
        identity = ledger.get("identity")
        ledger.put(identity={key: value for key, value in identity.items() if key != "tokenizer_extras"})
    for file in files[1:]:
        assert 0 == onward("train", file, "--run", run).status
    with Ledger(run / "ledger.sqlite3", read_only=True) as ledger:
        counts = [(row.tokens, row.target_tokens) for row in ledger.files("done")]
    tokens = 4 * (len("text 00") + 2)
    assert [(tokens, tokens - 4), (tokens, tokens - 8), (tokens, tokens - 8)] == counts
