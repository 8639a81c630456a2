"""Documents of a `.txt`: a line, a group of lines, or the file; detected, said, and the same from every container."""

import gzip
import shlex
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_state

from onward.data.files.containers import SourceFile
from onward.data.files.documents import SAMPLE, detected
from onward.data.files.faults import FileError
from onward.data.files.limits import Limits
from onward.data.files.reading import Documents, Reading
from onward.data.files.sources import read_rows, rows_of
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

PROSE = "The harbour was quiet that\nmorning, and nobody had\nbeen out since the storm.\n"
POEM = "Salt on the rail\nRust on the chain\n\nNobody sails\nThis way again\n"
VERSES = "First a short one.\nThen a second, longer one.\nAnd a third.\n"


def documents_of(path: Path, documents: Documents = "auto", **options: Any) -> list[tuple[int, str]]:
    """Return line and text of every document of a file."""
    rows = read_rows(path, Reading(documents=documents, **options))
    return [(row.line, row.value["text"]) for row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VERSES, "line"),
        ("\n\n".join(VERSES.splitlines()), "line"),
        ("", "line"),
        ("one\n", "line"),
        ("\n\n one\n\n\n", "line"),
        (PROSE, "file"),
        (PROSE * 3, "file"),
        ("def f(x):\n    y = x\n    return y\n", "file"),
        (PROSE + "\n" + PROSE, "blank"),
        (POEM, "blank"),
        ("Q: one?\nA: two.\n\nQ: three?\nA: four.\n", "blank"),
        (VERSES * 30 + "\n" + VERSES * 30, "line"),
        ("\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\n\u6211\u4eec\u51fa\u53bb\u3002\n", "line"),
    ],
)
def test_what_a_document_is_taken_for(text: str, expected: Documents) -> None:
    """Blank lines between groups of lines, lines that run on, and self-contained lines are distinguished."""
    assert expected == detected(text.splitlines())


def test_documents_of_each_kind(tmp_path: Path) -> None:
    """A line, a group and the file: each is named by its first line, and its inner lines end in a line feed."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + POEM.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    poem = POEM.splitlines()
    assert [(2, poem[0]), (3, poem[1]), (5, poem[3]), (6, poem[4])] == documents_of(path, "line")
    groups = [(2, "\n".join(poem[:2])), (5, "\n".join(poem[3:]))]
    assert groups == documents_of(path, "blank") == documents_of(path, "auto")
    assert [(2, POEM.rstrip("\n"))] == documents_of(path, "file")


@pytest.mark.parametrize("documents", ["line", "blank", "file"])
def test_a_bad_byte_is_named_by_its_line(tmp_path: Path, documents: Documents) -> None:
    """Not by the line with which the document begins, which may be any number of lines before."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\none\ntwo\n\nthr\xe9e\n")
    rows = list(read_rows(path, Reading(documents=documents)))
    assert [(5, "byte 0xe9 is not UTF-8")] == [(row.line, row.problem) for row in rows if row.problem]


@pytest.mark.parametrize("documents", ["line", "blank", "file"])
def test_zero_bytes_are_no_text(tmp_path: Path, documents: Documents) -> None:
    """They stand where a crash left a hole; the line is named, and they are not trained."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one " * 32 + b"\n\ntwo\n" + bytes(9) + b"hree\n")
    (bad,) = (row for row in read_rows(path, Reading(documents=documents)) if row.problem)
    assert (4, "it contains zero bytes, which are no text") == (bad.line, bad.problem)


@given(st.lists(st.text(st.sampled_from("ab \u00e9\t"), max_size=4), max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_text_is_lost(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    """Whatever the documents are, all lines with text are in them, once and in order."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n".join(lines))
    expected = [line for line in lines if line.strip()]
    for documents in ("line", "blank", "file", "auto"):
        found = [line for _, text in documents_of(path, documents) for line in text.split("\n") if line.strip()]
        assert expected == found


def test_what_was_taken_is_said_and_does_not_depend_on_the_container(tmp_path: Path) -> None:
    """A compressed copy of a long file is read as the plain one, and the note names the key."""
    text = ((PROSE + "\n") * 9_000).encode()
    assert len(text) > 2 * SAMPLE
    found: list[Any] = []
    for name, data in {"a.txt": text, "b.txt.zst": zstandard.compress(text), "c.txt.gz": gzip.compress(text)}.items():
        (tmp_path / name).write_bytes(data)
        with SourceFile(tmp_path / name) as source:
            rows = [(row.line, row.value["text"]) for row in rows_of(source, Reading(documents="auto"))]
            found.append((rows, source.notes))
    assert found[0] == found[1] == found[2]
    assert 9_000 == len(found[0][0])
    assert ["each group of lines between blank ones is a document (text.documents: blank)"] == found[0][1]


def test_a_document_beyond_the_limit_names_the_key(tmp_path: Path) -> None:
    """A file that is too large to be one document is refused with the settings that read it."""
    path = tmp_path / "a.txt"
    path.write_text(PROSE * 40)
    with pytest.raises(FileError) as refusal:
        documents_of(path, limits=Limits(row_bytes=1000))
    assert "set text.documents to blank or line, or raise max_row_mb" == refusal.value.remedy
    assert 120 == len(documents_of(path, "line", limits=Limits(row_bytes=1000)))


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.txt", '{"text": "a"}\n\n{"text": "b"}\n', 2),
        ("a.txt", '[{"role": "user"}]\n[{"role": "user"}]\n', 2),
        ("a.b.txt", '\ufeff{"messages": []}\n', 1),
        ("a.txt.gz", '{"text": "a"}\n', 1),
        ("a.txt", '[\n  {\n    "text": "a"\n  }\n]\n', 1),
        ("a.txt", '{\n"text": "a"}\n{"text":\n"b"}', 2),
        ("a.txt", '{"text": "' + "a" * SAMPLE + '"}\n{"text": "b"}\n', 2),
    ],
)
@pytest.mark.parametrize("documents", ["auto", "line"])
def test_json_in_a_txt_is_refused_and_read_once_renamed(
    tmp_path: Path, name: str, text: str, count: int, documents: Documents
) -> None:
    """The refusal of a .txt with JSON objects has the name under which it is read; an accepted one is still read."""
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with pytest.raises(FileError, match="is plain text") as refusal:
        documents_of(path, documents)
    (better,) = shlex.split(refusal.value.remedy.partition(";")[0].removeprefix("rename it to "))
    assert documents_of(path, documents, is_accepted=True)
    assert count == len(list(read_rows(path.rename(tmp_path / better))))


@pytest.mark.parametrize("text", ["{braces} are fine\n", '{"a": 1}\nand prose\n', "[1]\n", "{}: a set\n", '"a": b\n'])
def test_text_that_is_no_json_is_read(tmp_path: Path, text: str) -> None:
    """Braces and quotes in prose are text."""
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert text.splitlines() == [text for _, text in documents_of(path, "line")]


def test_a_note_reaches_the_report(tmp_path: Path) -> None:
    """The report of the file says what was detected."""
    path = tmp_path / "a.txt"
    path.write_text(POEM)
    tokenizer = RowTokenizer(byte_state(), 200)
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), tokenizer, reading=Reading(documents="auto"))
    assert (True, 2) == (report.ok, report.rows)
    assert ["each group of lines between blank ones is a document (text.documents: blank)"] == report.notes
