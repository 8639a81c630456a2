"""Texts that do not begin like UTF-8, or have another format than their name says: the refusal says what each is."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from onward.data.files.faults import FileError
from onward.data.files.sources import read_rows

ROWS: list[Any] = [{"text": "one"}, {"prompt": "two", "completion": "é"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def refused(path: Path, content: bytes) -> FileError:
    """Return the refusal of a file."""
    path.write_bytes(content)
    with pytest.raises(FileError) as found:
        list(read_rows(path))
    return found.value


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_encodings_are_named_with_a_command_that_works(encoding: str, tmp_path: Path) -> None:
    """With a byte order mark and without; typed as it stands, the remedy gives a file that is read."""
    refusal = refused(tmp_path / "a b.jsonl", LINES.encode(encoding))
    assert f"the text is {encoding[:6].upper()}" in refusal.reason
    command = refusal.remedy.partition(": ")[2].replace("new-file", "new.jsonl")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert ROWS == [row.value for row in read_rows(tmp_path / "new.jsonl")]


def test_lines_that_end_in_a_carriage_return(tmp_path: Path) -> None:
    """A reader of line feeds would take such a file for one line, and train a .txt as one document."""
    for name in ("rows.jsonl", "rows.txt", "rows.csv"):
        refusal = refused(tmp_path / name, b"question,answer\ra,b\r")
        assert "carriage return only" in refusal.reason
        command = refusal.remedy.partition(": ")[2].replace("new-file", f"new-{name}")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert b"question,answer\na,b\n" == (tmp_path / f"new-{name}").read_bytes()
    (tmp_path / "one.txt").write_bytes(b"a line\r\nanother\rof two\r\n")
    assert 2 == len(list(read_rows(tmp_path / "one.txt")))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "pointer of Git LFS"),
        (b"\n<!DOCTYPE html>\n<html>404</html>\n", "web page"),
        (b"text \x00 text\n", "zero bytes"),
        (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF document"),
        (rb"{\rtf1\ansi text}", "an RTF document"),
        (b"SQLite format 3\0" + bytes(84), "an SQLite database"),
        (b"rows.jsonl".ljust(257, b"\0") + b"ustar  \0" + bytes(247), "a tar archive"),
    ],
)
def test_what_is_no_data_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    """What a download or a clone left in the place of the data."""
    assert words in refused(tmp_path / "rows.jsonl", content).reason


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("value", [ROWS, ROWS[1]])
def test_a_json_text_over_lines_is_to_be_renamed(value: Any, indent: int | None, tmp_path: Path) -> None:
    """An array, or a row over several lines, is a .json; under that name it is read."""
    path, content = tmp_path / "my.rows.jsonl", json.dumps(value, indent=indent).encode()
    if isinstance(value, dict) and indent is None:
        path.write_bytes(content)
        assert [value] == [row.value for row in read_rows(path)]
        return
    remedy = refused(path, content).remedy
    assert "rename it to my.rows.json" == remedy
    renamed = path.rename(tmp_path / shlex.split(remedy)[-1])
    assert (value if isinstance(value, list) else [value]) == [row.value for row in read_rows(renamed)]


def test_a_json_text_in_an_archive(tmp_path: Path) -> None:
    """It is to be renamed there."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("rows.jsonl", json.dumps(ROWS))
    assert "give it the ending .json in the archive" == refused(tmp_path / "rows.zip", stream.getvalue()).remedy


def test_a_mark_in_the_middle_of_joined_files(tmp_path: Path) -> None:
    """Each of two files that were laid end to end has a byte order mark."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n" for row in ROWS))
    assert ROWS == [row.value for row in read_rows(path)]


@pytest.mark.parametrize(
    "text", ['{"text": "a", "text": "b"}', '{"text": "a", "more": [{"x": {"y" : 1, "z": 2, "y": 3}}]}']
)
def test_a_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    """A parser would keep the last value without a word; text that only looks like a key is none."""
    (tmp_path / "rows.jsonl").write_text(f'{text}\n{{"text": "\\"text\\": 1, \\"text\\": 2"}}\n')
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert re.fullmatch(r"the key '(text|y)' occurs twice in an object", str(first.problem))
    assert (None, {"text": '"text": 1, "text": 2'}) == (second.problem, second.value)
    assert "occurs twice" in refused(tmp_path / "rows.json", text.encode()).reason


def test_a_first_line_that_only_names_the_separator(tmp_path: Path) -> None:
    """Excel reads `sep=;` as such; as a header it would name one column."""
    assert "sep=" in refused(tmp_path / "rows.csv", b"sep=;\r\nquestion;answer\r\na;b\r\n").reason
