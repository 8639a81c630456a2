"""Files that grow while they are read: each is refused with the key to raise, in memory that is bounded."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from tiny import byte_state, write_jsonl

from onward.config import Config
from onward.config.text import parse_config
from onward.data.files.faults import FileError
from onward.data.files.limits import DEFAULT_LIMITS, NO_LIMITS, Limits
from onward.data.files.reading import BadRows, Reading
from onward.data.files.sources import read_rows
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MIB = 1 << 20
PROGRAM = """
import json, resource, sys
from pathlib import Path
import pyarrow
from tiny import byte_state, write_jsonl
from onward.data.files.limits import Limits
from onward.data.files.reading import BadRows, Reading
from onward.data.row_tokenizer import RowTokenizer
from onward.data.files.sources import read_rows
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

status, folder = Path("/proc/self/status"), Path(sys.argv[1])
tokenizer = RowTokenizer(byte_state(), 200)


def peak():
    # Linux's own number: ru_maxrss begins with what the parent had
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20


def intake(path):
    before = peak()
    report = tokenize_file(path, folder / "tokens" / path.name, sha256_file(path), tokenizer)
    return [peak() - before, "".join(problem.remedy for problem in report.problems)]


for small in sorted((folder / "small").iterdir()):
    assert intake(small)[1] == "", small
