"""What a run trained and committed, read from its files without Onward's help, to compare one release with another."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any


def read_steps(run: Path) -> list[list[Any]]:
    """Return name, step, rows, digest of the rows, learning rate and loss of each step in the stream."""
    query = (
        "SELECT name, step, s.rows, rows_digest, learning_rate, loss FROM steps s JOIN files f ON f.id = s.file_id"
        " WHERE state IN ('training', 'done') ORDER BY step"
    )
    with contextlib.closing(sqlite3.connect(run / "ledger.sqlite3")) as ledger:
        return [list(row) for row in ledger.execute(query)]


def read_states(run: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured of each state that is kept (digests of weights and moments among it), by step."""
    folders = [*(run / "boundaries").glob("step-*"), *(run / "current_model").glob("checkpoint-*")]
    manifests = [json.loads((folder / "onward.json").read_bytes()) for folder in folders]
    return {str(found["step"]): found["measurement"] for found in sorted(manifests, key=lambda found: found["step"])}


def read_environment(run: Path) -> dict[str, Any]:
    """Return the environment in which the newest state of a run was made."""
    manifest = next(run.glob("current_model/checkpoint-*/onward.json"))
    return {**json.loads(manifest.read_bytes())["environment"], "processor_model": _processor_model()}


def _processor_model() -> str:
    """Return the processor's name: two with the same instructions may still differ in last bits."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return ""
