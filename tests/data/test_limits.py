"""Files that grow while they are read: each is refused with the key to raise, in memory that is bounded."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from onward.config import Config, parse_config
from onward.data.limits import DEFAULT_LIMITS, Limits
from onward.data.sources import FileError, read_rows

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

MIB = 1 << 20
PROGRAM = """
import resource, sys
from pathlib import Path
from tiny import byte_tokenizer
from onward.data.row_tokenizer import RowTokenizer
from onward.data.tokenize import tokenize_file
from onward.digest import sha256_file

small, path = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = RowTokenizer(byte_tokenizer(), 200)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
tokenize_file(small, small.with_name("small"), sha256_file(small), tokenizer)
before = peak()
report = tokenize_file(path, path.with_name("tokens"), sha256_file(path), tokenizer)
print(peak() - before, report.problems[0].remedy if report.problems else "ok", sep="|")
"""


def growth(tmp_path: Path, path: Path) -> tuple[int, str]:
    """Return by how many MiB a process grows that tokenizes a file, and the remedy of the refusal."""
    small = tmp_path / f"small.{path.name.partition('.')[2]}"
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": ["a"]}), small)
    else:
        data = b'{"text": "a"}'
        small.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    command = [sys.executable, "-c", PROGRAM, str(small), str(path)]
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    mib, _, remedy = done.stdout.strip().partition("|")
    return int(mib), remedy


def bombs(directory: Path) -> dict[str, Path]:
    """Write a file of each kind that a few bytes blow up; return them by name."""
    directory.mkdir(exist_ok=True)
    tables = {
        "rows": pyarrow.table({"text": ["x" * MIB] * 400}),
        "items": pyarrow.table({"text": ["a"], "messages": [[{"content": "x" * MIB}] * 400]}),
        "numbers": pyarrow.table({"text": ["a"], "numbers": [[1] * 20_000_000]}),
        "one": pyarrow.table({"text": ["a", "x" * (300 * MIB)]}),
    }
    paths: dict[str, Path] = {}
    for name, table in tables.items():
        paths[name] = directory / f"{name}.parquet"
        parquet.write_table(table, paths[name], compression="zstd")
    for name, data in {
        "blank.jsonl.zst": zstandard.compress(b"\n" * (400 * MIB)),
        "line.txt.zst": zstandard.compress(b"x" * (400 * MIB)),
        "row.json.gz": gzip.compress(b'[{"text": "' + b"x" * (400 * MIB)),
        "lists.jsonl": b'{"text": "a", "x": [' + b"[]," * (5 * MIB) + b"[]]}",
        "lists.json": b'{"text": "a", "x": [' + b"[]," * (5 * MIB) + b"[]]}",
    }.items():
        paths[name] = directory / name
        paths[name].write_bytes(data)
    return paths


NAMES = ["rows", "items", "numbers", "one", "blank.jsonl.zst", "line.txt.zst", "row.json.gz", "lists.jsonl"]


@pytest.fixture(scope="session")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bombs, written once."""
    return bombs(tmp_path_factory.mktemp("bombs"))


@pytest.mark.parametrize("name", [*NAMES, "lists.json"])
def test_bombs_are_refused_in_bounded_memory(tmp_path: Path, bomb: dict[str, Path], name: str) -> None:
    """What would grow to hundreds of megabytes is refused in less than 150, with the key that raises the limit."""
    mib, remedy = growth(tmp_path, bomb[name])
    assert any(key in remedy for key in ("max_row_mb", "max_unpack_ratio"))
    assert mib < 150
