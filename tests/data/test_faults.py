"""Files with arbitrary content: each is tokenized or refused, and nothing is raised."""

import datetime
import decimal
import errno
import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_state, chat_rows

from onward.data.files.columnar.parquet_footer import StatedGroup, stated_groups
from onward.data.files.containers import SourceFile, check_readable
from onward.data.files.faults import FileError, SourceChanged
from onward.data.files.limits import DEFAULT_LIMITS, Limits
from onward.data.files.reading import Reading
from onward.data.files.sources import read_rows
from onward.data.report import IntakeReport, Problem
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
ROW_TOKENIZER = RowTokenizer(byte_state(), 200)
CHATS = chat_rows(6)
LINES = "".join(json.dumps(row) + "\n" for row in CHATS).encode()


def as_parquet(rows: list[Any] | Any, **options: Any) -> bytes:
    """Return rows, or a table, as the bytes of a Parquet file."""
    stream = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows) if isinstance(rows, list) else rows
    parquet.write_table(table, stream, **options)
    return stream.getvalue()


VALID = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "a.json": json.dumps(CHATS).encode(),
    "b.json": LINES,
    "a.txt": b"one\n\ntwo\xc3\xa9\n",
    "a.parquet": as_parquet(CHATS),
    "b.parquet": as_parquet(CHATS, compression="none", use_dictionary=False),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.json.zst": zstandard.compress(LINES),
    "a.txt.zst": zstandard.compress(b"one\ntwo\n"),
}


def intake(path: Path, limits: Limits = DEFAULT_LIMITS, **options: Any) -> IntakeReport:
    """Tokenize a file into a directory alongside it, which is removed again."""
    target = path.with_name("tokens")
    report = tokenize_file(path, target, sha256_file(path), ROW_TOKENIZER, reading=Reading(limits), **options)
    assert report.ok == target.exists()
    if report.ok:
        shutil.rmtree(target)
    return report


def put(directory: Path, name: str, data: bytes) -> Path:
    """Write a file and return its path."""
    path = directory / name
    path.write_bytes(data)
    return path


def assert_settled(report: IntakeReport) -> None:
    """Check a report against the two possible outcomes: tokens, or problems with a reason and a remedy."""
    assert report.ok == (report.problem_count == 0)
    assert report.ok or all(problem.reason and problem.remedy for problem in report.problems)
    assert report.ok or report.problems


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "double"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    """Return `data` after each of the mutations."""
    for kind, part, other in mutations:
        place = int(part * max(len(data) - 1, 0))
        if kind == "flip":
            data = data[:place] + other + data[place + len(other) :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + other * 3 + data[place:]
        else:
            data = data[:place] + data[place // 2 :]
    return data


@pytest.mark.parametrize("name", VALID)
def test_mutated_files_are_tokenized_or_refused(tmp_path: Path, name: str) -> None:
    """Bytes flipped, cut, inserted or doubled in a valid file of each format never raise."""
    assert intake(put(tmp_path, name, VALID[name])).ok

    @given(MUTATIONS)
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def check(mutations: list[tuple[str, float, bytes]]) -> None:
        assert_settled(intake(put(tmp_path, name, mutated(VALID[name], mutations))))

    check()


@pytest.mark.parametrize("name", VALID)
def test_arbitrary_bytes_are_tokenized_or_refused(tmp_path: Path, name: str) -> None:
    """Whatever stands under an ending, compressed as the ending says or not, never raises."""
    pack: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}

    @given(st.one_of(st.binary(max_size=300), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))))
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    def check(data: bytes) -> None:
        assert_settled(intake(put(tmp_path, name, data)))
        assert_settled(intake(put(tmp_path, name, pack.get(name.rpartition(".")[2], bytes)(data))))

    check()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_integer_of_five_thousand_digits(tmp_path: Path, name: str) -> None:
    """A number that Python does not convert is a problem of its row."""
    data = b'{"text": "a"}\n{"text": ' + b"7" * 5000 + b"}\n"
    (problem,) = intake(put(tmp_path, name, data)).problems
    assert (2, "write the number as a string") == (problem.line, problem.remedy)
    assert problem.reason.startswith("not usable JSON: a number has more digits")


