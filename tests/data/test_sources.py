import gzip
import json
import os
import stat
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from commands import assert_refused, onward
from ledgers import made_up_run

from onward.data.files import json_rows
from onward.data.files.faults import FileError
from onward.data.files.formats import file_format, unit_of
from onward.data.files.limits import Limits
from onward.data.files.lines import SourceRow
from onward.data.files.reading import Reading
from onward.data.files.sources import read_rows

ROWS = [{"text": "one"}, {"text": "zwei \U0001f600 \u00e9"}, {"text": "three\n"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def put(directory: Path, name: str, data: bytes) -> Path:
    """Write a file and return its path."""
    path = directory / name
    path.write_bytes(data)
    return path


def values(path: Path) -> list[Any]:
    """Return the values of all rows of a file."""
    return [row.value for row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.JSONL.GZ", "jsonl.gz"),
        ("x.ndjson.zst", "ndjson.zst"),
        ("x.json", "json"),
        ("x.txt", "txt"),
        ("x.parquet", "parquet"),
    ],
)
def test_formats(name: str, expected: str) -> None:
    """The ending says the format, in any case."""
    assert expected == file_format(name)


@pytest.mark.parametrize("name", ["a.xml", "a", "a.parquet.gz", ".gz", "a.gz", "jsonl"])
def test_unknown_endings(name: str) -> None:
    """Another ending is refused with the list of those accepted."""
    with pytest.raises(FileError) as refusal:
        file_format(name)
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("name", "unit"),
    [("a.jsonl", "line"), ("a.txt.gz", "line"), ("a.json", "row"), ("a.json.gz", "row"), ("a.parquet", "row")],
)
def test_units(name: str, unit: str) -> None:
    """Places are lines where the format has lines, and rows elsewhere."""
    assert unit == unit_of(file_format(name))


@pytest.mark.parametrize("ending", ["jsonl", "ndjson"])
def test_lines_and_compressions(tmp_path: Path, ending: str) -> None:
    """The same rows come out of the plain file, gzip and zstandard, in one frame or several."""
    half = len(JSONL) // 2
    packed = zstandard.compress(JSONL[:half]) + zstandard.compress(JSONL[half:])
    assert values(put(tmp_path, f"a.{ending}", JSONL)) == ROWS
    assert values(put(tmp_path, f"a.{ending}.gz", gzip.compress(JSONL))) == ROWS
    assert values(put(tmp_path, f"a.{ending}.zst", packed)) == ROWS


def test_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    """Blank lines are skipped but counted; a byte order mark and carriage returns do not matter."""
    path = put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert list(read_rows(path)) == [SourceRow(1, {"text": "a"}), SourceRow(4, {"text": "b"})]


def test_a_byte_order_mark_inside_a_file(tmp_path: Path) -> None:
    """Concatenated files have one at the start of a line: it is no part of JSON, and a character of a text."""
    mark = b"\xef\xbb\xbf"
    assert [{"text": "a"}] * 2 == values(
        put(tmp_path, "a.jsonl", mark + b'{"text": "a"}\n' + mark + b'{"text": "a"}\n')
    )
    assert [{"text": "a"}, {"text": "\ufeffa"}] == values(put(tmp_path, "a.txt", mark + b"a\n" + mark + b"a\n"))


def test_bad_lines_are_reported_and_reading_goes_on(tmp_path: Path) -> None:
    """Invalid JSON, invalid UTF-8, deep nesting and a cut last line are problems of their line only."""
    deep = b"[" * 100_000
    lines = [b'{"text": "a"}', b"{oops}", b'{"text": "\xff"}', deep, b'{"text": "b"}', b'{"text": "cu']
    rows = list(read_rows(put(tmp_path, "a.jsonl", b"\n".join(lines))))
    assert [1, 2, 3, 4, 5, 6] == [row.line for row in rows]
    assert [
        None,
        "not valid JSON: Expecting property name enclosed in double quotes at column 2",
        "byte 0xff is not UTF-8",
        "the JSON is nested too deeply",
        None,
        "not valid JSON: Unterminated string starting at at column 10",
    ] == [row.problem for row in rows]
    assert all(row.remedy for row in rows if row.problem)


