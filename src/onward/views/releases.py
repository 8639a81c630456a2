"""The releases of a run: listing, comparing and removing them. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onward.atomic import remove_tree
from onward.digest import xxh3_file
from onward.errors import UsageError
from onward.layout import RunLayout, entries
from onward.text import quoted

RECORD = "release.json"
"""The record that Onward writes into the folder of a release: where it comes from, and what was measured of it."""
EDITED = (".md", ".svg")
"""How the names of the model card and its picture end, which people may edit."""


@dataclass(frozen=True)
class Release:
    """A folder in `releases/` that Onward made, and its record."""

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the release."""
        return self.folder.name

    def changed(self, held: Path, left_out: Collection[str] = ()) -> list[str]:
        """Return which files are no longer what was published.

        Args:
            held: the folder with links or copies of its files.
            left_out: names of files that are not there.
        """
        files: dict[str, str] = self.record["files"]
        read = {name: digest for name, digest in files.items() if not name.endswith(EDITED) and name not in left_out}
        return [
            name for name, digest in read.items() if not (held / name).is_file() or xxh3_file(held / name) != digest
        ]

    def summary(self) -> dict[str, Any]:
        """Return its entry in a list of releases, as JSON values."""
        found = self.record["measured"]
        return {
            "name": self.name,
            "step": self.record["step"],
            "files": len(self.record["stream"]),
            "cooldown": self.record["cooldown"]["steps"],
            "averaged": len(self.record["averaged"]),
            "average": found["average"],
            "forgetting": found["forgetting"]["mean"],
            "worst": found["forgetting"]["worst"],
            "anchor": found["anchor"],
            "verified": self.record["verified"],
            "created": self.record["created"],
            "notes": self.record["notes"],
            "weights": self.record["weights"],
        }


def list_releases(layout: RunLayout) -> list[Release]:
    """Return the releases of a run, the oldest first, without folders that Onward did not make."""
    found = (read_release(folder) for folder in entries(layout.releases))
    return sorted((release for release in found if release is not None), key=lambda release: release.record["created"])


def find_release(layout: RunLayout, name: str) -> Release:
    """Return a release by its name.

    Raises:
        UsageError: there is none.
    """
    releases = list_releases(layout)
    for release in releases:
        if release.name == name:
            return release
    there = ", ".join(release.name for release in releases) or "none"
    raise UsageError(f"there is no release {name!r}", where=layout.releases, hint=f"Releases: {there}.")


def remove_release(layout: RunLayout, name: str) -> None:
    """Remove a release: only a folder that Onward made, and only the files that it wrote.

    Raises:
        UsageError: there is none, or it contains other files.
    """
    release = find_release(layout, name)
    others = [path.name for path in entries(release.folder) if path.name not in {RECORD, *release.record["files"]}]
    if others:
        hint = f"Move them away first, or remove everything yourself: rm -r {quoted(release.folder)}"
        raise UsageError(f"not made by Onward: {', '.join(others)}", where=release.folder, hint=hint)
    remove_tree(release.folder)


def lines(releases: Sequence[Release]) -> Iterator[str]:
    """Yield the releases as lines for people, side by side."""
    if not releases:
        yield "no releases yet; onward release NAME makes one"
        return
    rows: list[tuple[str, ...]] = [
        ("name", "step", "files", "cooldown", "average loss", "forgetting", "worst", "KL to base", "proof")
    ]
    for release in releases:
        found = release.summary()
        figures = (found[key] for key in ("average", "forgetting", "worst", "anchor"))
        numbers = (str(found[key]) for key in ("name", "step", "files", "cooldown"))
        rows.append((*numbers, *map(_figure, figures), "verified" if found["verified"] else "not verified"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        name, *others = row
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join((f"{name:{widths[0]}}", *cells))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_release(folder: Path) -> Release | None:
    """Return the release in a folder; None if there is no record of one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Release(folder, record) if isinstance(record, dict) and record.get("name") == folder.name else None
