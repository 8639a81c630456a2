"""Files that kill their reader, and runs in which they wait."""

from __future__ import annotations

import struct

import zstandard

from onward.layout import RunLayout
from onward.service.intake.arrivals import Arrivals
from onward.store.ledger import Ledger

SETTINGS = {"batch_size": 4, "max_length": 256, "lora": {"rank": 2}, "settle_seconds": 0.0}
DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
POISONS: dict[str, bytes] = {
    "huge.json": b'[{"text": "a", "n": ' + b"9" * 5_000 + b"}]",
    "huge.jsonl": b'{"text": "a", "n": ' + b"9" * 5_000 + b"}\n",
    "deep.jsonl": DEEP,
    "deep.json": b"[" + DEEP + b"]",
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "zeros.jsonl": bytes(4_096),
    "zeros.parquet": b"PAR1" + bytes(4_096) + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "bomb.jsonl.zst": zstandard.compress(b'{"text": "' + b"a" * (32 << 20) + b'"}\n'),
    "cut.jsonl.zst": zstandard.compress(b'{"text": "a"}\n' * 1_000)[:-7],
    "noise.jsonl.zst": b"\x28\xb5\x2f\xfd" + bytes(range(256)),
}


def announce(layout: RunLayout, ledger: Ledger, *names: str) -> None:
    """Give files of the inbox their places in the queue, in this order."""
    Arrivals(layout, ledger).announce([(layout.inbox / name, 0) for name in names], "c")


def states(ledger: Ledger) -> dict[str, str]:
    """Return the state of every file by name."""
    return {row.name: row.state for row in ledger.files("arriving", "queued", "rejected", "skipped")}