def test_text_lines(tmp_path: Path) -> None:
    """Each line of a .txt that is not blank is a text row, without its line ending."""
    assert values(put(tmp_path, "a.txt", b" one\r\n\n{two}\n")) == [{"text": " one"}, {"text": "{two}"}]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(ROWS).encode(),
        b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=3, ensure_ascii=False).encode() + b"\n",
        JSONL,
        b"".join(json.dumps(row, indent=1).encode() for row in ROWS),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_json_arrays_and_sequences(tmp_path: Path, data: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .json file holds an array of rows or one object after another, however the reads happen to cut it."""
    monkeypatch.setattr(json_rows, "JSON_CHUNK", chunk)
    assert list(read_rows(put(tmp_path, "a.json", data))) == [
        SourceRow(number, row) for number, row in enumerate(ROWS, start=1)
    ]


def test_json_numbers_are_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that ends where a read ends is completed by the next read; half a surrogate pair stays visible."""
    monkeypatch.setattr(json_rows, "JSON_CHUNK", 3)
    data = b'[1234567, -1.5e10, true, null, "\\ud83d\\ude00", "\\ud800", {}]'
    assert values(put(tmp_path, "a.json", data)) == [1234567, -1.5e10, True, None, "\U0001f600", "\ud800", {}]
    assert values(put(tmp_path, "b.json", b" [ ] ")) == []
    assert values(put(tmp_path, "c.json", b"")) == []


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b'[{"a": 1}, {"a": 2', 2, "not valid JSON: Expecting ',' delimiter"),
        (b'[{"a": 1} {"a": 2}]', 2, "not valid JSON: expected , or ] after a row"),
        (b'[{"a": 1}', 2, "not valid JSON: the array has no end"),
        (b'[{"a": 1},]', 2, "not valid JSON: Expecting value"),
        (b"[{}] x", 2, "not valid JSON: text after the end of the array"),
        (b'{"a": 1}\n{"a":', 2, "not valid JSON: Expecting value"),
        (b'"text"', 1, "not valid JSON: expected [ or { at the beginning"),
        (b'[{"a": "\xff"}]', 1, "byte 0xff is not UTF-8"),
        (b'[{"a": 1}, {"a": 2}, {"\xe9": 3}]', 3, "byte 0xe9 is not UTF-8"),
        (b'{"a": 1}\n{"a": "\xc3', 2, "not valid JSON: Unterminated string starting at"),
        (b"[" * 200_000, 1, "the JSON is nested too deeply"),
        (b'[{"a" 1}' + b" " * 100_000, 1, "not valid JSON: Expecting ':' delimiter"),
    ],
)
def test_broken_json_files(tmp_path: Path, data: bytes, line: int, reason: str) -> None:
    """What breaks a .json file in the middle is an error of the file that names the row."""
    with pytest.raises(FileError) as refusal:
        values(put(tmp_path, "a.json", data))
    assert (line, reason) == (refusal.value.line, refusal.value.reason)