def odd_columns() -> dict[str, Any]:
    """Return columns of values that JSON does not know, or that Python cannot hold."""
    twice = pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["x", "x"])
    return {
        "nanoseconds": pyarrow.array([1], pyarrow.timestamp("ns")),
        "date": pyarrow.array([datetime.date(2026, 1, 2)]),
        "decimal": pyarrow.array([decimal.Decimal("1.50")]),
        "bytes": pyarrow.array([b"\xff"]),
        "twice": twice,
        "broken": pyarrow.array([b"\xff\xfe"]).view(pyarrow.string()),
    }


@pytest.mark.parametrize("name", odd_columns())
def test_odd_columns_of_parquet_matter_only_where_they_are_asked_for(tmp_path: Path, name: str) -> None:
    """A date, a decimal, binary data or broken text is a problem as `text`, and none under an unknown key."""
    column = odd_columns()[name]
    extra = pyarrow.Table.from_arrays([pyarrow.array(["words"]), column], names=["text", "extra"])
    assert intake(put(tmp_path, "a.parquet", as_parquet(extra))).ok
    asked = pyarrow.Table.from_arrays([column], names=["text"])
    (problem,) = intake(put(tmp_path, "b.parquet", as_parquet(asked))).problems
    assert (1, 'write "text" as a string') == (problem.line, problem.remedy)
    assert problem.reason.startswith('"text" is ')


def test_values_that_json_does_not_know_inside_a_chat(tmp_path: Path) -> None:
    """What a template would print is text, a number, a list or an object; a date among it is a problem of the row."""
    day = datetime.date(2026, 1, 2)
    answer = {"role": "assistant", "content": "b", "tool_calls": [{"since": day}]}
    rows = [{"messages": [{"role": "user", "content": "a", "tool_calls": None}, answer]}]
    (problem,) = intake(put(tmp_path, "a.parquet", as_parquet(rows))).problems
    expected = Problem(1, "message 2 holds a date, which JSON does not know", "write it as a string")
    assert expected == problem


@pytest.mark.parametrize("name", ["text", "element"])
def test_a_parquet_footer_that_contradicts_itself_ends_no_process(tmp_path: Path, name: str) -> None:
    """A column that was made required behind its statistics' back is refused; pyarrow's own classes would abort."""
    optional = b"\x25\x02\x18" + bytes([len(name)]) + name.encode()
    data = as_parquet(pyarrow.table({"text": ["a", None, "b"], "list": [["x"], ["y"], None]}))
    assert 1 == data.count(optional)
    damaged = data.replace(optional, b"\x25\x00" + optional[2:])
    (problem,) = intake(put(tmp_path, "a.parquet", damaged)).problems
    assert problem.reason.startswith("not a readable parquet file (OSError: Definition level histogram size mismatch")
    assert "write or download it again" == problem.remedy


