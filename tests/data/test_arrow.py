"""Arrow files: both formats, in memory that is bounded, and columns of every kind."""

import io
import struct
from pathlib import Path
from typing import Any

import pytest

from onward.data.files.columnar.arrow_ipc import messages_of
from onward.data.files.faults import FileError
from onward.data.files.limits import Limits
from onward.data.files.reading import Reading
from onward.data.files.sources import read_rows

pyarrow = pytest.importorskip("pyarrow")


def put(path: Path, batches: list[Any], **options: Any) -> Path:
    """Write batches as an Arrow stream."""
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, batches[0].schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    path.write_bytes(sink.getvalue())
    return path


def texts_of(path: Path, limits: Limits | None = None) -> list[Any]:
    """Return the texts of all rows."""
    return [row.value["text"] for row in read_rows(path, Reading(limits or Limits()))]


def refusal_of(path: Path, limits: Limits | None = None) -> FileError:
    """Return the refusal of a file."""
    with pytest.raises(FileError) as refusal:
        texts_of(path, limits)
    return refusal.value


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_texts_of_every_kind_of_column(tmp_path: Path, kind: str, compression: str | None) -> None:
    """Plain, large, viewed and dictionary-coded texts come out, with nulls, across batches."""
    made = {
        "string": pyarrow.string(), "large_string": pyarrow.large_string(), "string_view": pyarrow.string_view(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }  # fmt: skip
    texts = [None, "a", "b" * 500, "caf\u00e9", "a"]
    batch = pyarrow.record_batch({"text": pyarrow.array(texts, type=made[kind]), "n": list(range(5))})
    path = put(tmp_path / "a.arrow", [batch] * 3, compression=compression)
    assert texts * 3 == texts_of(path)
    assert 3 == refusal_of(path, Limits(row_bytes=500)).line


def test_a_value_that_many_rows_repeat_is_not_held_many_times(tmp_path: Path) -> None:
    """Of a dictionary that unpacks to very much, rows become values a few at a time, until the ratio refuses it."""
    import tracemalloc

    codes = pyarrow.array([0] * 200_000, type=pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array(["x" * 50_000]))
    path = put(tmp_path / "a.arrow", [pyarrow.record_batch({"text": column})], compression="zstd")
    assert "raise max_unpack_ratio" in refusal_of(path).remedy
    tracemalloc.start()
    rows = read_rows(path, Reading(Limits(ratio=1 << 40, unpacked_bytes=1 << 40)))
    assert 3_000 == sum(1 for _, _ in zip(range(3_000), rows, strict=False))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_batch_says_what_it_unpacks_to_before_it_is_unpacked(tmp_path: Path) -> None:
    """A batch beyond the memory of 32 rows, or of more rows than bytes can hold, is refused unread."""
    big = pyarrow.record_batch({"text": ["x" * 1000] * 200})
    path = put(tmp_path / "a.arrow", [big], compression="zstd")
    refusal = refusal_of(path, Limits(row_bytes=2000))
    assert "write it in smaller batches, or raise max_row_mb" == refusal.remedy
    data = bytearray(put(tmp_path / "b.arrow", [pyarrow.record_batch({"text": pyarrow.nulls(77)})]).read_bytes())
    at = data.index(struct.pack("<q", 77))
    data[at : at + 8] = struct.pack("<q", 1 << 50)
    (tmp_path / "b.arrow").write_bytes(data)
    assert "it unpacks to more than 65536 MiB" == refusal_of(tmp_path / "b.arrow").reason


def test_columns_that_are_refused(tmp_path: Path) -> None:
    """Two columns of one name, and types whose size cannot be told, are named."""
    twice = pyarrow.RecordBatch.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    assert "two columns are named text" == refusal_of(put(tmp_path / "a.arrow", [twice])).reason
    runs = pyarrow.RunEndEncodedArray.from_arrays([3], ["a"])
    encoded = pyarrow.record_batch({"text": runs})
    assert refusal_of(put(tmp_path / "b.arrow", [encoded])).reason.startswith("the column text has the type run_end")


@pytest.mark.parametrize(
    "data", [b"", b"text", b"ARROW1\0\0", b"\xff\xff\xff\xff" + b"\x10\0\0\0" + bytes(9), b"\xff" * 99]
)
def test_what_is_no_arrow_file_is_refused(tmp_path: Path, data: bytes) -> None:
    """Arbitrary bytes are refused, with what to do."""
    path = tmp_path / "a.arrow"
    path.write_bytes(data)
    assert refusal_of(path).remedy


def test_messages_cover_a_file(tmp_path: Path) -> None:
    """A schema and its batches: what a stream holds up to its end, byte by byte."""
    path = put(tmp_path / "a.arrow", [pyarrow.record_batch({"text": ["a"]})] * 2)
    with path.open("rb") as file:
        messages = [(message.kind, message.start + message.metadata + message.body()) for message in messages_of(file)]
    assert [1, 3, 3] == [kind for kind, _ in messages]
    assert path.read_bytes() == b"".join(data for _, data in messages) + b"\xff\xff\xff\xff" + bytes(4)


def offsets(*values: int) -> bytes:
    """Return numbers as Arrow stores them."""
    return struct.pack(f"<{len(values)}i", *values)


DAMAGE: dict[str, tuple[Any, bytes, bytes]] = {
    "backwards": (["abc", "def", "ghi"], offsets(0, 3, 6, 9), offsets(0, -5, 6, 9)),
    "before": (["abc", "def", "ghi"], offsets(0, 3, 6, 9), offsets(-5, 3, 6, 9)),
    "beyond": (["abc", "def", "ghi"], offsets(0, 3, 6, 9), offsets(0, 3, 6, 60)),
    "list": ([["a", "b"], ["c"]], offsets(0, 2, 3), offsets(0, -2, 3)),
    "messages": ([[{"role": "user", "content": "abcdef"}]], offsets(0, 6), offsets(0, 60)),
}


@pytest.mark.parametrize("kind", [*DAMAGE, "code", "view"])
def test_what_points_out_of_a_batch_is_refused(tmp_path: Path, kind: str) -> None:
    """Offsets, codes and views that Arrow would follow into other memory, or to the end of the process."""
    if kind in DAMAGE:
        values, sound, damaged = DAMAGE[kind]
        column = pyarrow.array(values)
    elif kind == "code":
        column, sound, damaged = pyarrow.array(["a", "b", "c"]).dictionary_encode(), offsets(0, 1, 2), offsets(0, -1, 2)
    else:
        column = pyarrow.array(["a" * 40], pyarrow.string_view())
        sound, damaged = offsets(40) + b"aaaa" + offsets(0), offsets(40) + b"aaaa" + offsets(7)
    path = put(tmp_path / "a.arrow", [pyarrow.record_batch({"text": column})])
    before, found, after = path.read_bytes().rpartition(sound)
    assert found
    path.write_bytes(before + damaged + after)
    assert "write or download it again" == refusal_of(path).remedy


def test_a_text_that_is_not_utf_8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """The batch is sound, and its other rows are read."""
    path = put(tmp_path / "a.arrow", [pyarrow.record_batch({"text": ["good", "abcdefgh"]})])
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"\xff" * 8))
    first, second = texts_of(path)
    assert "good" == first
    assert "UnicodeDecodeError" in second.reason


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_rows_are_not_lost_where_a_file_is_cut_off_or_joined(tmp_path: Path, kind: str) -> None:
    """Arrow's reader takes bytes that are no message for the end of the rows, and reads the first of joined files."""
    sink, table = io.BytesIO(), pyarrow.table({"text": ["a", "b", "c"]})
    with getattr(pyarrow.ipc, f"new_{kind}")(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    data, path = sink.getvalue(), tmp_path / "a.arrow"
    end = data.rindex(b"\xff\xff\xff\xff\0\0\0\0")
    begin = data.rindex(b"\xff\xff\xff\xff", 0, end)  # of the last row
    path.write_bytes(data)
    assert ["a", "b", "c"] == texts_of(path)
    for size in range(begin + 1, end + (8 if kind == "file" else 0)):
        path.write_bytes(data[:size])
        assert "the arrow file is cut off" == refusal_of(path).reason
    path.write_bytes(data + data)
    assert "more follows after the last row, as where files were joined" == refusal_of(path).reason
    path.write_bytes(data[:end] + bytes(8) + data[end:])
    assert "not a readable arrow file" == refusal_of(path).reason