def test_parquet(tmp_path: Path) -> None:
    """Rows of a parquet file come out in order, across row groups; a damaged one is refused."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chats = [{"messages": [{"role": "user", "content": str(n)}], "text": None} for n in range(700)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(chats), path, row_group_size=300)
    rows = list(read_rows(path))
    assert chats == [row.value for row in rows]
    assert list(range(1, 701)) == [row.line for row in rows]
    data = path.read_bytes()
    for broken in (data[:-20], b"not parquet", b""):
        with pytest.raises(FileError, match="not a readable parquet file"):
            values(put(tmp_path, "b.parquet", broken))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL * 100)[:-30], "the compressed file is cut off"),
        ("a.jsonl.gz", gzip.compress(JSONL)[:-8] + b"12345678", "the compressed file is damaged"),
        ("a.jsonl.gz", JSONL, "the content is not gz, but the name says so"),
        ("a.jsonl", gzip.compress(JSONL), "the content is gz, but the name does not say so"),
        ("a.jsonl.zst", gzip.compress(JSONL), "the content is gz, but the name does not say so"),
        ("a.json", b"PAR1....", "the content is parquet, but the name does not say so"),
        ("a.jsonl.zst", zstandard.compress(os.urandom(5000).hex().encode())[:-30], "the compressed file is cut off"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 50, "the compressed file is damaged"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), "the text is UTF-16, not UTF-8"),
        ("a.txt", JSONL.decode().encode("utf-16-le"), "the text is UTF-16LE, not UTF-8"),
        ("a.json.gz", gzip.compress(JSONL.decode().encode("utf-16")), "the text is UTF-16, not UTF-8"),
    ],
)
def test_damaged_and_misnamed_files(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    """A container that is damaged, or not what the name says, is refused with the reason and a remedy."""
    with pytest.raises(FileError) as refusal:
        values(put(tmp_path, name, data))
    assert refusal.value.reason.startswith(reason)
    assert refusal.value.remedy


def test_what_is_no_file(tmp_path: Path) -> None:
    """A missing file, a directory, a fifo and a link are refused without waiting for anything."""
    (tmp_path / "d.jsonl").mkdir()
    os.mkfifo(tmp_path / "f.jsonl")
    (tmp_path / "l.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    expected = {
        "d.jsonl": "is a directory",
        "f.jsonl": "is a special file (fifo, socket or device)",
        "l.jsonl": "is a symbolic link",
        "m.jsonl": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(FileError) as refusal:
            list(read_rows(tmp_path / name))
        assert reason == refusal.value.reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    """A file without read permission is refused with the command that grants it."""
    path = put(tmp_path, "a.jsonl", JSONL)
    path.chmod(stat.S_IWUSR)
    with pytest.raises(FileError, match="no permission to read it"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_rows_without_end_are_refused(tmp_path: Path, name: str) -> None:
    """A row longer than the limit is an error that names the key, in memory that does not follow its length."""
    path = put(tmp_path, name, b'{"text": ' * (name != "a.txt") + b'"' + b"x" * (30 << 20))
    tracemalloc.start()
    with pytest.raises(FileError) as refusal:
        list(read_rows(path, Reading(Limits(row_bytes=1 << 20))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1 == refusal.value.line
    assert refusal.value.reason.endswith("is larger than 1 MiB")
    assert "split it into several rows, or raise max_row_mb" == refusal.value.remedy
    assert peak < 12 << 20


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """Reading ten times the rows takes no more memory."""
    peaks: list[int] = []
    for count in (2_000, 20_000):
        rows = [{"text": f"row {number} " + "x" * 100} for number in range(count)]
        lines = [row["text"] if name == "a.txt" else json.dumps(row) for row in rows]
        data = ("[" + ",".join(lines) + "]" if name == "a.json" else "\n".join(lines)).encode()
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
        path = put(tmp_path, name, pack(data))
        tracemalloc.start()
        assert count == sum(1 for _ in read_rows(path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + (1 << 19)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_without_pyarrow(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, a file that only pyarrow reads is refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FileError) as refusal:
        values(put(tmp_path, f"a.{form}", b"ARROW1\0\0" if form == "arrow" else b"PAR1"))
    assert f"reading .{form} needs pyarrow" == refusal.value.reason
    assert "pip install 'onward[parquet]'" == refusal.value.remedy


def test_a_figure_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, a Parquet file of the steps is refused before an earlier file of that name is touched."""
    run = made_up_run(tmp_path / "run", [("a.jsonl", 2)], float)
    earlier = put(tmp_path, "steps.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    refused = onward("metrics", "--parquet", "-o", earlier, "--run", run.root)
    assert_refused(refused, 2, "pip install 'onward[parquet]'")
    assert b"PAR1" == earlier.read_bytes()
