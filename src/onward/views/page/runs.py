"""Which runs a page shows, and their names in its addresses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onward.layout import RunLayout, entries
from onward.text import printable

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class NamedRun:
    """A run and its name in addresses: that of its directory, in plain characters, unique on the page."""

    name: str
    layout: RunLayout

    @property
    def title(self) -> str:
        """The name of its directory, for people."""
        return printable(self.layout.root.resolve().name or str(self.layout.root))


def find_runs(directories: Sequence[Path]) -> list[NamedRun]:
    """Return the runs in these directories: each is a run, or a folder of runs.

    Raises:
        UsageError: one of them is neither.
        DamagedState: the ledger of one is gone.
    """
    layouts: dict[Path, RunLayout] = {}
    for directory in directories:
        for layout in _runs_in(directory):
            layouts.setdefault(layout.root.resolve(), layout)
    named: dict[str, NamedRun] = {}
    for root, layout in layouts.items():
        plain = _UNSAFE.sub("-", root.name).strip(".-") or "run"
        names = (plain, *(f"{plain}-{number}" for number in range(2, len(layouts) + 2)))
        name = next(name for name in names if name not in named)
        named[name] = NamedRun(name, layout)
    return list(named.values())


def _runs_in(directory: Path) -> list[RunLayout]:
    layout = RunLayout(directory)
    found = [] if layout.ledger.is_file() else sorted(entries(directory), key=lambda entry: _counting(entry.name))
    others = [RunLayout(entry) for entry in found]
    below = [other for other in others if other.ledger.is_file()]
    if not below:
        layout.require()
    return below or [layout]


def _counting(name: str) -> list[str | int]:
    """Return what sorts names as people count: run-2 comes before run-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
