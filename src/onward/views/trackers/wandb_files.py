"""Reads what wandb wrote offline: the history of a run, from its `run-ID.wandb` files.

wandb has no reader of its own for Python. The file is a log in LevelDB's format (its `doc/log_format.md`): blocks of 32
KiB with records or pieces of records, each a protobuf message of wandb's; the first block begins with a header of 7
bytes.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32768, 7
FULL, FIRST, LAST = 1, 2, 4
"""Kinds of pieces: a whole record, its first piece, its last one."""


def histories(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Yield what was logged of a run, in the order in which it was logged.

    Args:
        folder: wandb's folder of runs, `wandb/` below what `WANDB_DIR` names.
    """
    for path in sorted(folder.glob(f"*run-*/run-{run_id}.wandb")):
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log, up to a truncated one."""
    place, parts = HEAD, b""
    while place + HEAD <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEAD:
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        piece = data[place + HEAD : place + HEAD + length]
        if len(piece) < length or kind == 0:
            return
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield parts
        place += HEAD + length
