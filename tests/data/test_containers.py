"""Containers: the same rows come out of each; what is damaged, misnamed or grows too far is refused with a way out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shlex
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from containers import JSONL, ROWS, TOKENIZER, put, refusal_of, zipped

from onward.data.files.formats import PACKED
from onward.data.files.limits import Limits
from onward.data.files.sources import read_rows
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress,
}  # fmt: skip


def as_table(delimiter: str) -> bytes:
    """Return the rows as a table."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def as_arrow(*, stream: bool, compression: str | None = None) -> bytes:
    """Return the rows as an Arrow file or stream, in batches of 7."""
    pyarrow = pytest.importorskip("pyarrow")
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def as_parquet() -> bytes:
    """Return the rows as a Parquet file."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
"""A frame of zstandard without content, as pzstd writes one before each other."""
CONTAINERS: dict[str, Callable[[], bytes]] = {
    "a.ndjson": lambda: JSONL,
    "a.json": lambda: json.dumps(ROWS).encode(),
    "a.csv": lambda: as_table(","),
    "b.csv": lambda: b"\xef\xbb\xbf" + as_table(";"),
    "a.tsv": lambda: as_table("\t"),
    "a.tsv.xz": lambda: lzma.compress(as_table("\t")),
    "a.zip": lambda: zipped(("a.csv", as_table(","))),
    "b.zip": lambda: zipped(("d/", b""), ("d/a.jsonl", JSONL), ("README.md", b"x"), ("__MACOSX/d/._a.jsonl", b"x")),
    "c.zip": lambda: zipped(("a.json.gz", gzip.compress(json.dumps(ROWS).encode())), method=zipfile.ZIP_STORED),
    "a.parquet": as_parquet,
    "a.arrow": lambda: as_arrow(stream=True),
    "b.arrow": lambda: as_arrow(stream=False, compression="zstd"),
    "c.arrow": lambda: as_arrow(stream=False),
    "a.jsonl.zst": lambda: SKIPPED + zstandard.compress(JSONL[:999]) + SKIPPED + zstandard.compress(JSONL[999:]),
    "a.jsonl.xz": lambda: lzma.compress(JSONL[:999]) + bytes(8) + lzma.compress(JSONL[999:], preset=9) + bytes(4),
    "a.jsonl.bz2": lambda: bz2.compress(JSONL[:999]) + bz2.compress(JSONL[999:], 1),
}


def tokens_of(path: Path) -> list[bytes]:
    """Return the tokens of a file."""
    folder = path.with_name("tokens")
    report = tokenize_file(path, folder, sha256_file(path), TOKENIZER)
    assert report.ok, report.problems
    data = [(folder / name).read_bytes() for name in ("tokens.bin", "offsets.bin")]
    shutil.rmtree(folder)
    return data


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_rows_give_the_same_tokens(tmp_path: Path, name: str) -> None:
    """Whatever holds them: tokens and targets of rows do not depend on the container."""
    expected = tokens_of(put(tmp_path / "x.jsonl", JSONL))
    assert expected == tokens_of(put(tmp_path / name, CONTAINERS[name]()))


def test_what_may_unpack_to_any_size_is_known_by_its_name() -> None:
    """Between two steps a daemon reads small files of plain text only."""
    plain = ("a.ndjson", "a.json", "a.csv", "b.csv", "a.tsv")
    assert [name for name in CONTAINERS if name not in plain] == [name for name in CONTAINERS if name.endswith(PACKED)]


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("form", ["jsonl", "json", "txt", "csv"])
def test_every_text_format_may_be_compressed(tmp_path: Path, packing: str, form: str) -> None:
    """Each compression goes with each text format, and an archive may hold a compressed file."""
    data = {"jsonl": JSONL, "json": json.dumps(ROWS).encode(), "txt": b"one\ntwo\n", "csv": as_table(",")}[form]
    plain = [row.value for row in read_rows(put(tmp_path / f"a.{form}", data))]
    packed = put(tmp_path / f"a.{form}.{packing}", PACK[packing](data))
    archive = put(tmp_path / "a.zip", zipped((packed.name, packed.read_bytes())))
    assert plain == [row.value for row in read_rows(packed)] == [row.value for row in read_rows(archive)]


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.bz2", "a.zip", "a.arrow"])
def test_damage_is_refused(tmp_path: Path, name: str) -> None:
    """A file that is cut off, or has a changed byte in its middle, is refused and not trained in part."""
    data = CONTAINERS[name]() if name != "a.jsonl.bz2" else bz2.compress(JSONL)
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
    damaged = [data[: -len(data) // 3], data[:middle]] + ([flipped] if name != "a.arrow" else [])
    for content in damaged:
        path = put(tmp_path / name, content)
        report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), TOKENIZER)
        assert not report.ok
        assert report.problems[0].remedy


@pytest.mark.parametrize("ending", ["jsonl.xz", "jsonl.bz2", "zip", "txt.zip", "csv.xz", "arrow", "tsv.bz2"])
def test_what_unpacks_too_far_is_refused(tmp_path: Path, ending: str) -> None:
    """A small file that unpacks beyond the ratio, or the whole size, is refused with the key to raise."""
    data = b'{"text": "' + b"x" * 900 + b'"}\n'
    text = (b"text\n" if ending[:3] in ("csv", "tsv") else b"") + data * 20_000
    if ending == "arrow":
        pyarrow = pytest.importorskip("pyarrow")
        sink = io.BytesIO()
        batch = pyarrow.record_batch({"text": ["x" * 900] * 20_000})
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_stream(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        packed = sink.getvalue()
    else:
        member = "a.txt" if ending == "txt.zip" else "a.jsonl"
        text = b"word " * 4_000_000 if ending == "txt.zip" else text
        pack = {"xz": lambda data: lzma.compress(data, preset=0), "bz2": bz2.compress}.get(ending.rpartition(".")[2])
        packed = pack(text) if pack else zipped((member, text))
    path = put(tmp_path / f"a.{ending}", packed)
    assert "raise max_unpack_ratio" in refusal_of(path, Limits(row_bytes=1 << 30)).remedy
    limits = Limits(row_bytes=1 << 30, ratio=1 << 40, unpacked_bytes=1 << 20)
    assert "split the file, or raise max_unpacked_mb" == refusal_of(path, limits).remedy


def test_a_zst_file_may_not_ask_for_any_memory(tmp_path: Path) -> None:
    """One that was compressed with --long is not called damaged: another download would be the same."""
    text = b'{"text": "a"}\n'
    window = struct.pack("<B", (31 - 10) << 3)
    frame = b"\x28\xb5\x2f\xfd\0" + window + struct.pack("<I", len(text) << 3 | 1)[:3] + text
    problem = refusal_of(put(tmp_path / "a.jsonl.zst", frame))
    assert "unpacking it takes more memory than zstd does without --long" == problem.reason
    assert "zstd -d --long=31" in problem.remedy


def test_an_xz_file_may_not_ask_for_any_memory(tmp_path: Path) -> None:
    """A dictionary beyond what `xz -9` takes is refused before it is allocated."""
    filters = [
        {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 4}
    ]
    small = lzma.compress(JSONL, filters=[{**filters[0], "dict_size": 1 << 20}])
    path = put(tmp_path / "a.jsonl.xz", small)
    assert 50 == len(list(read_rows(path)))
    at = small.index(b"\x21\x01") + 2  # the size of the dictionary in the block header, whose checksum follows
    header_end = 12 + 4 * (small[12] + 1)
    header = bytearray(small[12 : header_end - 4])
    header[at - 12] = 36  # 1 GiB
    import zlib

    forged = small[:12] + bytes(header) + zlib.crc32(header).to_bytes(4, "little") + small[header_end:]
    refusal = refusal_of(put(path, forged))
    assert "unpacking it takes more memory than xz -9 does" == refusal.reason


MISNAMED = [
    *(f"a.jsonl of {packing}" for packing in PACK),
    *(f"a.{form}.{there} of {packing}" for form, there, packing in (("json", "gz", "xz"), ("jsonl", "zst", "bz2"))),
    "a.jsonl of a.zip", "a.csv of b.zip", "a.jsonl of a.parquet", "a.txt of b.arrow", "a.jsonl.gz of a.arrow",
    "a.parquet of a.zip", "a.zip of a.parquet", "a.arrow of a.parquet", "a.zip of gz",
]  # fmt: skip


@pytest.mark.parametrize("case", MISNAMED)
def test_a_misnamed_file_is_read_once_it_is_renamed_as_told(tmp_path: Path, case: str) -> None:
    """The content shows what a file is; its refusal names the name under which it is read."""
    name, _, what = case.partition(" of ")
    data = json.dumps(ROWS).encode() if name.startswith("a.json.") else JSONL
    path = put(tmp_path / name, PACK[what](data) if what in PACK else CONTAINERS[what]())
    refusal = refusal_of(path)
    assert refusal.reason.endswith("but the name does not say so")
    if name == "a.zip" and what == "gz":  # what is in it cannot be told
        assert "unpack it: .gz works only with the text formats" == refusal.remedy
        return
    (better,) = shlex.split(refusal.remedy.removeprefix("rename it to "))
    assert ROWS == [row.value for row in read_rows(path.rename(tmp_path / better))]


@pytest.mark.parametrize("name", ["rows.gz", "rows.bz2", "rows.tar.gz", "rows.parquet.gz", "rows.xlsx", "rows"])
def test_an_unknown_ending_names_the_way(tmp_path: Path, name: str) -> None:
    """The refusal of a compressed file of unstated content has a command that states it; others say what to do."""
    packing = name.rpartition(".")[2]
    path = put(tmp_path / name, PACK.get(packing, bytes)(JSONL))
    remedy = refusal_of(path).remedy
    if name in ("rows.gz", "rows.bz2"):
        command, source, target = shlex.split(remedy.removeprefix("name its content: "))
        assert "mv" == command
        assert ROWS == [row.value for row in read_rows((tmp_path / source).rename(tmp_path / target))]
    else:
        assert remedy.startswith(("unpack it", "rename or convert it"))


def test_memory_of_unpacking_is_bounded(tmp_path: Path) -> None:
    """A line without end in any container is refused at the limit, whatever the rest unpacks to."""
    import tracemalloc

    data = b"x" * (24 << 20)
    packed = {
        "a.txt.xz": lzma.compress(data, preset=0),
        "a.txt.bz2": bz2.compress(data),
        "a.zip": zipped(("a.txt", data)),
    }
    for name, content in packed.items():
        path = put(tmp_path / name, content)
        tracemalloc.start()
        assert "raise max_row_mb" in refusal_of(path, Limits(row_bytes=1 << 20)).remedy
        assert tracemalloc.get_traced_memory()[1] < 12 << 20, name
        tracemalloc.stop()


def test_a_stop_passes_through_every_container(tmp_path: Path) -> None:
    """Whatever a stop raises ends the reading and leaves nothing behind."""
    for name in ("a.jsonl.xz", "a.jsonl.bz2", "a.zip", "a.arrow", "a.csv"):
        path = put(tmp_path / name, CONTAINERS[name]())
        left = iter(range(2))

        def stop(left: Any = left) -> None:
            if next(left, None) is None:
                raise EOFError

        with pytest.raises(EOFError):
            tokenize_file(path, tmp_path / "tokens", sha256_file(path), TOKENIZER, stop=stop)
        assert not [entry for entry in tmp_path.iterdir() if "tokens" in entry.name]
