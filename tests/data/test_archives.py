"""Archives of one file: what else they hold is named, and what is not a whole archive of one file is refused."""

import struct
import zipfile
from pathlib import Path

import pytest
from containers import JSONL, TOKENIZER, put, refusal_of, zipped

from onward.data.files.archives import DIRECTORY_BYTES
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file


def misplaced(archive: bytes, size: int | None = None) -> bytes:
    """Return an archive whose end states a directory beyond its place, so that its file begins before the archive.

    Args:
        size: what the end states as the bytes of the directory, if not what they are.
    """
    end = archive.rfind(b"PK\x05\x06")
    size = struct.unpack_from("<L", archive, end + 12)[0] if size is None else size
    return archive[: end + 12] + struct.pack("<2L", size, end) + archive[end + 20 :]


@pytest.mark.parametrize(
    ("data", "reason", "remedy"),
    [
        (
            zipped(("a.jsonl", JSONL), ("b/c.csv", b"x")),
            "the archive contains 2 files (a.jsonl, b/c.csv)",
            "one by one",
        ),
        (
            zipped(("a.md", b"x")),
            "the archive contains no file that Onward reads (its files: a.md)",
            "unpack or convert",
        ),
        (zipped(), "the archive contains no file that Onward reads (its files: none)", "unpack or convert"),
        (zipped(("a.parquet", b"PAR1")), "the archive contains a.parquet", "unpack it, and add that file"),
        (zipped(("a.zip", b"PK")), "the archive contains a.zip", "unpack it, and add that file"),
        (zipped(("a.jsonl", JSONL), method=zipfile.ZIP_BZIP2), "the archive is compressed with bzip2", "unpack it"),
        (zipped(("a.jsonl", zipped(("b.jsonl", JSONL)))), "the archive contains another archive", "unpack it"),
        (b"PK\x03\x04" + b"a" * 50, "the zip archive cannot be read", "make or download it again"),
        (b"PK" + zipped(("a.jsonl", JSONL)), "the content is not zip, but the name says so", "give it the ending"),
        (misplaced(zipped(("a.jsonl", JSONL)), 1 << 30), "the zip archive cannot be read", "make or download it again"),
        (misplaced(zipped(("a.jsonl", JSONL))), "the zip archive cannot be read", "make or download it again"),
        (JSONL, "the content is not zip, but the name says so", "give it the ending of its content"),
    ],
)  # fmt: skip
def test_archives_that_are_not_read(tmp_path: Path, data: bytes, reason: str, remedy: str) -> None:
    """An archive of several files, of none, or of one that needs its own file is refused with what is in it."""
    refusal = refusal_of(put(tmp_path / "a.zip", data))
    assert refusal.reason.startswith(reason)
    assert remedy in refusal.remedy


def test_an_archive_of_many_files_is_refused(tmp_path: Path) -> None:
    """Its table of contents is not even read."""
    members = ((f"{number:0>200}.jsonl", b"") for number in range(DIRECTORY_BYTES // 200))
    refusal = refusal_of(put(tmp_path / "a.zip", zipped(*members)))
    assert "the archive contains many files" == refusal.reason
    assert "one by one" in refusal.remedy


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    """A member that needs a password is named as that."""
    data = bytearray(zipped(("a.jsonl", JSONL)))
    at = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[at + 8] |= 1
    assert "the archive is encrypted" == refusal_of(put(tmp_path / "a.zip", bytes(data))).reason


def test_a_damaged_archive_under_another_name_is_not_told_to_be_renamed(tmp_path: Path) -> None:
    """Renaming what cannot be read is no way out; and the file is still known by its hash."""
    path = put(tmp_path / "a.jsonl", b"PK\x03\x04aaaaaaa")
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), TOKENIZER)
    (problem,) = report.problems
    assert problem.reason.startswith("the zip archive cannot be read")
    assert "rename" not in problem.remedy
    several = put(tmp_path / "b.jsonl", zipped(("a.jsonl", JSONL), ("b.jsonl", JSONL)))
    assert refusal_of(several).remedy == "unpack it, and add its files one by one"


def test_units_of_an_archive_are_those_of_what_it_holds(tmp_path: Path) -> None:
    """A bad row of a file in an archive is named by its line or row in that file."""
    for member, data, unit in (("a.jsonl", JSONL + b"{}\n", "line"), ("a.json", b'[{"text": "a"}, {}]', "row")):
        path = put(tmp_path / "a.zip", zipped((member, data)))
        report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), TOKENIZER)
        assert (unit, 1) == (report.unit, report.problem_count)


def test_a_joined_archive_is_refused(tmp_path: Path) -> None:
    """Readers of zip see only the last of several archives, one after another."""
    path = put(tmp_path / "a.zip", zipped(("a.jsonl", JSONL)) + zipped(("b.jsonl", JSONL)))
    assert "something else precedes the archive, such as another one" == refusal_of(path).reason


def test_what_else_an_archive_holds_is_named(tmp_path: Path) -> None:
    """Files that are not read are not left out without a word, but for those that a system adds by itself."""
    others = [(name, b"x") for name in ("README.md", "b.xlsx", "__MACOSX/._a.jsonl", "d/.DS_Store")]
    path = put(tmp_path / "a.zip", zipped(("d/a.jsonl", JSONL), *others))
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), TOKENIZER)
    assert ["ignored files of the archive: README.md, b.xlsx"] == report.notes
    alone = put(tmp_path / "b.zip", zipped(("a.jsonl", JSONL), *others[2:]))
    assert [] == tokenize_file(alone, tmp_path / "more", sha256_file(alone), TOKENIZER).notes
