import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, chat_rows, write_jsonl
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from onward.atomic import TEMPORARY_PREFIX
from onward.config import Config
from onward.data.report import IntakeReport, Problem
from onward.data.row_tokenizer import OverLength, RowTokenizer, cache_key
from onward.data.row_types import Chat, Completion, RowError, Text, check_answer
from onward.data.rows.records import parse_record
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import Row, TokenizedFile, unpack
from onward.data.tokenizer import TokenizerState
from onward.digest import sha256_file
from onward.errors import DamagedState, ModelError
from onward.service.intake.rules import RunTokenizer

TOKENIZER = byte_tokenizer()
STATE = TokenizerState.of(TOKENIZER)
SHA = "cd" * 32
SMILE = "\U0001f600"  # four bytes, so four tokens of one character
ROLES = ("user", "assistant")


def encode(tokenizer: Any, *rows: Any) -> list[Row]:
    """Return the rows as the tokenizer encodes them."""
    row_tokenizer = RowTokenizer(TokenizerState.of(tokenizer), 1000)
    return [unpack(packed) for packed in row_tokenizer.encode([row_tokenizer.prepare(row) for row in rows])]


def decoded(tokenizer: Any, row: Row, *, only_targets: bool) -> str:
    """Return the text of a row, or of its targets."""
    return tokenizer.decode(row.ids[row.targets] if only_targets else row.ids)


def intake(path: Path, max_length: int = 1000, over_length: OverLength = "truncate") -> IntakeReport:
    """Tokenize a file into the directory `tokens` next to it."""
    sha256 = sha256_file(path) if path.is_file() else SHA
    return tokenize_file(path, path.parent / "tokens", sha256, RowTokenizer(STATE, max_length, over_length))


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


