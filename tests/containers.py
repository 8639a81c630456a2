"""Files in containers that tests make, and why one is refused."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from tiny import byte_state

from onward.data.files.faults import FileError
from onward.data.files.limits import Limits
from onward.data.files.reading import Reading
from onward.data.files.sources import read_rows
from onward.data.row_tokenizer import RowTokenizer

ROWS = [{"prompt": f'{number}, "{number}"\n?', "completion": f"caf\u00e9 {number}"} for number in range(50)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TOKENIZER = RowTokenizer(byte_state(), 200)


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive of members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def put(path: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(data)
    return path


def refusal_of(path: Path, limits: Limits | None = None) -> FileError:
    """Return the refusal of a file."""
    with pytest.raises(FileError) as refusal:
        list(read_rows(path, Reading(limits or Limits())))
    return refusal.value