grown = {path.name: intake(path) for path in sorted((folder / "bombs").iterdir())}
rows = sum(1 for _ in read_rows(folder / "bombs" / "rows.parquet", Reading(Limits(ratio=1 << 40))))
arrow = pyarrow.default_memory_pool().max_memory() >> 20
long = {count: intake(write_jsonl(folder / f"{count}.jsonl", [{"text": "x" * (1 << 20)}] * count)) for count in (1, 4)}
print(json.dumps({"bombs": grown, "rows": rows, "arrow": arrow, "long": long}))
"""


def bombs(directory: Path) -> dict[str, Path]:
    """Write a small file of each kind that unpacks to very much; return them by name."""
    directory.mkdir(exist_ok=True)
    tables = {
        "rows": pyarrow.table({"text": ["x" * MIB] * 200}),
        "items": pyarrow.table({"text": ["a"], "messages": [[{"content": "x" * MIB}] * 200]}),
        "numbers": pyarrow.table({"text": ["a"], "numbers": [[1] * 8_000_000]}),
        "one": pyarrow.table({"text": ["a", "x" * (192 * MIB)]}),
    }
    paths: dict[str, Path] = {}
    for name, table in tables.items():
        paths[name] = directory / f"{name}.parquet"
        parquet.write_table(table, paths[name], compression="zstd")
    for name, data in {
        "blank.jsonl.zst": zstandard.compress(b"\n" * (64 * MIB)),
        "line.txt.zst": zstandard.compress(b"x" * (192 * MIB)),
        "row.json.gz": gzip.compress(b'[{"text": "' + b"x" * (192 * MIB), 1),
        "lists.jsonl": b'{"text": "a", "x": [' + b"[]," * (5 * MIB) + b"[]]}",
        "lists.json": b'{"text": "a", "x": [' + b"[]," * (5 * MIB) + b"[]]}",
    }.items():
        paths[name] = directory / name
        paths[name].write_bytes(data)
    return paths


def smalls(directory: Path) -> None:
    """Write a small file of each kind: reading it loads all libraries before anything is measured."""
    directory.mkdir()
    data = b'{"text": "a"}'
    parquet.write_table(pyarrow.table({"text": ["a"]}), directory / "a.parquet")
    for name, packed in {"a.jsonl": data, "b.json": data, "c.json.gz": gzip.compress(data)}.items():
        (directory / name).write_bytes(packed)
    (directory / "d.txt.zst").write_bytes(zstandard.compress(b"a"))


@pytest.mark.slow
def test_bombs_and_long_rows_take_bounded_memory(tmp_path: Path) -> None:
    """What would grow to hundreds of megabytes is refused within 150 MB, with the key that raises the limit.

    Parquet that is allowed to grow is still decoded in little memory, and of several long rows one at a time is
    tokenized. A process measures itself.
    """
    paths = bombs(tmp_path / "bombs")
    smalls(tmp_path / "small")
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert {path.name for path in paths.values()} == set(found["bombs"])
    for name, (mib, remedy) in found["bombs"].items():
        assert "max_row_mb" in remedy or "max_unpack_ratio" in remedy, name
        assert mib < 150, name
    assert 200 == found["rows"]
    assert found["arrow"] < 50
    (one, _), (further, _) = found["long"].values()
    assert further < 0.3 * one + 30


@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("a.txt", b"a\n" + b"x" * 1001, "split it into several rows, or raise max_row_mb"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 1001, "split it into several rows, or raise max_row_mb"),
        ("a.json", b'[{"text": "a"},\n{"text": "' + b"x" * 1001, "split it into several rows, or raise max_row_mb"),
        ("a.jsonl", b'{"text": "a"}\n[' + b"0," * 300 + b"0]", "split it into several rows, or raise max_row_mb"),
    ],
)
def test_a_row_over_the_limit_is_named(tmp_path: Path, name: str, data: bytes, remedy: str) -> None:
    """Its line or row, and the key to raise; values count besides their text."""
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FileError) as refusal:
        list(read_rows(path, Reading(Limits(row_bytes=1000))))
    assert (2, remedy) == (refusal.value.line, refusal.value.remedy)


def test_a_parquet_row_over_the_limit_is_named(tmp_path: Path) -> None:
    """A row that a dictionary or a list makes large is found among small ones, across batches and row groups."""
    texts = ["a"] * 2500 + ["x" * 900] * 2 + ["y" * 1001] + ["b"] * 10
    table = pyarrow.table({"text": pyarrow.array(texts), "list": [[{"a": "z", "b": None}]] * len(texts)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2000)
    with pytest.raises(FileError) as refusal:
        list(read_rows(tmp_path / "a.parquet", Reading(Limits(row_bytes=1000))))
    assert (2503, "the row is larger than 1000 bytes") == (refusal.value.line, refusal.value.reason)
    assert texts == [row.value["text"] for row in read_rows(tmp_path / "a.parquet", Reading(Limits(row_bytes=1200)))]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.parquet"])
def test_what_a_file_may_unpack_to(tmp_path: Path, name: str) -> None:
    """A small file may be as repetitive as it likes; a larger one is refused beyond the ratio, or the whole size."""
    path = tmp_path / name
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    for count, fits in ((15_000, True), (20_000, False)):
        texts = ["x" * 1000] * count
        if name == "a.parquet":
            parquet.write_table(pyarrow.table({"text": texts}), path)
        else:
            path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
        limits = Limits(ratio=2)
        if fits:
            assert count == sum(1 for _ in read_rows(path, Reading(limits)))
        else:
            with pytest.raises(FileError, match="it unpacks to more than 2 times its size"):
                list(read_rows(path, Reading(limits)))
        assert count == sum(1 for _ in read_rows(path, Reading(NO_LIMITS)))
        with pytest.raises(FileError, match="it unpacks to more than 9 MiB") as refusal:
            list(read_rows(path, Reading(Limits(unpacked_bytes=9 * MIB))))
        assert "split the file, or raise max_unpacked_mb" == refusal.value.remedy


def test_a_text_that_the_template_makes_too_long_is_a_problem_of_its_row(tmp_path: Path) -> None:
    """The limit holds for what is tokenized, too: other rows are still checked."""
    rows = [{"messages": [{"role": role, "content": "x" * 400} for role in ("user", "assistant")]}, {"text": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    size = len(path.read_text().splitlines()[0]) + 200  # its values count, too
    tokenizer = RowTokenizer(
        byte_state("{% for m in messages %}{{ '-' * 500 + m.content + eos_token }}{% endfor %}"), 200
    )
    limits = Limits(row_bytes=size)
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), tokenizer, reading=Reading(limits))
    expected = [f"the text of the row is larger than {size} bytes", "text is empty"]
    assert expected == [problem.reason for problem in report.problems]


def test_no_row_is_left_out_because_of_a_limit(tmp_path: Path) -> None:
    """A limit refuses the file, whatever is left out: it may be raised, and the tokens of accepted files are made again
    without limits."""
    rows = [{"messages": [{"role": role, "content": "x" * size} for role in ("user", "assistant")]} for size in [9] * 9]
    wide = {"messages": [{"role": role, "content": "x" * 400} for role in ("user", "assistant")]}
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, wide])
    tokenizer = RowTokenizer(
        byte_state("{% for m in messages %}{{ '-' * 500 + m.content + eos_token }}{% endfor %}"), 2000
    )
    reading = Reading(Limits(row_bytes=1500), leaves_out=True)
    report = tokenize_file(path, tmp_path / "tokens", sha256_file(path), tokenizer, reading=reading)
    assert (False, "", [10]) == (report.ok, report.way_out, [problem.line for problem in report.problems])


def test_limits_of_a_config() -> None:
    """The keys of a config set the limits, and its defaults are theirs."""
    assert DEFAULT_LIMITS == Limits.of(Config())
    values = {"max_row_mb": 2, "max_unpacked_mb": 30, "max_unpack_ratio": 4}
    assert Limits(2 * MIB, 30 * MIB, 4) == Limits.of(parse_config(values))
    assert Config().training() == parse_config(values).training()


@pytest.mark.parametrize(
    ("rule", "most", "rows"),
    [
        (BadRows(), 0, 10),
        (BadRows(share=0.25), 2, 8),
        (BadRows(share=0.25), 2, 11),
        (BadRows(few=3), 3, 100),
        (BadRows(few=3), 2, 5),
        (BadRows(few=3), 1, 4),
        (BadRows(share=0.1, few=3), 5, 50),
        (BadRows(known=4), 4, 5),
        (BadRows(share=0.1, known=1), 1, 5),
    ],
)
def test_bad_rows_may_be_a_share_a_few_or_those_that_are_known(rule: BadRows, most: int, rows: int) -> None:
    """A few are fewer than half of the file; those that were left out when it was accepted are left out again."""
    assert [bad for bad in range(rows + 1) if rule.may_leave_out(bad, rows)] == [*range(most + 1)]
