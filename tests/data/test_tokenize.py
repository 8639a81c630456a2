from pathlib import Path
from typing import Any

import pytest
from encoding import encode
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, chat_rows, write_jsonl
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from onward.config import Config
from onward.data.row_tokenizer import RowTokenizer, cache_key
from onward.data.row_types import Chat, Completion, RowError, Text, check_answer
from onward.data.rows.records import parse_record
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import Row, TokenizedFile
from onward.data.tokenizer import TokenizerState
from onward.digest import sha256_file
from onward.errors import ModelError

TOKENIZER = byte_tokenizer()
STATE = TokenizerState.of(TOKENIZER)
SHA = "cd" * 32
SMILE = "\U0001f600"  # four bytes, so four tokens of one character
ROLES = ("user", "assistant")


def decoded(tokenizer: Any, row: Row, *, only_targets: bool) -> str:
    """Return the text of a row, or of its targets."""
    return tokenizer.decode(row.ids[row.targets] if only_targets else row.ids)


@pytest.mark.parametrize(
    ("row", "text", "targets"),
    [
        (Completion("2+2=", "4"), "2+2=4<|im_end|>", "4<|im_end|>"),
        (Completion("", "yes"), "yes<|im_end|>", "es<|im_end|>"),
        (Completion("2+2=", "4<|im_end|>"), "2+2=4<|im_end|>", "4<|im_end|>"),
        (Text("abc"), "abc<|im_end|>", "bc<|im_end|>"),
        (Completion(SMILE, "\u00e9" + SMILE), f"{SMILE}\u00e9{SMILE}<|im_end|>", f"\u00e9{SMILE}<|im_end|>"),
        (
            Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
            "Hello<|im_end|>",
        ),
    ],
)
def test_targets_of_each_kind_of_row(row: Any, text: str, targets: str) -> None:
    """Targets are the completion or the text with one end token; the first token of a row never is one."""
    (encoded,) = encode(TOKENIZER, row)
    assert text == decoded(TOKENIZER, encoded, only_targets=False)
    assert targets == decoded(TOKENIZER, encoded, only_targets=True)


@pytest.mark.parametrize("tiled", [True, False])
def test_tokens_have_the_weights_of_their_answers(tmp_path: Path, tiled: bool) -> None:
    """Each target counts what its answer says, also in the pieces of a split text; a row of weight 1 says nothing."""
    tokenizer = byte_tokenizer()
    if not tiled:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    user, answers = (
        {"role": "user", "content": "Hi"},
        [{"role": "assistant", "content": word} for word in ("no", "yes")],
    )
    rows = [
        {"messages": [user, {**answers[0], "weight": 0.5}, user, answers[1]], "loss_weight": 3},
        {"messages": [user, answers[0]]},
        {"text": "One sentence. Another one. " * 3, "weight": 0.5},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    row_tokenizer = RowTokenizer(TokenizerState.of(tokenizer), 60, "auto")
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), row_tokenizer)
    assert ["weights of tokens in the loss, besides 1: 1.5, 3, 0.5"] == report.notes
    file = TokenizedFile.open(tmp_path / "tokens")
    chat, plain, *pieces = [file.row(index) for index in range(len(file))]
    assert chat.weights is not None
    said = list(zip(tokenizer.convert_ids_to_tokens(chat.ids[chat.targets]), chat.weights[chat.targets], strict=True))
    end = "<|im_end|>"
    assert [("n", 1.5), ("o", 1.5), (end, 1.5), ("y", 3.0), ("e", 3.0), ("s", 3.0), (end, 3.0)] == said
    assert plain.weights is None
    assert len(pieces) > 1
    for piece in pieces:
        assert piece.weights is not None
        assert {0.5} == set(piece.weights[piece.targets].tolist())


def test_added_special_tokens() -> None:
    """A tokenizer's own first token leads the row; its own end token is not doubled."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=list(ids.items())
    )
    completion, text, chat = encode(tokenizer, Completion("a", "b"), Text("ab"), parse_record(chat_rows(1)[0]))
    assert "<s>ab</s>" == decoded(tokenizer, completion, only_targets=False)
    assert "b</s>" == decoded(tokenizer, completion, only_targets=True)
    assert "ab</s>" == decoded(tokenizer, text, only_targets=True)
    assert "<s>" not in decoded(tokenizer, chat, only_targets=False)


def test_a_token_that_overlaps_the_answer_is_a_target() -> None:
    """Prompt and completion are tokenized as one text: the token that spans the border belongs to the answer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (row,) = encode(tokenizer, Completion("ca", "bc"))
    assert [2, 3, 2, 4] == row.ids.tolist()
    assert [False, True, True, True] == row.targets.tolist()