def test_a_page_is_held_against_its_checksum(tmp_path: Path) -> None:
    """Where a Parquet file has checksums of its pages, a letter that was changed in one refuses it."""
    rows = [{"text": f"row {number}"} for number in range(20)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    data = as_parquet(rows, **options)
    assert intake(put(tmp_path, "a.parquet", data)).ok
    (problem,) = intake(put(tmp_path, "b.parquet", data.replace(b"row 13", b"cow 13"))).problems
    assert "CRC checksum verification failed" in problem.reason


@pytest.mark.parametrize(
    "options",
    [{}, {"row_group_size": 2}, {"write_statistics": False}, {"data_page_version": "2.0", "write_page_index": True}],
    ids=str,
)
def test_what_a_parquet_footer_states(tmp_path: Path, options: dict[str, Any]) -> None:
    """Rows, values and sizes of every column and row group are those that pyarrow reads."""
    columns = {
        "chats": CHATS, "list": [[1, 2], [], None] * 2, "truth": [True, None] * 3, "bytes": [b"1", b"22", None] * 2,
    }  # fmt: skip
    path = put(tmp_path, "a.parquet", as_parquet(pyarrow.table(columns), **options))
    meta = parquet.read_metadata(path)
    groups = [meta.row_group(place) for place in range(meta.num_row_groups)]
    expected = [
        StatedGroup(
            group.num_rows,
            tuple(
                (column.num_values, column.total_uncompressed_size)
                for column in map(group.column, range(meta.num_columns))
            ),
        )
        for group in groups
    ]
    with path.open("rb") as file:
        assert expected == stated_groups(file)


@pytest.mark.parametrize("error", [ValueError("stop"), OSError("stop"), FileError("a", "b"), EOFError()], ids=repr)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.json.zst", "a.jsonl.gz"])
def test_whatever_a_stop_raises_is_raised(tmp_path: Path, name: str, error: Exception) -> None:
    """A request to stop passes through every reader, whatever class it has, and nothing is left behind."""
    path = put(tmp_path, name, VALID[name] if name in VALID else gzip.compress(LINES))
    for calls in (1, 3):
        left = iter(range(calls))

        def stop(left: Any = left) -> None:
            if next(left, None) is None:
                raise error

        with pytest.raises(type(error)):
            tokenize_file(path, tmp_path / "tokens", sha256_file(path), ROW_TOKENIZER, stop=stop)
        assert [path] == list(tmp_path.iterdir())


def test_a_file_that_no_descriptor_is_left_for_is_not_refused(tmp_path: Path) -> None:
    """Without a free descriptor the error of the machine is raised: the caller waits and tries again."""
    import resource

    path = put(tmp_path, "a.jsonl", LINES)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(path, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as raised:
            SourceFile(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert errno.EMFILE == raised.value.errno


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet", "a.jsonl.gz", "a.json.zst"])
def test_a_writer_with_an_open_descriptor_changes_nothing_unseen(tmp_path: Path, name: str) -> None:
    """A byte that is written while the file is read is noticed, and nothing is published."""
    path = put(tmp_path, name, VALID[name])
    sha256 = sha256_file(path)
    with path.open("r+b") as writer:
        with pytest.raises(SourceChanged, match="the file changed after it was accepted"):
            tokenize_file(path, tmp_path / "tokens", sha256, ROW_TOKENIZER, stop=append_once(writer))
        assert [path] == list(tmp_path.iterdir())


def append_once(writer: Any) -> Callable[[], None]:
    """Return a `stop` that appends a byte to a file at its first call."""
    calls: list[int] = []

    def stop() -> None:
        if not calls:
            calls.append(1)
            writer.seek(0, os.SEEK_END)
            writer.write(b"\n")
            writer.flush()

    return stop


def test_a_hash_of_other_content_publishes_nothing(tmp_path: Path) -> None:
    """Another file in the place of the one that was hashed is noticed, however sound it is."""
    path = put(tmp_path, "a.jsonl", LINES)
    sha256 = sha256_file(path)
    put(tmp_path, "a.jsonl", LINES.replace(b"the", b"teh"))
    with pytest.raises(SourceChanged):
        tokenize_file(path, tmp_path / "tokens", sha256, ROW_TOKENIZER)
    assert [path] == list(tmp_path.iterdir())


def test_a_compressed_copy_is_known_by_what_it_unpacks_to(tmp_path: Path) -> None:
    """The archive compresses originals: the hash of the plain file holds for its compressed copy."""
    plain, packed = put(tmp_path, "a.jsonl", LINES), put(tmp_path, "a.jsonl.zst", zstandard.compress(LINES))
    assert tokenize_file(packed, tmp_path / "tokens", sha256_file(plain), ROW_TOKENIZER).ok


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """A link that took the place of a file is refused, even where it names the same content."""
    (tmp_path / "elsewhere").mkdir()
    real = put(tmp_path / "elsewhere", "a.jsonl", LINES)
    (tmp_path / "a.jsonl").symlink_to(real)
    (problem,) = intake(tmp_path / "a.jsonl").problems
    assert Problem(None, "is a symbolic link", "give the file that it names") == problem


def test_hints_quote_names(tmp_path: Path) -> None:
    """A name with quotes and escape sequences can be printed, and the command with it can be pasted."""
    path = put(tmp_path, "x';touch pwned;'\x1b[2J.jsonl", "ab".encode("utf-16"))
    with pytest.raises(FileError) as refusal:
        list(read_rows(path))
    assert "iconv -f UTF-16 -t UTF-8 $'x\\';touch pwned;\\'\\033[2J.jsonl' > new-file" in refusal.value.remedy
    check_readable(path)
    with pytest.raises(FileError) as refusal:
        list(read_rows(tmp_path / "\x1b.csv"))
    assert refusal.value.reason.isprintable()
