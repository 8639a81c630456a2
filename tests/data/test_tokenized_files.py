"""A file becomes rows on disk: counted, equal for equal files, whole or not there."""

import errno
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoding import encode
from tiny import byte_tokenizer, chat_rows, write_jsonl
from tokenizers import normalizers

from onward.atomic import TEMPORARY_PREFIX
from onward.config import Config
from onward.data.report import IntakeReport, Problem
from onward.data.row_tokenizer import OverLength, RowTokenizer
from onward.data.rows.records import parse_record
from onward.data.tokenize import tokenize_file
from onward.data.tokenized import TokenizedFile
from onward.data.tokenizer import TokenizerState
from onward.digest import sha256_file
from onward.errors import DamagedState, Unreadable
from onward.service.intake.rules import RunTokenizer

TOKENIZER = byte_tokenizer()
STATE = TokenizerState.of(TOKENIZER)
SHA = "cd" * 32


def intake(path: Path, max_length: int = 1000, over_length: OverLength = "truncate") -> IntakeReport:
    """Tokenize a file into the directory `tokens` next to it."""
    sha256 = sha256_file(path) if path.is_file() else SHA
    return tokenize_file(path, path.parent / "tokens", sha256, RowTokenizer(STATE, max_length, over_length))


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
        if len(calls) == 600:
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


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
@pytest.mark.parametrize("place", ["pathlib.Path.read_bytes", "pathlib.Path.stat", "numpy.memmap"])
def test_what_cannot_be_read_is_not_damaged(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing disk, too many open files or no memory say nothing about the file, which must stay."""
    intake(write_jsonl(tmp_path / "a.jsonl", chat_rows(3)))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        with pytest.raises(Unreadable, match=os.strerror(number)):
            TokenizedFile.open(tmp_path / "tokens")
    assert 3 == TokenizedFile.open(tmp_path / "tokens").rows


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