@pytest.mark.parametrize("both", [False, True])
def test_a_header_that_takes_white_space_of_the_answer_is_no_target(both: bool) -> None:
    """A token that takes the white space after it along (Phi-3's headers) is a target by its own text alone."""
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        eos_token="<|end|>",
    )
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(token, lstrip=both, rstrip=True, special=True)
                for token in ("<|user|>", "<|assistant|>", "<|end|>")
            ]
        }
    )
    messages = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "\n a\n"}]
    for answers in ([messages[1]], [messages[1], messages[0], {"role": "assistant", "content": "b"}]):
        (row,) = encode(tokenizer, parse_record({"messages": [messages[0], *answers]}))
        texts = ["".join(tokenizer.convert_ids_to_tokens([i])) for i in row.ids[row.targets].tolist()]
        assert 1 + len(answers) // 2 == texts.count("<|end|>")
        assert not {"<|user|>", "<|assistant|>"}.intersection(texts)
        assert "a" in texts


def test_white_space_trimmed_off_the_offsets_stays_a_target() -> None:
    """A tokenizer that trims white space off its offsets (GPT-2 does) loses no target for it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (row,) = encode(tokenizer, Completion("a \n", " b\n\n  c \n"))
    assert " b\n\n  c \n<|im_end|>" == decoded(tokenizer, row, only_targets=True)


SAID = st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=12)
"""What somebody may say; an answer also has to say something, without which intake refuses a row."""


def says_something(text: str) -> bool:
    """Return whether intake takes a text for an answer."""
    try:
        check_answer(text, "the answer")
    except RowError:
        return False
    return True


@given(st.lists(st.lists(st.tuples(SAID, SAID.filter(says_something)), min_size=1, max_size=3), max_size=6))
@settings(max_examples=60)
def test_targets_of_random_chats_decode_to_the_answers(chats: list[list[tuple[str, str]]]) -> None:
    """In a batch of random chats the targets of each decode to exactly its answers and their end tokens."""
    rows = [
        Chat([{"role": role, "content": text} for turn in chat for role, text in zip(ROLES, turn, strict=True)])
        for chat in chats
    ]
    for row, encoded in zip(rows, encode(TOKENIZER, *rows), strict=True):
        answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
        expected = "".join(answer + "<|im_end|>" for answer in answers)
        assert expected == decoded(TOKENIZER, encoded, only_targets=True)


def test_batches_equal_single_calls() -> None:
    """Rows come out the same alone and in a batch of mixed kinds."""
    rows = [
        Text("abc"),
        parse_record(chat_rows(1)[0]),
        Completion("a", "b"),
        Text("x" * 50),
        parse_record(chat_rows(2)[1]),
    ]
    for together, row in zip(encode(TOKENIZER, *rows), rows, strict=True):
        (alone,) = encode(TOKENIZER, row)
        assert alone.ids.tolist() == together.ids.tolist()
        assert alone.targets.tolist() == together.targets.tolist()


def test_truncation_left_switched_on_does_not_cut_rows() -> None:
    """Padding and truncation that someone used on the tokenizer have no effect on rows or fingerprint."""
    tokenizer = byte_tokenizer()
    tokenizer(["abc", "defgh"], truncation=True, max_length=2, padding="max_length")
    row_tokenizer = RowTokenizer(TokenizerState.of(tokenizer), 1000)
    (packed,) = row_tokenizer.encode([row_tokenizer.prepare(Text("abcdef"))])
    assert 7 == len(packed)
    assert STATE.fingerprint == row_tokenizer.state.fingerprint


def test_over_length() -> None:
    """A row that is too long is cut, dropped or refused; cut below its first target it is dropped too."""
    fits = [RowTokenizer(STATE, 10, policy) for policy in ("truncate", "drop", "reject")]
    text, late = (fits[0].encode([fits[0].prepare(row)])[0] for row in (Text("x" * 20), Completion("p" * 15, "c")))
    cut = fits[0].fit(text)
    assert cut.packed is not None
    assert (10, True) == (len(cut.packed), cut.truncated)
    assert fits[0].fit(late).packed is None
    assert fits[1].fit(text).packed is None
    with pytest.raises(RowError, match="the row has 21 tokens, more than max_length = 10"):
        fits[2].fit(text)
    assert all(len(fit.fit(text[:10]).packed) == 10 for fit in fits)  # type: ignore[arg-type]


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    """Without an end token no row could be closed: that is an error of the model."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        RowTokenizer(TokenizerState.of(tokenizer), 10)


def test_cache_keys() -> None:
    """All that changes tokens or targets changes the key; nothing else does."""
    config = Config(max_length=10, over_length="drop")
    others: list[dict[str, Any]] = [
        {"max_length": 11}, {"over_length": "reject"}, {"text": {"documents": "file"}}, {"columns": {"text": "body"}},
    ]  # fmt: skip
    changed = {cache_key(SHA, "f", Config.model_validate({**config.model_dump(), **other})) for other in others}
    keys = changed | {cache_key(SHA, "f", config), cache_key(SHA, "g", config), cache_key("0", "f", config)}
    assert 7 == len(keys)
    assert cache_key(SHA, "f", config) == cache_key(SHA, "f", config.model_copy(update={"seed": 7, "learning_rate": 1}))
