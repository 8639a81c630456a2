"""Figures as they come, one JSON line each, so that a run that is cut short keeps what it measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORDS = "ONWARD_GPU_RECORDS"
"""Variable with the file that a check appends its lines to."""


def emit(subject: str, **figures: Any) -> None:
    """Append one line of figures about a subject, and print it.

    Args:
        figures: JSON values; `equal` says for an exactness check whether the bits were equal.
    """
    line = json.dumps({"subject": subject, **figures})
    print(line, flush=True)
    path = os.environ.get(RECORDS)
    if path:
        append(Path(path), {"subject": subject, **figures})


def append(path: Path, values: dict[str, Any]) -> None:
    """Append a line to a file; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, without a truncated one."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