def test_a_file_becomes_rows(tmp_path: Path) -> None:
    """Each row of the published form has the tokens, targets and source line that it should have."""
    rows: list[Any] = [*chat_rows(1500), {"text": "plain"}, {"prompt": "a", "completion": "b"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text("\n" + path.read_text())
    report = intake(path)
    file = TokenizedFile.open(tmp_path / "tokens")
    expected = encode(TOKENIZER, *map(parse_record, rows))
    assert report == IntakeReport(
        ok=True,
        rows=1502,
        tokens=sum(len(row.ids) for row in expected),
        target_tokens=sum(int(row.targets.sum()) for row in expected),
        longest=max(len(row.ids) for row in expected),
    )
    assert (1502, 1502) == (file.rows, len(file))
    assert sha256_file(path) == file.meta["source_sha256"]
    assert list(range(2, 1504)) == [file.line(index) for index in range(file.rows)]
    for index, row in enumerate(expected):
        found = file.row(index)
        assert np.array_equal(row.ids, found.ids)
        assert np.array_equal(row.targets, found.targets)
    assert (np.int64, np.bool_) == (file.row(0).ids.dtype, file.row(0).targets.dtype)
    for index in (-1, 1502):
        with pytest.raises(IndexError):
            file.row(index)


def test_bad_rows_publish_nothing(tmp_path: Path) -> None:
    """One bad row is enough: the report names the first twenty, counts all, and nothing is left on the disk."""
    bad = [{"text": ""}, *chat_rows(600), *({"id": number} for number in range(30))]
    path = write_jsonl(tmp_path / "a.jsonl", bad)
    report = intake(path)
    assert not report.ok
    assert 31 == report.problem_count
    assert [1, *range(602, 621)] == [problem.line for problem in report.problems]
    assert "text is empty" == report.problems[0].reason
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("tiled", [True, False])
def test_a_row_without_a_target_is_refused(tmp_path: Path, tiled: bool) -> None:
    """A text that is the end token alone, or of which the tokenizer leaves out every character, trains nothing: such a
    row would make the loss of a step of its own 0 / 0. The tokens of a file that was accepted before this was checked
    can be made again."""
    tokenizer = byte_tokenizer()
    if not tiled:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\x01", "")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("<|im_end|>", "a", "\x01", "\x01b")])
    state, sha256 = TokenizerState.of(tokenizer), sha256_file(path)
    report = tokenize_file(path, tmp_path / "t", sha256, RunTokenizer(state, Config(max_length=9), None))
    assert ([1] if tiled else [1, 3]) == [problem.line for problem in report.problems]
    assert "nothing of the row would be trained: the tokenizer makes 1 token of it" == report.problems[0].reason
    assert tokenize_file(path, tmp_path / "t", sha256, RowTokenizer(state, 9)).ok
    assert 4 == TokenizedFile.open(tmp_path / "t").rows


def test_counts_of_the_length_policy(tmp_path: Path) -> None:
    """Cut and dropped rows are counted; refused ones are problems; with nothing left the file is refused."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * length} for length in (5, 50, 60)])
    cut, dropped = intake(path, 20), None
    assert (True, 3, 2, 0, 20) == (cut.ok, cut.rows, cut.truncated, cut.dropped, cut.longest)
    (tmp_path / "tokens").rename(tmp_path / "cut")
    dropped = intake(path, 20, "drop")
    assert (True, 1, 0, 2, 6) == (dropped.ok, dropped.rows, dropped.truncated, dropped.dropped, dropped.longest)
    (tmp_path / "tokens").rename(tmp_path / "dropped")
    refused = intake(path, 20, "reject")
    assert (False, [2, 3]) == (refused.ok, [problem.line for problem in refused.problems])
    nothing = intake(path, 3, "drop")
    assert ["all 3 rows are longer than max_length = 3"] == [problem.reason for problem in nothing.problems]


def test_keys_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    """A report names the keys of rows and messages that nothing read, and says so of an accepted file in one clause."""
    messages = chat_rows(1)[0]["messages"]
    rows = [
        {"messages": messages, "id": 1},
        {"messages": [{**messages[0], "at": 5}, *messages[1:]], "id": 2, "url": ""},
    ]
    report = intake(write_jsonl(tmp_path / "a.jsonl", rows))
    assert ["ignored keys: id, url, messages.at"] == report.notes
    many = [{"text": "a", f"key{number:03d}": 1} for number in range(300)]
    (tmp_path / "b").mkdir()
    report = intake(write_jsonl(tmp_path / "b" / "a.jsonl", many))
    assert report.notes[0].endswith("key011 and 88 more")
    (tmp_path / "c").mkdir()
    assert [] == intake(write_jsonl(tmp_path / "c" / "a.jsonl", chat_rows(2))).notes


def test_files_without_rows_or_readable_content(tmp_path: Path) -> None:
    """An empty file, an unknown ending and a broken container are reported like bad rows."""
    expected = {
        "a.jsonl": (b"\n\n", "the file has no rows", "line"),
        "a.json": (b"[]", "the file has no rows", "row"),
        "b.json": (b'[{"text": "a"}', "not valid JSON: the array has no end", "row"),
        "a.xml": (b"", "the ending of a.xml is not one that Onward reads", "line"),
    }
    for name, (data, reason, unit) in expected.items():
        (tmp_path / name).write_bytes(data)
        report = intake(tmp_path / name)
        assert (False, 1, unit) == (report.ok, report.problem_count, report.unit)
        assert reason == report.problems[0].reason
    assert not (tmp_path / "tokens").exists()


def test_deeply_nested_values_are_a_problem_of_their_row(tmp_path: Path) -> None:
    """Nesting that the checks cannot follow is reported, not raised."""
    (line,) = write_jsonl(tmp_path / "a.jsonl", chat_rows(1)).read_text().splitlines()
    depth = 5000  # some Python versions parse this
    line = line.replace('"assistant"', '"assistant", "tool_calls": ' + "[" * depth + "]" * depth)
    (tmp_path / "a.jsonl").write_text(line)
    report = intake(tmp_path / "a.jsonl")
    assert [Problem(1, "the JSON is nested too deeply", "flatten the row")] == report.problems


@pytest.mark.parametrize("rows", [chat_rows(1200), [{"no": "format"}] * 1200])
def test_stopping_leaves_nothing_behind(tmp_path: Path, rows: list[Any]) -> None:
    """What `stop` raises ends the work, among good rows or bad ones, and what was written is removed."""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_file(path, tmp_path / "tokens", SHA, RowTokenizer(STATE, 100), stop=stop)
    assert [path] == list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    """The remains of an interrupted attempt do not get into the result; a published result is not overwritten."""
    left = tmp_path / f"{TEMPORARY_PREFIX}tokens"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"old")
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(3))
    assert intake(path).ok
    assert {"a.jsonl", "tokens"} == {entry.name for entry in tmp_path.iterdir()}
    assert 3 == TokenizedFile.open(tmp_path / "tokens").rows
    with pytest.raises(FileExistsError):
        intake(path)


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    """The same rows from another format and place give the same arrays, bit for bit."""
    rows = chat_rows(40)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text(json.dumps(rows))
    assert intake(write_jsonl(tmp_path / "a.jsonl", rows)).ok
    assert intake(tmp_path / "other" / "a.json").ok
    for name in ("tokens.bin", "offsets.bin", "lines.bin"):
        assert (tmp_path / "tokens" / name).read_bytes() == (tmp_path / "other" / "tokens" / name).read_bytes()


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "lines.bin", "meta.json"])
def test_damage_is_noticed(tmp_path: Path, name: str) -> None:
    """A flipped bit, a cut or a missing file is `DamagedState`; without `verify` a flipped bit passes."""
    intake(write_jsonl(tmp_path / "a.jsonl", chat_rows(10)))
    path = tmp_path / "tokens" / name
    data = path.read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    grown = data.replace(b'"longest": ', b'"longest": 1') if name == "meta.json" else data + b"\0"
    for damaged in (flipped, data[:-1], grown, b""):
        path.write_bytes(damaged)
        with pytest.raises(DamagedState):
            TokenizedFile.open(tmp_path / "tokens")
    if name != "meta.json":
        path.write_bytes(flipped)
        assert 10 == TokenizedFile.open(tmp_path / "tokens", verify=False).rows
    path.unlink()
    with pytest.raises(DamagedState):
        TokenizedFile.open(tmp_path / "tokens", verify=False)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of a row that is written, nothing stays: the peak grows by less than the smallest object for each further row.

    How many rows wait between the threads depends on which of them is ahead: about 0.6 MB, whatever the file's size.
    """
    few, many = 3_000, 63_000
    peaks: list[int] = []
    for count in (few, many):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [{"text": f"row {place}"} for place in range(count)])
        row_tokenizer = RowTokenizer(STATE, 200)
        tracemalloc.start()
        report = tokenize_file(path, tmp_path / str(count), sha256_file(path), row_tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == report.rows
    assert peaks[1] - peaks[0] < (many - few) * sys.getsizeof(1.0)
