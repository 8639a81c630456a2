"""Names of files in `archive/` and `rejected/`: plain, not too long, and never one already taken."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Set
from pathlib import Path

from onward.atomic import TEMPORARY_PREFIX

NAME_BYTES, NAME_ENDING = 180, 12
"""Bytes of a long name that are kept, and characters of its ending: room for a prefix, a number and `.report.json`."""
REPORT = ".report.json"
"""Ending of a report in `rejected/`; no user's file is kept there under a name with this ending."""
NUMBERED = 100
"""How many numbers are tried for a name that is taken, before a random one."""


def plain_name(name: str) -> str:
    """Return a file's name in printable characters, short enough for the longer names derived from it."""
    plain = "".join(character if character.isprintable() else "_" for character in name)
    if plain.startswith(TEMPORARY_PREFIX):
        plain = f"_{plain[1:]}"
    head, ending = plain[:-NAME_ENDING], plain[-NAME_ENDING:]
    while len(head.encode()) > NAME_BYTES:
        head = head[:-1]
    return head + ending


def rejected_name(name: str) -> str:
    """Return the name under which a refused file is kept; it is never that of a report."""
    return f"{name.removesuffix(REPORT)}.report_.json" if name.endswith(REPORT) else name


def report_of(kept: Path) -> Path:
    """Return the path of the report on a refused file."""
    return kept.with_name(f"{kept.name}{REPORT}")


def one_name(name: str) -> str:
    """Return what two names share if a disk may take them for one: some ignore case, or how accents are coded."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def unused_name(folder: Path, name: str, *, reserved: Set[str] = frozenset(), with_report: bool = False) -> Path:
    """Return a path in `folder` that no file has yet: `name`, or `name` with a number before its endings.

    Args:
        reserved: further names that count as taken, as `one_name` returns them.
        with_report: whether the name of the file's report has to be free as well.
    """
    stem, dot, endings = name.partition(".")
    path = folder / name
    for number in range(2, NUMBERED):
        if not _is_taken(path, reserved) and not (with_report and _is_taken(report_of(path), reserved)):
            return path
        path = folder / f"{stem}-{number}{dot}{endings}"
    return folder / f"{stem}-{os.urandom(8).hex()}{dot}{endings}"


def _is_taken(path: Path, reserved: Set[str]) -> bool:
    unfinished = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    return one_name(path.name) in reserved or os.path.lexists(path) or os.path.lexists(unfinished)
